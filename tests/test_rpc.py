"""Layers on two RPC servers: what is kept, what crosses the wire, and what is refused."""
import contextlib
import socket
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny

import pykvc
from evals.tools.served import Server
from pykvc import _core, rpc

SERVER = Path(_core.__file__).parent/"lib"/"ggml-rpc-server"
N, BUDGET = 1024, 256
TOKENS = np.random.default_rng(5).integers(1, 100, 2*N).astype(np.int32)


class Wire:
    """What lies before a server: passes on, and counts the bytes from it and to it."""

    def __init__(self, port):
        self.port, self.read, self.written = port, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.port))
                threading.Thread(target=self._pass_on, args=(client, server, "written"), daemon=True).start()
                threading.Thread(target=self._pass_on, args=(server, client, "read"), daemon=True).start()

    def _pass_on(self, source, target, name):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                setattr(self, name, getattr(self, name) + len(data))
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def reset(self):
        self.read = self.written = 0


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def wires():
    ports = [free_port(), free_port()]
    servers = [subprocess.Popen([SERVER, "-p", str(port), "-t", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
               for port in ports]
    for port in ports:
        for _ in range(200):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            threading.Event().wait(0.05)
    found = [Wire(port) for port in ports]
    yield found
    for wire in found:
        wire.listener.close()
    for server in servers:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("rpc")/"llama.gguf", n_layer=4, head_dim=64)


def opened(path, policy, wires):
    servers = rpc.endpoints([wire.endpoint for wire in wires])
    rpc.check(servers)
    model = _core.Model(str(path), n_gpu_layers=99, rpc_servers=servers)
    return _core.Context(model, n_ctx=3072, n_ubatch=256, n_threads=1, policy=policy, budget=str(BUDGET))


def evicted(path, policy, wires):
    """(positions kept at two evictions, bytes read and written by the second, logits after it)"""
    ctx, kept = opened(path, policy, wires), []
    for step in range(2):
        ctx.decode(TOKENS[N*step:N*(step + 1)])
        for wire in wires:
            wire.reset()
        assert ctx.evict()
        kept.append([np.array(layer) for layer in ctx.kept()])
        crossed = [sum(getattr(wire, name) for wire in wires) for name in ("read", "written")]
    ctx.decode(np.array([7], dtype=np.int32))
    return kept, crossed, ctx.logits()


# a window of attention, keys and their likeness, attention summed as it comes, values behind the output projection
@pytest.mark.parametrize("policy", ["snapkv:share=layers", "keydiff", "h2o", "expected_attention", "criticalkv", "streaming_llm"])
def test_two_servers_keep_what_one_keeps(wires, path, policy):
    one, two = evicted(path, policy, wires[:1]), evicted(path, policy, wires)
    for a, b in zip(one[0], two[0]):
        assert all(map(np.array_equal, a, b))
    np.testing.assert_allclose(one[2], two[2], rtol=1e-4, atol=1e-4)


def test_an_eviction_moves_scores_and_indices(wires, path):
    """No rows: those of the cache would be 2 * 1024 tokens * 4 layers * 2 heads * 64 numbers of 2 bytes."""
    (_, crossed, _), n_cache = evicted(path, "keydiff", wires), 2*1024*4*2*64*2
    scores = 4*2*(BUDGET + N)*4
    assert scores <= crossed[0] < 1.5*scores + 2**14 < n_cache
    assert crossed[1] < n_cache/4  # graphs, and which rows go where


def test_llm(wires, path):
    servers = ",".join(wire.endpoint for wire in wires)
    with pykvc.LLM(path, n_gpu_layers=-1, rpc_servers=servers, n_ctx=2048, kv_policy="keydiff", kv_budget=BUDGET) as llm:
        there = llm.generate(tokens=TOKENS[:600].tolist(), max_tokens=8)
        with pykvc.LLM(path, n_gpu_layers=-1, rpc_servers=servers, n_ctx=512) as second:  # the connection is shared
            assert second.generate(tokens=TOKENS[:20].tolist(), max_tokens=2).n_predicted
    with pykvc.LLM(path, n_ctx=2048, kv_policy="keydiff", kv_budget=BUDGET) as llm:
        here = llm.generate(tokens=TOKENS[:600].tolist(), max_tokens=8)
    assert there.kv["bytes_used"] == here.kv["bytes_used"] and max(there.kv["kept"]) <= 600
    with pykvc.LLM(path, n_ctx=64, n_gpu_layers=-1) as llm:  # a model that names none has none
        assert llm.generate(tokens=[1, 2, 3], max_tokens=2).n_predicted


@pytest.mark.server
def test_serve(wires, tmp_path):
    path = tiny.write_chat(tmp_path/"model.gguf", {}, n_layer=4, mute_eos=True)
    servers = ",".join(wire.endpoint for wire in wires)
    with Server(tmp_path/"log", "-m", path, "-c", 2048, "-np", 1, "-t", 1, "-ngl", 99, "--rpc", servers,
                "--kv-policy", "keydiff", "--kv-budget", BUDGET).wait() as server:
        reply = server.ok("/completion", {"prompt": TOKENS[:600].tolist(), "n_predict": 4})
        assert reply["kv"]["n_evictions"] == 1 and reply["kv"]["n_kept"] < 600
        assert server.stop() == 0


@pytest.mark.parametrize("servers, why", [
    ("here", "host:port"), ("127.0.0.1:0", "host:port"), ("", "host:port"), ([], "at least one"),
    (5, "at least one"), (["127.0.0.1:1"], "no RPC server answers")])
def test_refused(path, servers, why):
    with pytest.raises(ValueError, match=why):
        pykvc.LLM(path, n_gpu_layers=-1, rpc_servers=servers)


def test_refused_beside(wires, path):
    with pytest.raises(ValueError, match="n_gpu_layers"):
        pykvc.LLM(path, rpc_servers=wires[0].endpoint)
    for more in ({"main_gpu": 1}, {"tensor_split": [1, 1]}):
        with pytest.raises(ValueError, match="wants 2 devices: RPC servers and GPUs are 1 here"):
            pykvc.LLM(path, rpc_servers=wires[0].endpoint, n_gpu_layers=-1, **more)
    with pytest.raises(ValueError, match="kv_cells='auto'"):
        pykvc.LLM(path, rpc_servers=wires[0].endpoint, n_gpu_layers=-1, kv_policy="keydiff", kv_cells="auto")


def test_another_protocol_is_refused(path):
    """llama.cpp would end the process."""
    def answer(listener):
        client, _ = listener.accept()
        with client:
            client.recv(100)
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        with pytest.raises(ValueError, match="does not speak"):
            pykvc.LLM(path, n_gpu_layers=-1, rpc_servers=f"127.0.0.1:{listener.getsockname()[1]}")
