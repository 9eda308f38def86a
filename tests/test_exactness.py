"""Where eviction must not change a bit: against an untouched llama.cpp, and against the same keep sets as a mask."""
import subprocess

import numpy as np
import pytest

import pykvc
import tiny
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

    for spec in ["snapkv", "pyramidkv", "adakv", "shotkv", "knorm"] + (["h2o"] if not fa else []):
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
        return [64*(3 + il % 3) for il in range(len(request.layers))]

    def keep(self, il, request, n_keep):
        n_head_kv, n_kv = request.layers[il].pos.shape
        rows = []
        for h in range(n_head_kv):
            blocks = np.random.default_rng([il, h]).permutation(n_kv//64 - 1)[:n_keep//64 - 1]
            rows.append((np.sort(np.append(blocks, n_kv//64 - 1))[:, None]*64 + np.arange(64)).ravel())
        return np.array(rows, np.int32)


class UnequalBlocks(Blocks):
    """And another number of them in every head: a shorter head lacks whole blocks at its beginning."""
    name, heads_differ = "unequal_blocks", True

    def keep(self, il, request, n_keep):
        slots = super().keep(il, request, n_keep)
        for h in range(1, len(slots)):
            n_empty = 64*min((h + il) % 3, n_keep//64 - 1)
            slots[h] = np.append(np.full(n_empty, -1), slots[h, n_empty:])
        return slots


def compact_and_masked(model, tokens, n_prefill=1, **kwargs):
    """Logits F32 [2, 32, n_vocab] and kept sets after an eviction of 1,024 tokens, compacted and as a mask over the whole cache.
    The steps are single tokens, but for the first n_prefill."""
    logits, kept = [], []
    for mask_only in (False, True):
        c = _core.Context(model, n_ctx=2048, n_threads=2, **kwargs)
        c.decode(tokens[:1024])
        assert c.evict(mask_only=mask_only)
        kept.append(c.kept())
        c.decode(tokens[1024:1024 + n_prefill], logits="all")
        rows = [*c.logits()]
        for t in tokens[1024 + n_prefill:1024 + N_STEPS]:
            c.decode(np.array([t], np.int32))
            rows.append(c.logits()[-1])
        logits.append(rows)
    assert all(k.shape[1] == 1024 for k in kept[1])  # nothing has moved there
    return np.array(logits), kept[0]


@pytest.mark.parametrize("policy", [Blocks, UnequalBlocks])
@pytest.mark.parametrize("type_k, type_v", [("f16", "f16"), ("f32", "f32"), ("bf16", "bf16"), ("q8_0", "f16")])
def test_blocks_are_a_mask(model, tokens, policy, type_k, type_v):
    """Without flash attention, aligned blocks compacted == the full cache under a per-head -inf mask, bit for bit."""
    logits, kept = compact_and_masked(model, tokens, type_k=type_k, type_v=type_v, flash_attn="off", policy=policy(), budget="256")
    assert [k.shape[1] for k in kept[:4]] == [192, 256, 320, 192]
    assert ((kept[1] >= 0).sum(axis=1) == ([256, 128, 256] if policy.heads_differ else [256]*3)).all()
    assert np.array_equal(*logits)
    assert np.ptp(logits[0]) > 1


def kl(a, b):
    """KL divergence of the softmaxes of two logits [n, n_vocab], nats: [n]."""
    a, b = (x.astype(float) - np.logaddexp.reduce(x.astype(float), axis=1, keepdims=True) for x in (a, b))
    return (np.exp(a)*(a - b)).sum(axis=1)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """F32 weights: what differs is attention, not rounding of activations to the weights' quantization."""
    return _core.Model(str(tiny.write(tmp_path_factory.mktemp("tiny")/"llama.gguf")))


@pytest.mark.parametrize("policy", ["adakv", UnequalBlocks()])
@pytest.mark.parametrize("type_k, n_prefill", [("f16", 1), ("f16", 24), ("q8_0", 1), ("q8_0", 24)])
def test_flash_attention_takes_a_mask_for_each_head(random_model, policy, type_k, n_prefill):
    """The same keep sets, compacted with flash attention and masked without: rounding is all that differs, in single tokens
    and in a second prompt."""
    tokens = np.random.default_rng(0).integers(0, tiny.N_VOCAB, 1024 + N_STEPS, dtype=np.int32)
    logits, kept = compact_and_masked(random_model, tokens, n_prefill, type_k=type_k, flash_attn="on", policy=policy, budget="128")
    n_held = np.array([(k >= 0).sum(axis=1) for k in kept])  # [n_layer, n_head_kv]
    assert np.ptp(n_held, axis=1).max() > 32
    assert kl(*logits).mean() < 5e-4


def test_flash_attention_of_a_real_model(model, tokens):
    logits, kept = compact_and_masked(model, tokens, flash_attn="on", policy="adakv", budget="128")
    n_held = np.array([(k >= 0).sum(axis=1) for k in kept])
    assert (n_held.sum(axis=1) == 128*model.n_head_kv).all() and (n_held.max(axis=1) == [k.shape[1] for k in kept]).all()
    assert np.ptp(n_held, axis=1).max() > 64
    assert kl(*logits).mean() < 5e-3  # snapkv at the same budget, where no head has a mask of its own: 2e-3


@pytest.mark.parametrize("type_kv, fa", [(t, 1) for t in ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")]
                         + [(t, 0) for t in ("f32", "f16", "bf16")])  # llama.cpp has no quantized V without flash attention
@pytest.mark.parametrize("policy, rows", [("keydiff", "keys"), ("expected_attention:window=32", "v_norm")])  # each asks for what is compared
def test_rows_move_as_bytes(model, tokens, type_kv, fa, policy, rows):
    """After an eviction every kept key is the key that was there, and every kept value as long as it was, of any cache type and layout."""
    c = _core.Context(model, n_ctx=1024, n_threads=2, type_k=type_kv, type_v=type_kv, flash_attn=["off", "on"][fa], policy=policy, budget="100")
    c.decode(tokens[:300])
    before = c.signals()
    assert c.evict()
    for was, now, kept in zip(before, c.signals(), c.kept()):
        assert np.array_equal(now["pos"], kept)
        for h, pos in enumerate(kept):
            assert np.array_equal(now[rows][h], was[rows][h][pos])
        assert len(np.unique(was[rows])) > 200  # rows that are told apart
    c.decode(tokens[300:301])
    assert np.isfinite(c.logits()).all()
