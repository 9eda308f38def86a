"""Each family of tests/families.py: without a policy it is stock, with one the oracle's tokens stay, and nothing else
is lost."""

import struct

import numpy as np
import pytest

import families
import oracle
import pykvc
import tiny
from pykvc import _core
from test_conversation import CHATML, assistant, told, user
from test_exactness import Blocks, compact_and_masked, run_stock

HYBRID, LATENT = list(families.HYBRID), list(families.LATENT)
ARCHS = [*families.WRITE, "qwen2vl", "gpt-oss"]
N, BUDGET = 150, 40
POLICIES = ["snapkv:window=16", "keydiff:share=head", "knorm:share=head", "streaming_llm", "tova", "pyramidkv:window=16"]
WINDOWS = {"gemma4", "gpt-oss", *families.SHARED}  # smaller than what is decoded here: restored, they lie in another order, and sums round differently


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("families"), {}

    def model(arch):
        if arch not in made:
            made[arch] = _core.Model(str(tiny.write(folder/f"{arch}.gguf", arch)))
        return made[arch]
    model.path = lambda arch: folder/f"{arch}.gguf" if model(arch) else None
    return model


def context(model, policy="snapkv:window=16", budget=str(BUDGET), **kwargs):
    return _core.Context(model, **{"n_ctx": 512, "n_batch": 128, "n_ubatch": 32, "n_threads": 1, "policy": policy, "budget": budget, **kwargs})


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, tiny.N_VOCAB, n, dtype=np.int32)


def decode(ctx, tokens, seq=0):
    """Logits of the last token; in batches, the last of them of a few."""
    for i in range(0, len(tokens), 70):
        ctx.decode(tokens[i:i + 70], seq)
    return ctx.logits()[-1].copy()


def step(ctx, tokens, seq=0):
    """Logits [n, n_vocab] of single tokens."""
    return np.array([decode(ctx, tokens[i:i + 1], seq) for i in range(len(tokens))])


def same(a, b):
    return len(a) == len(b) and all(map(np.array_equal, a, b))


@pytest.mark.parametrize("arch, kind", [*((arch, "f16") for arch in ARCHS), *((arch, "q8_0") for arch in LATENT)])
def test_a_budget_of_everything_is_stock(models, stock, tmp_path, monkeypatch, arch, kind):
    if kind != "f16":  # ours rounds less (test_attention.py)
        monkeypatch.setenv("PYKVC_STOCK_ATTENTION", "1")
    tokens, split = ids(N + 8), N
    how = dict(type_k=kind, type_v=kind, fa=1)
    want, state = run_stock(stock, models.path(arch), tokens, tmp_path, split=split, ctx=512, n_vocab=tiny.N_VOCAB, **how)
    for policy in ("full", *POLICIES):
        c = _core.Context(models(arch), n_ctx=512, n_threads=1, type_k=kind, type_v=kind, flash_attn="on", policy=policy,
                          budget="" if policy == "full" else "100%")
        c.decode(tokens[:split])
        got = [c.logits()[-1]]
        if policy != "full":
            assert c.evict() is False
            c.end_prompt()
        assert np.array_equal([*got, *step(c, tokens[split:])], want), policy
        assert policy != "full" or c.save() == state
        assert all((k == np.arange(len(tokens))).all() for k in c.kept())


EXPECTED = "expected_attention:window=32,future=20"


@pytest.mark.parametrize("arch, policy", [(arch, policy) for policy in (*POLICIES, EXPECTED) for arch in ARCHS  # test_what_a_family_does_not_allow
                                          if policy != EXPECTED or arch not in {*families.SHARED, *LATENT}])
def test_what_stays_is_what_the_oracle_keeps(models, arch, policy):
    name, _, rest = policy.partition(":")
    params = {key: int(value) for key, value in (item.split("=") for item in rest.split(",") if item and "share" not in item)}
    want = oracle.POLICIES[name](**params)
    c = context(models(arch), policy)
    decode(c, ids(N))
    layers = c.signals()
    assert c.evict()
    kept = c.kept()
    n_keep = [k.shape[1] for k in kept]
    assert sum(n_keep) == len(kept)*BUDGET and len(set(n_keep)) == (1 if name != "pyramidkv" or len(kept) == 1 else len(kept))
    assert same(kept, want.kept(layers, n_keep))


