"""Policies that ask: what LLM evaluates for them, and that nothing of it stays."""
import gguf
import numpy as np
import pytest

import pykvc
import tiny
from pykvc import _core
from pykvc.prose import prose
from pykvc.session import Session

CONTEXT = prose(70) + "The word on the blue door is marzipan. " + prose(70, seed=1)
QUESTION = "\nQuestion: What is the word on the blue door?\nAnswer: The word on the blue door is"


@pytest.mark.parametrize("policy", ["finch", "kvzip"])
@pytest.mark.parametrize("cells", [{}, dict(kv_cells=1024, n_ubatch=256)])
def test_a_context_is_compressed_and_goes_on(policy, cells):
    with pykvc.LLM(n_ctx=4096, n_threads=2, kv_policy=policy, kv_budget=512, **cells) as llm:
        query = QUESTION if policy == "finch" else None
        n = llm.prefill(CONTEXT, kv_query=query)
        assert n > 2000 and llm.n_tokens == n
        if cells:
            assert np.mean(llm.stats()["kept"]) <= 1024 and llm.stats()["n_evictions"] > 3
        logits = llm.logits()
        assert llm.compress() and llm.n_tokens == n
        kept = llm.stats()["kept"]
        assert sum(kept) == 512*len(kept) and (max(kept) > 512) == (policy == "kvzip")  # its layers differ
        assert (llm.logits() == logits).all()  # of the context's last token, not of the probe's
        assert llm.kept()[0].max() == n - 1
        answer = llm.generate(QUESTION, reset=False, max_tokens=4)
        if policy == "finch":
            place = len(llm.tokenize(CONTEXT[:CONTEXT.index(" marzipan")]))
            share = sum(int((k == place).any(axis=1).sum()) for k in llm.kept())/sum(len(k) for k in llm.kept())
            assert share > 0.3  # the heads that still hold the word
            assert "mar" in answer.text


@pytest.mark.parametrize("policy", ["finch:window=64,recent=8", "kvzip:window=128,recent=8"])
@pytest.mark.parametrize("asks", [True, False], ids=["asked again", "never asked"])
def test_a_long_answer_does_not_drive_out_the_context(policy, asks, monkeypatch):
    if not asks:  # as in a batch
        monkeypatch.setattr(Session, "step", lambda self, token: self.decode([token]))
    with pykvc.LLM(n_ctx=2048, n_threads=2, n_ubatch=128, kv_policy=policy, kv_cells=512) as llm:
        n = llm.prefill(CONTEXT[:2500], **dict(kv_query="What is on the door?") if policy.startswith("finch") else {})
        llm.compress()
        before = sum(len(set(k[k < n])) for k in llm.kept())
        answer = llm.generate("\nA long story:", reset=False, max_tokens=700)
        held = [k.shape[1] for k in llm.kept()]
        assert answer.n_predicted == 700 and np.mean(held) <= 512  # the answer alone would fill them
        assert sum(len(set(k[k < n])) for k in llm.kept()) > before/5
        assert policy.startswith("finch") or all((k[:, :4] == range(4)).all() for k in llm.kept())


def test_a_saved_probe_goes_on(tmp_path):
    how = dict(n_ctx=4096, n_ubatch=256, n_threads=2, kv_policy="kvzip", kv_cells=1024)
    half = len(CONTEXT)//2
    with pykvc.LLM(**how) as a, pykvc.LLM(**how) as b:
        a.prefill(CONTEXT[:half])
        a.save(tmp_path/"state")
        b.load(tmp_path/"state")
        for llm in (a, b):
            llm.prefill(CONTEXT[half:])
            llm.compress()
        assert all((x == y).all() for x, y in zip(a.kept(), b.kept()))


@pytest.mark.parametrize("policy, call, why", [
    ("snapkv", dict(kv_query="why?"), "finch"),
    ("finch", dict(kv_query="why? "*300), "kv_query"),
    ("finch", {}, "there is none: give kv_query"),
])
def test_mistakes(policy, call, why):
    with pykvc.LLM(n_ctx=1024, n_threads=2, kv_policy=policy, kv_budget=200) as llm, pytest.raises(ValueError, match=why):
        llm.generate("A short story.", max_tokens=2, **call)


