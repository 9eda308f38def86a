"""cpp/ggml/attn_scores.h: what the window's queries give to the cells on the CPU, against llama.cpp's ops (PYKVC_STOCK_ATTENTION)."""
import numpy as np
import pytest

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


def test_any_number_of_threads_gives_the_same_bits(model):
    given = []
    for n_threads in (1, 2, 3):
        ctx = context(model, "snapkv", n_threads=n_threads)
        ctx.decode(tokens(500))
        given.append([layer["attn"] for layer in ctx.signals()])
    for other in given[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(given[0], other))