@pytest.mark.parametrize("arch", ARCHS)
def test_sums_of_attention(models, arch):
    """h2o has no flash attention, and V lies transposed."""
    c = context(models(arch), "h2o", flash_attn="off")
    decode(c, ids(N))
    layers = c.signals()
    for layer in layers:
        assert len(layer["sums"]) == (1 if arch in LATENT else tiny.N_HEAD_KV)
        np.testing.assert_allclose(layer["sums"].sum(axis=1), N, rtol=0.3 if arch == "gpt-oss" else 1e-2)  # a sink takes its part
    assert c.evict()
    assert same(c.kept(), oracle.POLICIES["h2o"]().kept(layers, [BUDGET]*len(layers)))
    step(c, ids(9, 1))
    assert np.isfinite(c.logits()).all()


@pytest.mark.parametrize("arch", families.SHARED)
@pytest.mark.parametrize("flash_attn", ["on", "off"])
def test_every_reader_of_a_cache_is_heard(models, arch, flash_attn, monkeypatch):
    """The attention of a window is the mean of what each layer that reads the cache gives: as sums over one token have it, whose
    queries are the window's. In steps of our own, in llama.cpp's graph, and in rows of each query."""
    f32 = dict(type_k="f32", type_v="f32")  # rounding aside
    c, rows = (context(models(arch), policy, flash_attn=flash_attn, **f32) for policy in ("snapkv:window=1", "dropkv:window=4"))
    sums = context(models(arch), "h2o", flash_attn="off", **f32)
    for ctx in (c, rows, sums):
        decode(ctx, ids(60))
    before = [layer["sums"] for layer in sums.signals()]
    for ctx in (c, rows, sums):
        decode(ctx, ids(1, 1))
    group = tiny.N_HEAD//tiny.N_HEAD_KV
    steps = c.signals()
    monkeypatch.setenv("PYKVC_STOCK_ATTENTION", "1")
    for ours, graph, each, was, now in zip(steps, c.signals(), rows.signals(), before, sums.signals()):
        assert ours["attn"].shape == (tiny.N_HEAD, 61)
        np.testing.assert_allclose(ours["attn"].sum(axis=1), 1, atol=2e-3)
        np.testing.assert_allclose(ours["attn"], graph["attn"], atol=2e-3)
        if flash_attn == "off":  # as sums are always: how a softmax is rounded shows after 30 layers
            mean = ours["attn"].reshape(tiny.N_HEAD_KV, group, 61).mean(axis=1)
            np.testing.assert_allclose(now["sums"] - np.pad(was, ((0, 0), (0, 1))), mean, atol=5e-3)
        np.testing.assert_allclose(each["attn_rows"][:, -1], ours["attn"], atol=2e-3)
    assert c.stats()["bytes_signals"] == {"gemma4:shared": 2, "gemma3n": 6}[arch]*tiny.N_HEAD*32*4  # a ring for each global layer


@pytest.mark.parametrize("arch", LATENT)
def test_a_latent_row_is_a_key_of_every_head(models, arch, monkeypatch):
    """One KV head, whose queries are what attention gets them as: what a window of one gives is what llama.cpp's own softmax of
    that token adds to the sums. Keys are whole rows, the part that is rotated with them. What is allocated is a row a token and
    layer, and a ring of queries as wide as all heads' rows."""
    f32 = dict(type_k="f32", type_v="f32", flash_attn="off")
    c, sums = context(models(arch), "snapkv:window=1", **f32), context(models(arch), "h2o", **f32)
    for ctx in (c, sums):
        decode(ctx, ids(60))
    before = [layer["sums"] for layer in sums.signals()]
    for ctx in (c, sums):
        decode(ctx, ids(1, 1))
    ours = c.signals()
    monkeypatch.setenv("PYKVC_STOCK_ATTENTION", "1")
    for layer, graph, was, now in zip(ours, c.signals(), before, sums.signals()):
        assert layer["attn"].shape == (tiny.N_HEAD, 61) and layer["pos"].shape == (1, 61)
        np.testing.assert_allclose(layer["attn"], graph["attn"], atol=2e-3)
        np.testing.assert_allclose(now["sums"] - np.pad(was, ((0, 0), (0, 1))), layer["attn"].mean(axis=0, keepdims=True), atol=2e-3)
    n_row, n_layer = families.N_LATENT + families.N_ROPE, len(c.kept())
    assert c.stats()["bytes_used"] == 61*n_layer*n_row*4 and c.stats()["bytes_signals"] == n_layer*tiny.N_HEAD*n_row*4
    keys = context(models(arch), "keydiff", **f32)
    decode(keys, ids(60))
    assert all(layer["keys"].shape == (1, 60, n_row) and layer["keys"].std(axis=1).min() > 0 for layer in keys.signals())


