"""cpp/ggml/attn_scores.h: what the window's queries give to the cells on the CPU, against llama.cpp's ops (PYKVC_STOCK_ATTENTION)."""
import gguf
import numpy as np
import pytest

import oracle
import tiny
from pykvc import _core


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return _core.Model(str(tiny.write(tmp_path_factory.mktemp("tiny")/"tiny.gguf")))


def tokens(n, seed=1):
    return np.random.default_rng(seed).integers(0, tiny.N_VOCAB, n, dtype=np.int32)


def context(model, policy, n_threads=2, **how):
    return _core.Context(model, n_ctx=1024, n_threads=n_threads, policy=policy, budget="192", **how)


def both(ctx, monkeypatch, name):
    """A signal of all layers, by our steps and by llama.cpp's graph."""
    ours = [layer[name].copy() for layer in ctx.signals()]
    with monkeypatch.context() as m:
        m.setenv("PYKVC_STOCK_ATTENTION", "1")
        return ours, [layer[name].copy() for layer in ctx.signals()]


def assert_alike(ours, stock):
    for a, b in zip(ours, stock):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-8)
    assert any(not np.array_equal(a, b) for a, b in zip(ours, stock))  # or both came the same way


@pytest.mark.parametrize("window", [1, 16, 33, 130])
@pytest.mark.parametrize("type_k", ["f32", "f16", "q8_0"])
def test_same_as_the_graph(model, monkeypatch, window, type_k):
    """Windows that fill lanes and that do not; cells that fill tiles of 64 and that do not; without f32 keys ggml rounds the queries."""
    for n in (150, 192, 577):
        ctx = context(model, f"snapkv:window={window}", type_k=type_k)
        ctx.decode(tokens(n))
        ours, stock = both(ctx, monkeypatch, "attn")
        if type_k == "f32":
            assert_alike(ours, stock)
        for a, b in zip(ours, stock):
            np.testing.assert_allclose(a.sum(axis=1), 1, atol=1e-5)
            np.testing.assert_allclose(a, b, atol={"f32": 1e-8, "f16": 2e-3, "q8_0": 5e-2}[type_k]*b.max(), rtol=1e-4)


