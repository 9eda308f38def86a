"""Where eviction must not change a bit: against an untouched llama.cpp, and against the same keep sets as a mask."""
import subprocess

import numpy as np
import pytest

import pykvc
from pykvc import _core
from pykvc.prose import prose

N_STEPS = 32


@pytest.fixture(scope="module")
def model(model_path):
    return _core.Model(str(model_path))


@pytest.fixture(scope="module")
def tokens(model):
    return np.array(model.tokenize(prose(120).encode()), np.int32)


def run_stock(stock, model_path, tokens, tmp_path, *, split, ctx=2048, type_k, type_v, fa, n_vocab):
    """(logits F32 [n_calls, n_vocab], state bytes) of a llama.cpp without our hooks."""
    tokens.tofile(tmp_path / "tokens.bin")
    subprocess.run([stock, model_path, tmp_path / "tokens.bin", tmp_path / "out.bin", "--ctx", str(ctx), "--ctk", type_k, "--ctv", type_v,
                    "--fa", str(fa), "--threads", "2", "--split", str(split)], check=True)
    raw = (tmp_path / "out.bin").read_bytes()
    n = (1 + len(tokens) - split)*n_vocab*4
    return np.frombuffer(raw[:n], np.float32).reshape(-1, n_vocab), raw[n + 8:]


def run_ours(model, tokens, *, split, ctx=2048, type_k, type_v, fa, evict=False, **policy):
    c = _core.Context(model, n_ctx=ctx, n_threads=2, type_k=type_k, type_v=type_v, flash_attn=["off", "on"][fa], **policy)
    c.decode(tokens[:split])
    rows = [c.logits()[-1]]
    if evict:
        assert c.evict() is False  # nothing is over budget
        c.end_prompt()
    for t in tokens[split:]:
        c.decode(np.array([t], np.int32))
        rows.append(c.logits()[-1])
    return np.array(rows), c


CACHES = [("f16", "f16", 1), ("f16", "f16", 0), ("q8_0", "q8_0", 1), ("q4_0", "q4_0", 1), ("q8_0", "f16", 0)]


@pytest.mark.parametrize("type_k, type_v, fa", CACHES)
def test_stock(model, model_path, tokens, stock, tmp_path, monkeypatch, type_k, type_v, fa):
    """Policy off, and budget >= n: the logits of the prompt and of 32 steps are stock llama.cpp's, bit for bit.

    A prompt's attention over a quantized cache is faster than stock's and rounds less (test_attention.py): there it is off."""
    if fa and type_k != "f16":
        monkeypatch.setenv("PYKVC_STOCK_ATTENTION", "1")
    toks, split = tokens[:400 + N_STEPS], 400
    args = dict(split=split, type_k=type_k, type_v=type_v, fa=fa)
    want, state = run_stock(stock, model_path, toks, tmp_path, n_vocab=model.n_vocab, **args)

    off, c = run_ours(model, toks, **args)
    assert np.array_equal(off, want)
    assert c.save() == state  # every byte of the cache, in stock's own format

    for spec in ["snapkv", "pyramidkv", "shotkv", "knorm"] + (["h2o"] if not fa else []):
        on, c = run_ours(model, toks, evict=True, policy=spec, budget=str(len(toks)), **args)
        assert np.array_equal(on, want), spec
        kept = c.kept()
        assert all(np.array_equal(k, np.tile(np.arange(len(toks)), (len(k), 1))) for k in kept), spec


class Blocks(pykvc.Policy):
    """Whole blocks of 64 cells, another choice in every head, another number of them in every layer."""
    name = "blocks"

    def score(self, layer):
        return np.zeros((layer.n_head_kv, layer.n_kv), np.float32)

    def budgets(self, request):
        return [64*(3 + l % 3) for l in range(len(request.layers))]

    def keep(self, il, request, n_keep):
        n_head_kv, n_kv = request.layers[il].pos.shape
        rows = []
        for h in range(n_head_kv):
            blocks = np.random.default_rng([il, h]).permutation(n_kv//64 - 1)[:n_keep//64 - 1]
            rows.append((np.sort(np.append(blocks, n_kv//64 - 1))[:, None]*64 + np.arange(64)).ravel())
        return np.array(rows, np.int32)


@pytest.mark.parametrize("type_k, type_v", [("f16", "f16"), ("f32", "f32"), ("bf16", "bf16"), ("q8_0", "f16")])
def test_blocks_are_a_mask(model, tokens, type_k, type_v):
    """Without flash attention, aligned blocks compacted == the full cache under a per-head -inf mask, bit for bit."""
    logits = []
    for mask_only in (False, True):
        c = _core.Context(model, n_ctx=2048, n_threads=2, type_k=type_k, type_v=type_v, flash_attn="off", policy=Blocks(), budget="256")
        c.decode(tokens[:1024])
        assert c.evict(mask_only=mask_only)
        assert c.stats()["kept"][:4] == ([1024]*4 if mask_only else [192, 256, 320, 192])
        rows = []
        for t in tokens[1024:1024 + N_STEPS]:
            c.decode(np.array([t], np.int32))
            rows.append(c.logits()[-1])
        logits.append(np.array(rows))
    assert np.array_equal(*logits)
    assert np.ptp(logits[0]) > 1


@pytest.mark.parametrize("type_kv, fa", [(t, 1) for t in ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")]
                         + [(t, 0) for t in ("f32", "f16", "bf16")])  # llama.cpp has no quantized V without flash attention
def test_rows_move_as_bytes(model, tokens, type_kv, fa):
    """After an eviction every kept key is the key that was there, of any cache type and layout."""
    c = _core.Context(model, n_ctx=1024, n_threads=2, type_k=type_kv, type_v=type_kv, flash_attn=["off", "on"][fa], policy="keydiff", budget="100")
    c.decode(tokens[:300])
    before = c.signals()
    assert c.evict()
    for was, now, kept in zip(before, c.signals(), c.kept()):
        assert np.array_equal(now["pos"], kept)
        for h, pos in enumerate(kept):
            assert np.array_equal(now["keys"][h], was["keys"][h][pos])
    c.decode(tokens[300:301])
    assert np.isfinite(c.logits()).all()