@pytest.mark.parametrize("arch", LATENT)
@pytest.mark.parametrize("kind, flash_attn", [("f16", "on"), ("f16", "off"), ("q8_0", "on"), ("q4_0", "on"), ("f32", "off"), ("bf16", "on")])
def test_latent_rows_move_as_bytes(models, arch, kind, flash_attn):
    """After an eviction every row is the one that was there, of any type."""
    c = context(models(arch), "keydiff", "60", type_k=kind, type_v=kind, flash_attn=flash_attn)
    decode(c, ids(N))
    before = c.signals()
    assert c.evict()
    for was, now, kept in zip(before, c.signals(), c.kept()):
        assert len(kept) == 1 and np.array_equal(now["pos"], kept) and np.array_equal(now["keys"][0], was["keys"][0][kept[0]])
    assert np.isfinite(decode(c, ids(3))).all()


@pytest.mark.parametrize("arch, kind, budget", [("deepseek2", "f16", "240"), ("deepseek2", "bf16", "240"), ("kimi-linear", "f16", "224")])
def test_latent_blocks_are_a_mask(models, arch, kind, budget):
    """Aligned blocks compacted, in layers of different lengths, are the whole cache under a mask, bit for bit, without flash
    attention."""
    logits, kept = compact_and_masked(models(arch), ids(1024 + 32), type_k=kind, type_v=kind, flash_attn="off", policy=Blocks(), budget=budget)
    assert [k.shape for k in kept] == [(1, n) for n in (192, 256, 320, 192)[:len(kept)]]
    assert np.array_equal(*logits) and np.ptp(logits[0]) > 1


@pytest.mark.parametrize("arch", ARCHS)
def test_states_and_branches(models, arch, tmp_path):
    """Whole, by sequence and in a file: what goes on from each is what would have gone on without."""
    types = dict(type_k="f32", type_v="f32", flash_attn="off") if arch in WINDOWS else {}  # which sums in F32
    c, d = (context(models(arch), n_seq_max=2, **types) for _ in range(2))
    decode(c, ids(N))
    assert c.evict() and c.stats()["kept"] == [BUDGET]*len(c.kept())
    c.end_prompt()
    step(c, ids(5, 1))
    c.copy(0, 1)
    d.load(c.save())
    d.load_seq(c.save_seq(0), 1)
    want = step(c, ids(6, 2))
    for ctx, seq in ((c, 1), (d, 0), (d, 1)):
        np.testing.assert_allclose(step(ctx, ids(6, 2), seq), want, rtol=0, atol=0.05 if arch in WINDOWS else 0)
        assert same(ctx.kept(seq), c.kept())
    if arch in HYBRID:  # the way back to the prompt's end went along
        want = None
        for ctx, seq in ((c, 0), (c, 1), (d, 0), (d, 1)):
            assert ctx.pos_floor(seq) == N and ctx.remove_tail(N, seq)
            got = step(ctx, ids(3, 4), seq)
            assert want is None or np.array_equal(got, want)
            want = got
        data = d.save_seq(0)
        at = data.index(struct.pack("<ii", BUDGET, N))  # cells of the prompt, and of what the recurrent state beside it is
        with pytest.raises(ValueError, match="recurrent state"):
            d.load_seq(data[:at + 4] + struct.pack("<i", N - 1) + data[at + 8:], 0)
        assert np.array_equal(decode(d, ids(N), 0), decode(context(models(arch), n_seq_max=2, **types), ids(N)))
    with pytest.raises(ValueError):
        d.load(c.save()[:-7])
    assert c.stats()["bytes_past"] < c.stats()["bytes_allocated"] and (c.stats()["bytes_past"] > 0) == (arch in HYBRID)
    assert [d.pos_max(seq) for seq in (0, 1)] == [-1, -1]
    assert np.array_equal(decode(d, ids(N)), decode(context(models(arch), n_seq_max=2, **types), ids(N)))  # nothing of it is left

    how = dict(n_ctx=512, n_threads=1, kv_policy="snapkv:window=16", kv_budget=BUDGET)
    with pykvc.LLM(models.path(arch), **how) as a, pykvc.LLM(models.path(arch), **how) as b:
        a.prefill(tokens=ids(N).tolist())
        a.compress()
        a.save(tmp_path/"state")
        first = a.generate(tokens=ids(3, 3).tolist(), reset=False, compress=False, max_tokens=8)
        b.load(tmp_path/"state")
        assert b.generate(tokens=ids(3, 3).tolist(), reset=False, compress=False, max_tokens=8).tokens == first.tokens