def test_an_eviction_without_a_question(model_path):
    """ValueError before anything is evaluated; what a chat asks is the end of its last message."""
    text, asks = CONTEXT[:600], dict(kv_query="What is on the door?")
    with pykvc.LLM(model_path, n_ctx=1024, n_threads=2, kv_policy="finch:recent=8", kv_budget=60) as llm:
        for call in (lambda **how: llm.generate(text, max_tokens=2, **how),
                     lambda **how: llm.pipeline(text, ["Why?"], max_tokens=1, **how),
                     lambda **how: llm.generate_batch(["a"], prefix=text, max_tokens=1, **how)):
            llm.reset()
            with pytest.raises(ValueError, match="give kv_query"):
                call()
            assert llm.n_tokens == 0 and call(**asks)
        for call in (lambda: llm.context(text).compress(), llm.compress):
            with pytest.raises(ValueError, match="give kv_query"):
                call()
        assert llm.context(text, **asks).compress() and llm.context(text).compress("keydiff")
        assert llm.generate(text, max_tokens=2, compress=False).n_predicted == 2
        llm.chat([{"role": "user", "content": text + "What is on the door?"}], max_tokens=1)
        assert llm.detokenize(llm._session.query).endswith("What is on the door?")
    with pykvc.LLM(model_path, n_ctx=1024, n_ubatch=64, kv_policy="finch:recent=8", kv_cells=256) as llm:
        with pytest.raises(ValueError, match="give kv_query"):
            llm.prefill("a")


def test_repetitions_need_room():
    with pytest.raises(ValueError, match="n_ubatch at least"):
        pykvc.LLM(n_ctx=4096, n_ubatch=64, kv_policy="kvzip", kv_cells=1024)
    with pykvc.LLM(n_ctx=1024, n_threads=2, kv_policy="kvzip", kv_budget=200) as llm:
        llm.prefill(tokens=range(1000, 1960))
        with pytest.raises(ValueError, match="n_ctx 1024.*give n_ctx"):
            llm.compress()
        assert llm.n_tokens == 960 and llm.generate(reset=False, compress=False, max_tokens=3).n_predicted == 3  # nothing is lost
    with pykvc.LLM(n_ctx=1024, n_threads=2, kv_policy="kvzip", kv_budget=200) as llm, pytest.raises(ValueError, match="prefix"):
        llm.generate_batch(["a", "b"])


# -- what kvzip hears -----------------------------------------------------------------------------------------------------

def rows_of(model, tokens, probe, n_ctx=512, **how):
    """What each token of a probe gives to the cells before it: [n_layer][n_probe] F32 [n_head, n_kv]. One token at a time."""
    ctx = _core.Context(model, n_ctx=n_ctx, policy="tova", budget="64", **how)  # its window is one query
    ctx.decode(tokens)
    found = []
    for token in probe:
        ctx.decode(np.array([token], np.int32))
        found.append([layer["attn"].astype(float) for layer in ctx.signals()])
    return list(zip(*found))


@pytest.mark.parametrize("spec", ["kvzip:window=16", "kvzip:window=16,softmax=all", "kvzip:window=64"])
def test_a_repetition_counts_what_it_gives_to_its_chunk(model_path, spec):
    """softmax=chunk: attention among the sinks, the chunk and the repetition; the most that a token and a head of the group gives."""
    model = _core.Model(str(model_path))
    tokens, begin, end = np.random.default_rng(0).integers(1000, 40000, 160, dtype=np.int32), 40, 100
    probe, n = tokens[begin - 8:end - 12].copy(), len(tokens)
    ctx = _core.Context(model, n_ctx=512, policy=spec, budget="64", type_k="f32", type_v="f32")
    ctx.decode(tokens)
    log_prob, n_seen = ctx.ask(probe, begin=begin, end=end, n_repeated=30)
    assert log_prob < 0 and n_seen == 30
    for il, (layer, rows) in enumerate(zip(ctx.signals(), rows_of(model, tokens, probe, type_k="f32", type_v="f32"))):
        most = np.zeros((model.n_head, n))
        for row in rows:
            seen = np.r_[0:4, begin:end, n:row.shape[1]] if "all" not in spec else np.arange(row.shape[1])
            most = np.maximum(most, row[:, :n]/row[:, seen].sum(axis=1, keepdims=True))
        expected = most.reshape(model.n_head_kv, -1, n).max(axis=1)
        np.testing.assert_allclose(layer["probed"][:, begin:end], expected[:, begin:end], rtol=2e-3, atol=1e-6, err_msg=f"layer {il}")
        assert np.isinf(layer["probed"][:, :begin]).all() and np.isinf(layer["probed"][:, end:]).all()  # nobody asked about them