def test_heads_of_different_lengths(model, monkeypatch):
    """adakv leaves empty slots before the first of a shorter head: nothing is given to them."""
    ctx = context(model, "adakv:window=8,alpha=0.1", type_k="f32")
    ctx.decode(tokens(300))
    assert ctx.evict() and any((k < 0).any() for k in ctx.kept())
    ctx.decode(tokens(20, 2))
    ours, stock = both(ctx, monkeypatch, "attn")
    assert_alike(ours, stock)
    for layer, given in zip(ctx.signals(), ours):
        assert not given[np.repeat(layer["pos"] < 0, tiny.N_HEAD//tiny.N_HEAD_KV, axis=0)].any()


@pytest.mark.parametrize("policy", ["finch", "kvzip"])
def test_probes(model, monkeypatch, policy):
    """The mean over the probe's queries, and the largest."""
    given = []
    for stock in ("", "1"):
        ctx = context(model, f"{policy}:window=64", type_k="f32")
        ctx.decode(tokens(300))
        with monkeypatch.context() as m:
            if stock:
                m.setenv("PYKVC_STOCK_ATTENTION", stock)
            ctx.ask(tokens(50, 3))
        given.append([layer["probed"] for layer in ctx.signals()])
    assert_alike(*given)


def test_rows_of_each_query_are_those_of_the_graph(model, monkeypatch):
    """dropkv and defensive see each query's attention, after an eviction too; 40 queries leave 8 lanes of a head empty."""
    ctx = context(model, "dropkv:window=40", type_k="f32")
    ctx.decode(tokens(300))
    for _ in range(2):
        ours, stock = both(ctx, monkeypatch, "attn_rows")
        assert_alike(ours, stock)
        np.testing.assert_allclose(ours[0].sum(axis=2), 1, atol=1e-5)
        ctx.evict()
        ctx.decode(tokens(41, 2))


def test_a_window_that_does_not_fit_into_the_workspace(tmp_path, monkeypatch):
    """16,500 cells of two query heads: the tiles of 127 queries take 16 MiB, so 200 take two graphs."""
    path = tiny.write(tmp_path/"long.gguf", n_layer=1, n_ctx=20000, head_dim=16)
    ctx = _core.Context(_core.Model(str(path)), n_ctx=16640, n_threads=2, policy="snapkv:window=200", budget="400", type_k="f32")
    ctx.decode(tokens(16500))
    assert_alike(*both(ctx, monkeypatch, "attn"))


@pytest.mark.parametrize("head_dim", [24, 64])  # rows of whole vectors, and not
def test_quadratic_forms(tmp_path, head_dim):
    """x' C x on the CPU: what expected_attention makes of the keys, and the norms behind the output projection."""
    path = tiny.write(tmp_path/"wide.gguf", head_dim=head_dim)
    how = dict(n_ctx=256, n_threads=2, budget="64", type_k="f32", type_v="f32")
    ctx = _core.Context(_core.Model(str(path)), policy="expected_attention", **how)
    ctx.decode(tokens(200))
    for layer, score in zip(ctx.signals(), ctx.scores()):
        theirs = oracle.expected_attention().score({**layer, "budget": 64})
        np.testing.assert_allclose(score[:, 4:], theirs[:, 4:], rtol=1e-3)  # after its sinks

    ctx = _core.Context(_core.Model(str(path)), policy="dropkv", **how)  # shows the values, criticalkv their norms
    ctx.decode(tokens(200))
    values = [layer["value_rows"] for layer in ctx.signals()]
    ctx = _core.Context(_core.Model(str(path)), policy="criticalkv", **how)
    ctx.decode(tokens(200))
    weights = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    for il, layer in enumerate(ctx.signals()):
        out = np.asarray(weights[f"blk.{il}.attn_output.weight"], np.float64).reshape(tiny.N_EMBD, tiny.N_HEAD, head_dim)
        theirs = np.repeat(values[il].astype(np.float64), tiny.N_HEAD//tiny.N_HEAD_KV, axis=0)  # [n_head, n_kv, head_dim]
        np.testing.assert_allclose(layer["o_norm"], np.linalg.norm(np.einsum("ehd,hnd->hne", out, theirs), axis=2), rtol=1e-4)


@pytest.mark.parametrize("policy", [p["name"] for p in _core.policies() if p["name"] not in ("full", "finch", "kvzip", "shotkv", "random_shot")])
def test_any_number_of_threads_keeps_the_same(model, policy):
    """Layers are scored, and their slots chosen, on the threads that run graphs."""
    given = []
    for n_threads in (1, 3):
        ctx = context(model, policy, n_threads=n_threads)
        ctx.decode(tokens(500))
        assert ctx.evict()
        given.append([*ctx.kept(), *(np.frombuffer(ctx.save(), np.uint8),)])
    assert all(np.array_equal(a, b) for a, b in zip(*given))


def test_what_a_thread_throws_is_said_and_changes_nothing(model):
    """shotkv has to be told which tokens are shots: each layer's thread finds out by itself."""
    ctx = context(model, "shotkv", n_threads=3)
    ctx.decode(tokens(500))
    before = ctx.save()
    with pytest.raises(ValueError, match="500 outside every span"):
        ctx.evict()
    assert ctx.save() == before


def test_any_number_of_threads_gives_the_same_bits(model):
    given = []
    for n_threads in (1, 2, 3):
        ctx = context(model, "snapkv", n_threads=n_threads)
        ctx.decode(tokens(500))
        given.append([layer["attn"] for layer in ctx.signals()])
    for other in given[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(given[0], other))