@pytest.mark.parametrize("arch", ARCHS)
def test_tails(models, arch):
    """A recurrent state goes back to where the prompt ended, and to nothing behind it: there all that was there still
    is."""
    c, d = (context(models(arch)) for _ in range(2))
    for ctx in (c, d):
        decode(ctx, ids(N))
        assert ctx.evict()
        ctx.end_prompt()
    step(c, ids(7, 1))
    kept = c.kept()
    assert not c.remove_tail(20)
    if arch in HYBRID:
        assert c.pos_floor() == N and not c.remove_tail(N + 3) and not c.remove_tail(N + 6) and same(c.kept(), kept)
        assert c.remove_tail(N + 7)  # nothing is there
    assert c.pos_floor() <= N and c.remove_tail(N) and c.pos_max() == N - 1
    for _ in range(2):  # as often as one likes
        step(c, ids(3, 3))
        assert c.remove_tail(N)
    assert np.array_equal(step(c, ids(4, 2)), step(d, ids(4, 2))) and same(c.kept(), d.kept())
    assert c.remove_tail(0) and c.pos_max() == -1 and c.pos_floor() == 0
    assert np.array_equal(decode(c, ids(N)), decode(context(models(arch)), ids(N)))


@pytest.mark.parametrize("arch", ARCHS)
def test_fewer_cells_than_tokens(models, arch):
    """Evictions between ubatches, then while it answers; layers that draw from a pool, too."""
    if arch == "llama4":
        with pytest.raises(ValueError, match="sliding window takes 8224 cells"):
            context(models(arch), cells="256", n_ctx=1024)
        return
    for policy in ("snapkv:window=16", "streaming_llm", "keydiff"):
        c = context(models(arch), policy, "", cells="256", n_ctx=1024)
        full = context(models(arch), "full", "", n_ctx=1024)
        before = len(c.kept())
        for i in range(0, 600, 100):
            c.decode(ids(600)[i:i + 100])
            assert np.mean([k.shape[1] for k in c.kept()]) <= 256
        assert c.stats()["n_evictions"] > 3 and c.pos_max() == 599 and len(c.kept()) == before
        assert c.stats()["bytes_allocated"] < full.stats()["bytes_allocated"]
        c.end_prompt()
        step(c, ids(80, 1))
        assert np.isfinite(c.logits()).all()


@pytest.mark.parametrize("arch", HYBRID)
def test_several_sequences_at_once(models, arch):
    """Recurrent layers take them side by side: each says what it would alone, but for rounding."""
    how = dict(n_ubatch=33)  # llama.cpp reserves kimi-linear's graph for a multiple of the sequences only
    c, alone = context(models(arch), n_seq_max=3, **how), [context(models(arch), **how) for _ in range(3)]
    for s, n in enumerate((90, 61, 120)):
        for ctx, seq in ((c, s), (alone[s], 0)):
            decode(ctx, ids(n, n), seq)
            assert ctx.evict(seq) and ctx.seq_stats(seq)["kept"] == [BUDGET]*len(ctx.kept(seq))
            ctx.end_prompt(seq)
        assert same(c.kept(s), alone[s].kept())
    for seqs in ((0, 1, 2), (2, 0), (0, 1, 2), (1,)):
        c.decode_batch(np.array(seqs, np.int32), np.array(seqs, np.int32))
        for s, row in zip(seqs, c.logits()):
            np.testing.assert_allclose(row, decode(alone[s], np.array([s], np.int32)), rtol=0, atol=0.05)


@pytest.mark.parametrize("arch", HYBRID)
@pytest.mark.parametrize("policy", ["kvzip:window=32,share=head", "finch:window=32"])
def test_a_probe_leaves_nothing_behind(models, arch, policy):
    """Not in the recurrent state either, however it ends; and what is heard decides."""
    c, never = (context(models(arch), policy) for _ in range(2))
    for ctx in (c, never):
        decode(ctx, ids(N))
    c.ask(ids(20, 1))
    with pytest.raises(ValueError, match="probe"):
        c.ask(ids(500, 1))
    layers = c.signals()
    assert c.pos_max() == N - 1 and all(np.isfinite(layer["probed"]).all() for layer in layers)
    assert np.array_equal(step(c, ids(4, 2)), step(never, ids(4, 2)))
    assert c.evict() and c.stats()["kept"] == [BUDGET]*len(c.kept())