def first_layer(path, ids):
    """Of a model of tests/tiny.py: the input of its first attention block [n, n_embd], the values [n, n_head_kv, d], W_O [n_head, n_embd, d]."""
    w = {t.name: np.array(t.data, dtype=float).reshape([int(n) for n in t.shape[::-1]]) for t in gguf.GGUFReader(path).tensors}
    x = w["token_embd.weight"][ids]
    x = x/np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)
    values = (x @ w["blk.0.attn_v.weight"].T).reshape(len(ids), tiny.N_HEAD_KV, -1)
    wo = w["blk.0.attn_output.weight"].reshape(tiny.N_EMBD, tiny.N_HEAD, -1).swapaxes(0, 1)
    return x, values, wo


@pytest.mark.parametrize("cache", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("flash_attn", ["on", "off"])
@pytest.mark.parametrize("head_dim", [32, 64])  # 64: quantized values are mixed by a Hadamard matrix
def test_norms_behind_the_output_projection(tmp_path, cache, flash_attn, head_dim):
    if cache == "q8_0" and flash_attn == "off":
        with pytest.raises(ValueError, match="quantized V"):  # llama.cpp's
            _core.Context(_core.Model(str(tiny.write(tmp_path/"m.gguf"))), n_ctx=256, policy="full", type_v="q8_0", flash_attn="off")
        return

    class Outputs(pykvc.Policy):
        name, outputs = "by_outputs", True

        def score(self, layer):
            return layer.o_norm.reshape(layer.n_head_kv, -1, layer.n_kv).mean(axis=1)

    path = tiny.write(tmp_path/"m.gguf", head_dim=head_dim)
    ids = np.random.default_rng(1).integers(0, tiny.N_VOCAB, 90, dtype=np.int32)
    ctx = _core.Context(_core.Model(str(path)), n_ctx=256, policy=Outputs(), budget="32", type_k=cache, type_v=cache, flash_attn=flash_attn)
    ctx.decode(ids)
    _, values, wo = first_layer(path, ids)
    expected = np.stack([np.linalg.norm(values[:, h//2] @ wo[h].T, axis=1) for h in range(tiny.N_HEAD)])
    np.testing.assert_allclose(ctx.signals()[0]["o_norm"], expected, rtol={"f32": 1e-4, "f16": 2e-3, "q8_0": 3e-2}[cache])
    assert ctx.evict()


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_plus_weighs_by_what_is_written_and_what_was_read(tmp_path, arch):
    """KVzip+ on the first layer, against KVzip's rows: A_ij |W_O v_j| / |x_i|."""
    path = tiny.write(tmp_path/"m.gguf", arch, head_dim=32 if arch == "llama" else 16)
    model = _core.Model(str(path))
    ids = np.random.default_rng(2).integers(0, tiny.N_VOCAB, 100, dtype=np.int32)
    tokens, probe, n = ids[:70], ids[20:60], 70
    how = dict(type_k="f32", type_v="f32")
    ctx = _core.Context(model, n_ctx=256, policy="kvzip:plus=1,softmax=all,window=16", budget="40", **how)
    ctx.decode(tokens)
    ctx.ask(probe, end=n)
    x, values, wo = first_layer(path, ids)
    if arch == "qwen2":  # values have a bias there
        bias = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_v.bias")
        values = values + np.array(bias.data, dtype=float).reshape(1, tiny.N_HEAD_KV, -1)
    norm = np.stack([np.linalg.norm(values[:n, h//2] @ wo[h].T, axis=1) for h in range(tiny.N_HEAD)])
    rows = rows_of(model, tokens, probe, 256, **how)[0]
    most = np.max([row[:, :n]*norm/np.linalg.norm(x[20 + i]) for i, row in enumerate(rows)], axis=0)
    np.testing.assert_allclose(ctx.signals()[0]["probed"], most.reshape(tiny.N_HEAD_KV, 2, n).max(axis=1), rtol=1e-3, atol=1e-7)


def test_plus_needs_a_plain_output_projection(tmp_path):
    model = _core.Model(str(tiny.write(tmp_path/"m.gguf", "deci")))
    with pytest.raises(ValueError, match="cannot evict|output projection"):
        _core.Context(model, n_ctx=256, policy="kvzip:plus=1", budget="64")


def test_stats_say_how_likely_the_repetition_is(capsys):
    """SmolLM2 repeats a text; a text of random tokens it does not."""
    with pykvc.LLM(n_ctx=4096, n_threads=2, kv_policy="kvzip:chunk=256", kv_budget=200) as llm:
        answer = llm.generate(CONTEXT[:3000], max_tokens=2)
        stats = llm.stats()
        assert stats["repeat_likelihood"] > 0.2 and stats["probe_chunk"] == 256
        assert 0 < answer.timings["probe_ms"] <= stats["probe_ms"]
        assert "repeats" not in capsys.readouterr().err
        llm.reset()
        assert llm.stats()["repeat_likelihood"] is None
