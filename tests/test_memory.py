"""Where weights and caches lie: kv_cells="auto", and devices that are not there."""
import pytest
import tiny

import pykvc
from pykvc import _core, memory

ALL_ON_CPU = {"n_gpu_layers": 0, "main_gpu": -1, "tensor_split": (), "rpc_servers": ()}
GIB = 2**30


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("memory")/"llama.gguf", n_layer=4)


def test_what_is_free_is_less_than_there_is():
    assert 2**20 < memory.available() < 2**50


def test_auto_takes_all_of_a_short_context(path):
    with pykvc.LLM(path, n_ctx=512, kv_policy="keydiff", kv_cells="auto") as llm:
        assert llm.stats()["cells_allocated"] == 512
        llm.generate(tokens=[1, 2, 3], max_tokens=4)


def test_auto_takes_what_is_free_and_evicts_there(path, monkeypatch):
    a_cell = 2*2*32*2*4  # bytes: K and V, two heads of 32, F16, four layers
    monkeypatch.setattr(memory, "FOR_COMPUTING", 0)
    monkeypatch.setattr(memory, "available", lambda: int(2*2**20/memory.SHARE) + 8)
    with pykvc.LLM(path, n_ctx=4096, n_ubatch=128, kv_policy="streaming_llm", kv_cells="auto") as llm:
        assert llm.stats()["cells_allocated"] == 2*2**20//a_cell//256*256 == 2048
        llm.prefill(tokens=[1, 2, 3]*1000)
        assert llm.stats()["cells"] <= 2048 and llm.stats()["n_evictions"] > 0


def test_a_state_of_auto_fits_where_other_memory_is_free(path, monkeypatch):
    monkeypatch.setattr(memory, "FOR_COMPUTING", 0)
    states, tokens = [], []
    for mib in (2, 3, 1):
        monkeypatch.setattr(memory, "available", lambda mib=mib: int(mib*2**20/memory.SHARE) + 8)
        with pykvc.LLM(path, n_ctx=4096, n_ubatch=128, kv_policy="streaming_llm", kv_cells="auto") as llm:
            if not states:
                llm.prefill(tokens=[1, 2, 3]*1000)
                states.append(llm.save_state())
            elif mib == 1:
                with pytest.raises(ValueError, match="cannot be restored"):
                    llm.load_state(states[0])
                break
            else:
                llm.load_state(states[0])
            tokens.append(llm.generate(reset=False, max_tokens=4).tokens)
    assert tokens[0] == tokens[1]


def test_auto_says_when_nothing_is_free(path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(ValueError, match="no memory left"):
        pykvc.LLM(path, kv_policy="keydiff", kv_cells="auto")


@pytest.mark.parametrize("n_gpu_layers, main_gpu, offload, expected", [
    (0, -1, True, 90), (-1, -1, True, 9 + 18), (-1, 1, True, 18), (-1, -1, False, 90), (2, -1, True, (9 + 18)*2), (3, -1, True, (9 + 18)*4//3)])
def test_auto_looks_where_the_cache_lies(path, monkeypatch, n_gpu_layers, main_gpu, offload, expected):
    """GiB of a machine with 100 free, and GPUs with 10 and 20 of them, of which nine tenths count. The model has four
    layers."""
    monkeypatch.setattr(memory, "FOR_COMPUTING", 0)
    monkeypatch.setattr(memory, "available", lambda: 100*GIB)
    monkeypatch.setattr(_core, "device_memory", lambda: [("GPU0", "GPU", 10*GIB, 11*GIB), ("GPU1", "GPU", 20*GIB, 24*GIB), ("CPU", "CPU", 9*GIB, 9*GIB)])
    where = {"n_gpu_layers": n_gpu_layers, "main_gpu": main_gpu, "tensor_split": (), "rpc_servers": ()}
    assert memory.for_cache(_core.Model(str(path)), where, offload)/GIB == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("how, words", [
    ({"main_gpu": 10}, "main_gpu wants 11 GPUs"), ({"tensor_split": [1]*20}, "tensor_split wants 20 GPUs"), ({"main_gpu": 0, "tensor_split": [1]}, "not both"),
    ({"main_gpu": -1}, "main_gpu"), ({"tensor_split": [-1]}, "tensor_split"), ({"n_threads_batch": 0}, "n_threads_batch")])
def test_devices_that_are_not_there(path, how, words):
    with pytest.raises(ValueError, match=words):
        pykvc.LLM(path, n_ctx=256, **how)


def test_ways_to_load_give_the_same_answers(path):
    answers = []
    for how in ({}, {"use_mmap": False}, {"offload_kqv": False}, {"n_threads": 1, "n_threads_batch": 2}):
        with pykvc.LLM(path, n_ctx=256, **how) as llm:
            answers.append(llm.generate(tokens=[1, 2, 3], max_tokens=8).tokens)
    assert answers.count(answers[0]) == len(answers)