def test_a_quarter_of_the_part_that_grows(tmp_path):
    """24 layers, 6 with attention: a budget of 25 % is a quarter of those. A fresh run after a restore says the
    same."""
    path = tiny.write(tmp_path/"model.gguf", "qwen35", n_layer=24)
    how = dict(n_ctx=1024, n_threads=1)
    prompt, question = ids(400).tolist(), ids(9, 1).tolist()
    with pykvc.LLM(path, **how, kv_policy="snapkv:window=16", kv_budget="25%") as llm, pykvc.LLM(path, **how) as whole:
        whole.prefill(tokens=prompt)
        n_row = 2*2*32*tiny.N_HEAD_KV  # K and V, F16
        assert whole.stats()["bytes_used"] == 400*6*n_row and len(whole.stats()["kept"]) == 6
        llm.prefill(tokens=prompt)
        assert llm.stats()["bytes_used"] == llm.stats()["bytes_full"] == 400*6*n_row
        llm.compress()
        assert llm.stats()["bytes_used"] == 100*6*n_row and llm.stats()["bytes_full"] == 400*6*n_row
        assert llm.stats()["bytes_allocated"] - llm.stats()["bytes_signals"] == whole.stats()["bytes_allocated"]
        llm.save(tmp_path/"state")
        want = llm.generate(tokens=question, reset=False, compress=False, max_tokens=20).tokens
        with pykvc.LLM(path, **how, kv_policy="snapkv:window=16", kv_budget="25%") as fresh:
            fresh.load(tmp_path/"state")
            assert fresh.generate(tokens=question, reset=False, compress=False, max_tokens=20).tokens == want


@pytest.mark.parametrize("arch, policy, why", [
    ("gemma4", "kvzip", "sliding window"),
    *((arch, policy, "are latent") for arch in LATENT for policy in ("expected_attention", "snapkv:values=wo", "dropkv", "kvzip:plus=1")),
    *((arch, policy, "several layers read one cache") for arch in families.SHARED for policy in ("expected_attention", "snapkv:values=wo")),
])
def test_what_a_family_does_not_allow(models, arch, policy, why):
    with pytest.raises(ValueError, match=why):
        context(models(arch), policy, "64")
    decode(context(models(arch), "full", ""), ids(20))  # all else goes on


@pytest.mark.parametrize("arch", ["qwen35", "falcon-h1"])
def test_a_hybrid_without_a_policy_is_asked_again_and_again(models, arch):
    """What cannot be cut is copied: the answers of pykvc.LLM.context() do not see each other."""
    models(arch)
    for policy in ({}, dict(kv_policy="snapkv:window=16", kv_budget=BUDGET)):
        with pykvc.LLM(models.path(arch), n_ctx=512, n_threads=1, **policy) as llm:
            ctx = llm.context(tokens=ids(N).tolist())
            first, other = (ctx.ask(tokens=ids(n, n).tolist(), max_tokens=9).tokens for n in (4, 11))
            assert ctx.ask(tokens=ids(4, 4).tolist(), max_tokens=9).tokens == first != other
            with pytest.raises(ValueError, match=f"truncated to {N + 4 if policy else llm.n_tokens} tokens"):
                llm.truncate(N - 10)


def test_a_probe_asks_a_hybrid_through_llm(models):
    """pykvc's own driver: chunks of the context, each repeated and taken out again."""
    models("qwen35")
    with pykvc.LLM(models.path("qwen35"), n_ctx=1024, n_ubatch=128, n_threads=1, kv_policy="finch:window=32", kv_budget=BUDGET) as llm:
        llm._session.query = ids(8, 1).tolist()  # there is no tokenizer for a kv_query
        llm.prefill(tokens=ids(300).tolist())
        first = llm._session.logits().copy()
        llm.compress()
        assert llm.stats()["kept"] == [BUDGET]*2 and np.isfinite(first).all()


