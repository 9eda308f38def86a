"""cpp/ggml/flash_attn.h: a prompt's attention on the CPU, against ggml's own (PYKVC_STOCK_ATTENTION)."""
import numpy as np
import pytest

import tiny
from pykvc import _core
from pykvc.prose import prose


@pytest.fixture(scope="module")
def model(model_path):
    return _core.Model(str(model_path))


@pytest.fixture(scope="module")
def tokens(model):
    return np.array(model.tokenize(prose(200).encode()), np.int32)


def logits(model, tokens, type_kv, calls=(300, 64, 500), n_seq_max=1, flash_attn="on"):
    """Of the last token of every call, in the last sequence: F32 [n_calls, n_vocab]. Calls end inside tiles of 64, and on their edges."""
    c = _core.Context(model, n_ctx=1024*n_seq_max, n_threads=2, type_k=type_kv, type_v=type_kv, flash_attn=flash_attn, n_seq_max=n_seq_max)
    rows, begin = [], 0
    for n in calls:
        for seq in range(n_seq_max):
            c.decode(tokens[begin:begin + n], seq)
        rows.append(c.logits()[-1].copy())
        begin += n
    return np.array(rows)


@pytest.mark.parametrize("type_kv", ["f16", "f32"])
@pytest.mark.parametrize("n_seq_max", [1, 2])
def test_same_bits_as_ggml(model, tokens, monkeypatch, type_kv, n_seq_max):
    ours = logits(model, tokens, type_kv, n_seq_max=n_seq_max)
    monkeypatch.setenv("PYKVC_STOCK_ATTENTION", "1")
    assert np.array_equal(ours, logits(model, tokens, type_kv, n_seq_max=n_seq_max))
    assert np.ptp(ours) > 1


@pytest.mark.parametrize("arch, n_layer", [("llama", 3), ("gemma3", 6)])
def test_same_bits_with_other_heads_and_masks(tmp_path, monkeypatch, arch, n_layer):
    """A sliding window: masks that are neither 0 nor causal."""
    model = _core.Model(str(tiny.write(tmp_path/"tiny.gguf", arch, n_layer)))
    tokens = np.random.default_rng(1).integers(0, tiny.N_VOCAB, 900, dtype=np.int32)
    ours = logits(model, tokens, "f16")
    monkeypatch.setenv("PYKVC_STOCK_ATTENTION", "1")
    assert np.array_equal(ours, logits(model, tokens, "f16"))


def kl(a, b):
    """KL(a || b) of softmaxes, a row: [n]."""
    p, q = (np.exp(x - x.max(1, keepdims=True), dtype=np.float64) for x in (a, b))
    p, q = p/p.sum(1, keepdims=True), q/q.sum(1, keepdims=True)
    return (p*np.log(p/q)).sum(1)


@pytest.mark.parametrize("type_kv", ["q8_0", "q4_0"])
def test_quantized_is_as_near_to_f32(model, tokens, monkeypatch, type_kv):
    """ggml rounds the queries to the keys' type, this does not: over 300 tokens both are about as far from an F32 cache, and
    from each other (a model of quantized weights amplifies the last bits)."""
    def rows(type_kv):
        c = _core.Context(model, n_ctx=512, n_threads=2, type_k=type_kv, type_v=type_kv, flash_attn="on")
        c.decode(tokens[:200], 0, "none")
        c.decode(tokens[200:500], 0, "all")
        return c.logits().copy()

    exact, ours = rows("f32"), rows(type_kv)
    monkeypatch.setenv("PYKVC_STOCK_ATTENTION", "1")
    stock = rows(type_kv)
    assert not np.array_equal(ours, stock)  # the switch does something
    assert kl(exact, ours).mean() < 1.5*kl(exact, stock).mean()
    assert kl(stock, ours).mean() < kl(exact, stock).mean() + kl(exact, ours).mean()
