"""The queries that are to be expected, and the values' norms: of random weights against numpy, of any model against its
own attention."""
import gguf
import numpy as np
import pytest

import oracle
import tiny
from pykvc import _core

N, WINDOW = 90, 40
SPEC = f"expected_attention:window={WINDOW},future=60,sinks=3,recent=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fit")


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, tiny.N_VOCAB, n, dtype=np.int32)


def context(model, policy=SPEC, **kwargs):
    return _core.Context(model, **{"n_ctx": 512, "n_threads": 1, "type_k": "f32", "type_v": "f32", "policy": policy, "budget": "64", **kwargs})


def first_layer(path, tokens):
    """Q and V of layer 0, which hang on the tokens alone: [n, heads, head_dim], before any rotation."""
    weight = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    x = weight["token_embd.weight"][tokens].astype(float)
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)
    q, v = ((x @ weight[f"blk.0.attn_{n}.weight"].T + weight.get(f"blk.0.attn_{n}.bias", 0)) for n in "qv")
    return q.reshape(len(x), tiny.N_HEAD, -1), v.reshape(len(x), tiny.N_HEAD_KV, -1)


@pytest.mark.parametrize("arch,head_dim,how", [
    ("llama", 32, {}), ("qwen2", 16, {}), ("llama", 32, dict(flash_attn="off")),
    ("llama", 64, dict(type_k="q8_0", type_v="q8_0")), ("llama", 192, dict(type_k="q4_0", type_v="q8_0")),  # Hadamard matrices of 64
])
def test_fit_and_norms_of_the_first_layer(folder, arch, head_dim, how):
    path = tiny.write(folder/f"{arch}-{head_dim}.gguf", arch, head_dim=head_dim)
    c, tokens = context(_core.Model(str(path)), **how), ids(N)
    for i in range(0, N, 7):  # the ring goes round more than once
        c.decode(tokens[i:i + 7])
    q, v = first_layer(path, tokens)
    mean, cov = oracle.expected_queries(q[-WINDOW:], N, 60, neox=arch == "qwen2")
    if "type_k" in how:  # keys lie in the cache mixed, and so does what they are multiplied with
        block = np.ones((1, 1))
        while len(block) < 64:
            block = np.kron([[1, 1], [1, -1]], block)/np.sqrt(2)
        mix = np.kron(np.eye(head_dim//64), block)
        mean, cov = mean @ mix, mix @ cov @ mix
    layer, scale = c.signals()[0], head_dim**-0.5
    assert layer["n_query"] == WINDOW and layer["attn"] is None
    tolerance = 1e-3 if "type_k" in how else 1e-5  # beside quantized keys the ring's queries are F16
    for ours, theirs in ((layer["q_mean"], mean*scale), (layer["q_cov"], cov*scale**2)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance*abs(theirs).max())
    tolerance = 0.02 if "type_v" in how else 1e-5
    np.testing.assert_allclose(layer["v_norm"], np.linalg.norm(v, axis=2).T, rtol=tolerance)


def test_the_first_tokens_are_not_fitted(folder):
    path = tiny.write(folder/"llama.gguf")
    c = context(_core.Model(str(path)))
    c.decode(ids(20))
    mean, _ = oracle.expected_queries(first_layer(path, ids(20))[0][3:], 20, 60)
    layer = c.signals()[0]
    assert layer["n_query"] == 17
    np.testing.assert_allclose(layer["q_mean"], mean/np.sqrt(32), rtol=0, atol=1e-5*abs(mean).max())


def attention_of_repeats(model, tokens, n_repeat, how):
    """What the last token gives the ones before it in layer 0 at each of the next positions, as the score graph has
    it."""
    c = context(model, "snapkv:window=1", **how)
    c.decode(tokens)
    for _ in range(n_repeat):
        c.decode(tokens[-1:])
        yield c.signals()[0]["attn"][:, :len(tokens)]


@pytest.mark.parametrize("name,how", [("llama", {}), ("qwen2", {}), ("yarn", {}), ("qwen2vl", {}), ("qwen3vl", {}), ("real", {}), ("real", dict(type_k="f16", type_v="f16")),
                                      ("real", dict(type_k="q8_0", type_v="q8_0"))])
def test_one_query_expects_what_it_will_attend_to(folder, model_path, name, how):
    """In the first layer a token's query is the same wherever it stands, so its attention there can be measured."""
    if name == "real":
        path = model_path
    else:
        path = tiny.write(folder/f"{name}-once.gguf", "llama" if name == "yarn" else name, head_dim=16 if name == "qwen2" else 32,
                          yarn=8 if name == "yarn" else 1)
    model, tokens = _core.Model(str(path)), ids(60)
    n_future = 6
    c = context(model, f"expected_attention:window=1,future={n_future},sinks=0,recent=0", **how)
    c.decode(tokens)
    layer = c.signals()[0]
    n_head, n_head_kv = model.n_head, model.n_head_kv
    logits = np.stack([layer["keys"][h//(n_head//n_head_kv)].astype(float) @ layer["q_mean"][h] for h in range(n_head)])
    measured = np.mean([np.log(a.astype(float)) for a in attention_of_repeats(model, tokens, n_future, how)], axis=0)
    logits, measured = (x - x.mean(axis=1, keepdims=True) for x in (logits, measured))  # softmax has lost the constant
    # a quantized cache: the CPU's attention quantizes the query, too
    tolerance = {"f32": 1e-4, "f16": 5e-3, "q8_0": 0.05}[how.get("type_k", "f32")]
    np.testing.assert_allclose(logits, measured, rtol=0, atol=tolerance*abs(measured).max())
    assert abs(layer["q_cov"]).max() == 0


def test_fit_survives_branch_and_state(folder):
    model = _core.Model(str(tiny.write(folder/"llama.gguf")))
    a, b = context(model, n_seq_max=2), context(model, n_seq_max=2)
    a.decode(ids(N))
    a.evict()
    a.copy(0, 1)
    b.load(a.save())
    b.load_seq(a.save_seq(0), 1)
    for c, seq in ((a, 1), (b, 0), (b, 1)):
        for x, y in zip(a.signals(0), c.signals(seq)):
            assert all(np.array_equal(x[name], y[name]) for name in ("q_mean", "q_cov", "v_norm", "keys"))
    b.clear(0)
    b.decode(ids(N))
    assert b.remove_tail(N - 1) and b.signals()[0]["n_query"] == WINDOW - 1  # a removed token's query is not fitted


def test_pre_norm_models_and_models_that_change_rotated_queries(folder):
    gemma = context(_core.Model(str(tiny.write(folder/"gemma3.gguf", "gemma3", n_layer=7))))
    gemma.decode(ids(N))
    assert gemma.evict()
    hunyuan = _core.Model(str(tiny.write(folder/"hunyuan.gguf", "hunyuan-dense")))
    context(hunyuan, "keydiff").decode(ids(N))
    with pytest.raises(ValueError, match="after their rotation.*keydiff"):
        context(hunyuan)