@pytest.mark.parametrize("arch", ["qwen2vl", "qwen3vl", "qwen35"])
def test_an_image_is_refused_before_it_touches_the_cache(models, arch):
    """Rows of an image have positions of their own, and text behind one leaves a gap."""
    import ctypes

    from pykvc import llama_cpp
    import llama_cpp as theirs  # after ours, which has the library
    llm = llama_cpp.Llama(str(models.path(arch)), n_ctx=512, n_ubatch=64, kv_policy="snapkv:window=16", kv_budget=BUDGET, verbose=False)
    llm.eval(ids(100).tolist())
    ctx = llm._kv.ctx
    kept = ctx.kept()

    def batch(n, embd, first):
        b = theirs.llama_batch_init(4*n, families.N_EMBD if embd else 0, 1)
        b.n_tokens = n
        for i in range(n):
            if embd:
                ctypes.memset(b.embd, 0, 4*n*families.N_EMBD)
            else:
                b.token[i] = i
            b.n_seq_id[i], b.seq_id[i][0], b.logits[i] = 1, 0, i == n - 1
            for part, pos in enumerate((first, first + i//4, first + i % 4, 0) if embd else (first + i,)):
                b.pos[part*n + i] = pos
        try:
            return theirs.llama_decode(llm._ctx.ctx, b)
        finally:
            theirs.llama_batch_free(b)

    lib = ctypes.CDLL(str(next(llama_cpp.LIB.glob("libllama.*"))))
    lib.kvc_last_error.restype = ctypes.c_char_p
    for embd, first, why in ((True, 100, b"images"), (False, 104, b"gaps")):
        assert batch(16, embd, first) == -1 and why in lib.kvc_last_error()
        assert ctx.pos_max() == 99 and same(ctx.kept(), kept)
    assert batch(16, False, 100) == 0 and ctx.pos_max() == 115
    llm.close()


@pytest.mark.parametrize("arch", ["llama", "qwen35", "deepseek2"])
def test_kvzip_evaluates_no_token_twice(arch, tmp_path):
    """A chat of six turns, and a document that is saved once and asked three questions: what was evaluated stays so, but for the
    repetition that the policy asks for. (pykvc serve has no probes; its other policies: test_server_reuse.py.)"""
    path = tiny.write_chat(tmp_path/"model.gguf", {}, arch=arch, n_layer=4, mute_eos=True)

    def opened():
        return pykvc.LLM(path, n_ctx=1024, n_ubatch=64, n_threads=1, kv_policy="kvzip:window=32,recent=8", kv_budget="40%")
    with opened() as llm:
        for i, n in enumerate((120, 3, 40, 1, 90, 17)):
            before = llm.n_tokens
            got = llm.generate(tokens=ids(n, n).tolist(), reset=False, compress=True, max_tokens=6)
            assert got.n_prompt == n and llm.n_tokens == before + n + 5 + (i > 0) and got.kv["evictions"] == 1 and got.timings["probe_ms"] > 0
    with opened() as llm:
        llm.generate(tokens=ids(200).tolist(), max_tokens=0)
        llm.save(tmp_path/"state")
        kept = llm.kept()
    want = []
    for _ in range(2):
        with opened() as llm:
            answers = []
            for n in 9, 1, 30:
                llm.load(tmp_path/"state")
                assert same(llm.kept(), kept)
                answers.append(llm.generate(tokens=ids(n, n).tolist(), reset=False, compress=False, max_tokens=6))
                assert answers[-1].n_prompt == n and llm.n_tokens == 200 + n + 5
            want.append([answer.tokens for answer in answers])
    assert want[0] == want[1]


@pytest.mark.parametrize("arch", ["llama", "qwen35", "falcon-h1"])
def test_a_chat_whose_template_drops_thoughts_goes_on_from_the_prompt(tmp_path, arch):
    """The answer's tokens come back as others: a recurrent state goes back to before them, and only the rest is
    evaluated."""
    path = tiny.write_chat(tmp_path/"model.gguf", {"default": CHATML}, eos="<|im_end|>", special=("<|im_start|>",), arch=arch, n_layer=4, mute_eos=True)
    how = dict(n_ctx=1024, n_threads=1, kv_policy="snapkv:window=16", kv_budget=64)
    asked = [user("Name two rivers of Europe, and say how long they are." * 2)]
    on = [*asked, assistant("<think>Rivers.</think>Danube."), user("Which is longer?")]
    with pykvc.LLM(path, **how) as llm:
        told(llm, asked, on[1]["content"])
        n_prompt = len(llm.tokenize("".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in asked) + "<|im_start|>assistant\n"))
        answer = llm.chat(on, max_tokens=4)
        assert answer.kv["reused"] == n_prompt and answer.kv["anew"] == "" and answer.kv["evictions"] == 1
