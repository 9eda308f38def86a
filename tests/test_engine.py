"""What the engine refuses, when it evicts, and what only some models have. Random weights: nothing here is about
quality."""
import numpy as np
import pytest

import pykvc
import tiny
from pykvc import _core


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return {arch: _core.Model(str(tiny.write(folder/f"{arch}.gguf", arch, n_layer=7 if arch == "gemma3" else 3)))
            for arch in ("llama", "gemma3", "mamba", "t5")}


def context(model, policy="snapkv:window=8,kernel=3", budget="24", **kwargs):
    return _core.Context(model, **{"n_ctx": 512, "n_ubatch": 64, "n_threads": 1, "policy": policy, "budget": budget, **kwargs})


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, tiny.N_VOCAB, n, dtype=np.int32)


@pytest.mark.parametrize("arch, why", [("mamba", "recurrent state, which does not grow"), ("t5", "relative positions")])
def test_unsupported_models_are_refused(models, arch, why):
    with pytest.raises(ValueError, match=why):
        context(models[arch])
    c = context(models[arch], "full", "")  # the process and the model are as usable as before
    if arch != "t5":                       # this binding does not make what a decoder gets from an encoder
        c.decode(ids(5))


@pytest.mark.parametrize("kwargs, why", [
    (dict(policy="adakv:window=8", budget="8"), "at least 9"),
    (dict(policy="adakv:window=8", decode_budget="8"), "does not evict generated"),
    (dict(policy="h2o", flash_attn="on"), "flash attention"),
    (dict(policy="h2o", type_v="q8_0"), "quantized V"),
    (dict(budget="8"), "at least 9"),
    (dict(decode_budget="8"), "streaming_llm"),
    (dict(policy="full", budget="8"), "full"),
    (dict(type_k="q3"), "q8_0"),
    (dict(flash_attn="maybe"), "auto"),
])
def test_bad_arguments_name_what_is_valid(models, kwargs, why):
    with pytest.raises(ValueError, match=why):
        context(models["llama"], **kwargs)


def test_bad_calls_change_nothing(models):
    c = context(models["llama"])
    c.decode(ids(60))
    before = c.kept()
    for call in (lambda: c.decode(ids(500)), lambda: c.decode(np.array([tiny.N_VOCAB], np.int32)), lambda: c.decode(ids(0)), lambda: c.decode(ids(1), 3),
                 lambda: c.set_spans([(0, 9), (5, 12)]), lambda: c.set_spans([(4, 4)]), lambda: c.set_budget("8", ""), lambda: c.remove_tail(-1)):
        with pytest.raises(ValueError):
            call()
    assert all(map(np.array_equal, before, c.kept()))
    assert c.evict() and c.stats()["kept"] == [24]*3


def test_rollback_floor(models):
    """The window is held by every head: a tail can be removed down to it, and no further."""
    c = context(models["llama"])
    c.decode(ids(60))
    c.evict()
    assert c.pos_floor() <= 52
    assert not c.remove_tail(c.pos_floor() - 1) and c.pos_max() == 59
    assert c.remove_tail(54) and c.pos_max() == 53
    assert [k[:, -2:].tolist() for k in c.kept()] == [[[52, 53]]*2]*3
    c.decode(ids(3, 1))
    assert c.remove_tail(0) and c.pos_max() == -1 and c.pos_floor() == 0


def unequal(kept):
    """Slots of each head [n_layer, n_head_kv], once every head of every layer is seen to be in order."""
    for layer in kept:
        for head in layer:
            assert (np.diff(head[head >= 0]) > 0).all() and (np.diff(head) >= 0).all()
    return np.array([(k >= 0).sum(axis=1) for k in kept])


@pytest.mark.parametrize("kwargs", [{}, {"flash_attn": "off"}, {"type_k": "q8_0", "type_v": "q8_0"}])
def test_heads_that_differ(models, kwargs):
    """adakv: rows are those of the longest head, empty slots are passed over from then on, also after a state."""
    how = dict(policy="adakv:window=8,kernel=1,alpha=0.1", budget="32", **kwargs)
    c = context(models["llama"], **how)
    c.decode(ids(200))
    row_bytes = c.stats()["bytes_used"]//(200*3)
    assert c.evict() and not c.evict()  # H*B is met exactly, whatever the longest head is
    n = unequal(c.kept())
    assert (n.sum(axis=1) == 2*32).all() and np.ptp(n, axis=1).max() > 4
    assert c.stats()["kept"] == n.max(axis=1).tolist() and c.stats()["bytes_used"] == n.sum()*row_bytes//2
    for layer, signal, score in zip(c.kept(), c.signals(), c.scores()):
        g = signal["attn"].shape[0]//2
        assert np.array_equal(signal["pos"], layer) and (np.isinf(score) == (layer < 0)).all()
        assert (signal["attn"][np.repeat(layer < 0, g, axis=0)] == 0).all()
        np.testing.assert_allclose(signal["attn"].sum(axis=1), 1, atol=2e-3)

    d = context(models["llama"], **how)
    d.load(c.save())
    for x in (c, d):
        x.decode(ids(40, 1))
        assert x.evict()
        for t in ids(5, 2):
            x.decode(np.array([t], np.int32))
    n = unequal(c.kept())
    assert (n.sum(axis=1) == 2*(32 + 5)).all()
    assert all(map(np.array_equal, c.kept(), d.kept())) and np.array_equal(c.logits(), d.logits())


def test_heads_that_differ_roll_back_to_the_floor(models):
    """A head may keep its window alone: where that is removed, it holds nothing, and goes on from there."""
    class Two(pykvc.Policy):
        name, window, heads_differ = "two", 8, True

        def score(self, layer):
            return layer.pos

        def budgets(self, request):
            return [20]*len(request.layers)

        def keep(self, il, request, n_keep):
            n = request.layers[il].n_kv
            return np.array([[*range(12), *range(n - 8, n)], [-1]*12 + [*range(n - 8, n)]])

    c = context(models["llama"], Two(), "14")
    c.decode(ids(60))
    assert c.evict() and c.pos_floor() == 52
    assert not c.remove_tail(51) and c.remove_tail(52)
    assert all(k.tolist() == [[*range(12)], [-1]*12] for k in c.kept())
    with pytest.raises(ValueError, match="at least one token"):
        c.signals()
    c.decode(ids(4, 1))
    assert np.isfinite(c.logits()).all() and all(k[1].tolist() == [-1]*12 + [52, 53, 54, 55] for k in c.kept())
    assert all(x["n_query"] == 4 and np.isfinite(x["attn"]).all() for x in c.signals())


@pytest.mark.parametrize("slots, why", [([3, -1, 5], "ascending"), ([-1, 3, 3], "ascending"), ([-2, 3, 5], "ascending"), ([-1, 3, 60], "ascending")])
def test_a_python_policy_with_heads_that_differ_is_checked(models, slots, why):
    class Some(pykvc.Policy):
        name, heads_differ = "some", True

        def score(self, layer):
            return layer.pos

        def budgets(self, request):
            return [3]*len(request.layers)

        def keep(self, il, request, n_keep):
            return np.array([[3, 4, 5], slots])

    c = context(models["llama"], Some(), "3")
    c.decode(ids(60))
    with pytest.raises(ValueError, match=why):
        c.evict()
    assert c.stats()["kept"] == [60]*3
    Some.decode = "whole"
    with pytest.raises(ValueError, match="heads_differ"):
        context(models["llama"], Some(), "3")


@pytest.mark.parametrize("spec", ["streaming_llm:interval=8", "h2o:interval=8", "tova:interval=8", "shotkv:window=8,interval=8,recent=8",
                                  "pyramidinfer:window=8,interval=8", "random:interval=8"])
def test_generated_tokens_stay_within_the_limit(models, spec):
    c = context(models["llama"], spec, "32", decode_budget="16")
    c.decode(ids(100))
    if spec.startswith("shotkv"):
        c.set_spans([(i, i + 6) for i in range(4, 88, 6)])
    c.evict()
    c.end_prompt()
    prompt = sum(c.stats()["kept"])/3
    assert prompt == 32
    frozen = [k[k < 100] for k in c.kept()]
    n_evictions = [c.stats()["n_evictions"]]
    for t in ids(120, 2):
        c.decode(np.array([t], np.int32))
        assert sum(c.stats()["kept"])/3 <= 32 + 16 + 8
        n_evictions.append(c.stats()["n_evictions"])
    # 24 tokens to the first, then one an interval; each counted once
    assert np.flatnonzero(np.diff(n_evictions)).tolist() == list(range(24, 120, 8))
    if not spec.startswith(("streaming_llm", "h2o", "tova", "random")):
        assert all(map(np.array_equal, frozen, [k[k < 100] for k in c.kept()]))


def test_only_the_global_layers_of_a_sliding_window_model_evict(models):
    full, c = context(models["gemma3"], "full", ""), context(models["gemma3"])
    assert c.n_layer_kv == 1  # of seven; the others see 32 tokens back and have a small cache of their own
    logits = []
    for x in (full, c):
        x.decode(ids(200))
        logits.append(x.logits())
    assert np.array_equal(*logits)
    assert c.evict() and c.stats()["kept"] == [24]
    for t in ids(10, 3):
        c.decode(np.array([t], np.int32))
    assert np.isfinite(c.logits()).all() and c.pos_max() == 209
    assert not c.remove_tail(100) and c.pos_max() == 209
    for x in (c, full):
        d = context(models["gemma3"]) if x is c else context(models["gemma3"], "full", "")
        d.load(x.save())
        for y in (x, d):
            y.decode(np.array([7], np.int32))
        # llama.cpp restores the window's cells in another order, and sums in that order: with and without a policy
        assert np.allclose(x.logits(), d.logits(), atol=0.02) and np.array_equal(x.kept()[0], d.kept()[0])


def test_environment(models, monkeypatch):
    """A program that knows nothing of us: the policy from the environment, the prompt's end from its batches."""
    monkeypatch.setenv("LLAMA_ARG_KV_POLICY", "streaming_llm:interval=8")
    monkeypatch.setenv("LLAMA_ARG_KV_BUDGET", "25%")
    monkeypatch.setenv("LLAMA_ARG_KV_DECODE_BUDGET", "16")
    c, want = context(models["llama"], None), context(models["llama"], "streaming_llm:interval=8", "25%", decode_budget="16")
    assert c.policy == want.policy
    for x in (c, want):
        x.decode(ids(100), logits="last")
    assert c.stats()["kept"] == [100]*3  # the first token's latency is not touched
    want.evict()
    want.end_prompt()
    for t in ids(40, 1):
        for x in (c, want):
            x.decode(np.array([t], np.int32))
        assert np.array_equal(c.logits(), want.logits())
    assert all(map(np.array_equal, c.kept(), want.kept()))
    c.decode(ids(80, 5))       # a second turn
    c.decode(ids(1, 6))
    assert c.stats()["kept"] == [55 + 1]*3  # a quarter of the 220 tokens evaluated
    monkeypatch.setenv("LLAMA_ARG_KV_POLICY", "snapvk")
    with pytest.raises(ValueError, match="snapkv"):
        context(models["llama"], None)


def test_a_prompt_of_whole_ubatches_and_one_token(models, monkeypatch):
    """Its last token, alone in a ubatch, is no answer."""
    monkeypatch.setenv("LLAMA_ARG_KV_POLICY", "streaming_llm")
    monkeypatch.setenv("LLAMA_ARG_KV_BUDGET", "24")
    monkeypatch.setenv("LLAMA_ARG_KV_CELLS", "256")
    c = context(models["llama"], None)
    c.decode(ids(129), logits="last")
    assert c.stats()["n_evictions"] == 0 and c.stats()["kept"] == [129]*3
    c.decode(ids(1))
    assert c.stats()["kept"] == [25]*3


@pytest.mark.parametrize("order", [[0, 1], [0, 2], [1, 0], [2, 0, 1]])
def test_answers_side_by_side_are_evicted_in_any_order(models, order):
    """Sequences that do not follow each other are evaluated in ubatches of their own."""
    c = context(models["llama"], "streaming_llm:interval=4", "16", decode_budget="8", n_seq_max=3)
    for seq in order:
        c.decode(ids(40, seq), seq)
        c.evict(seq)
        c.end_prompt(seq)
    for t in ids(60, 5):
        c.decode_batch(np.full(len(order), t, np.int32), np.array(order, np.int32))
        assert max(c.seq_stats(seq)["cells"] for seq in order) <= 16 + 8 + 4
    assert {c.seq_stats(seq)["n_evictions"] for seq in order} == {1 + (60 - 8 - 1)//4}


@pytest.mark.parametrize("policy", ["snapkv:window=8,kernel=3", "expected_attention:window=8,sinks=0", "h2o"])
def test_many_sequences(models, policy):
    c = context(models["llama"], policy, "40", n_seq_max=200)
    for seq in (0, 199):
        c.decode(ids(60, 1), seq)
    tokens, seqs = np.full(200, 3, np.int32), np.arange(200, dtype=np.int32)
    c.decode_batch(tokens[198:], seqs[198:])
    c.decode_batch(tokens, seqs)
    alone = context(models["llama"], policy, "40")
    alone.decode(ids(60, 1))
    for _ in range(2):
        alone.decode(tokens[:1])
    assert c.evict(199) and alone.evict()
    assert all(map(np.array_equal, c.kept(199), alone.kept()))


def test_more_is_always_kept_than_a_short_prompt_has(models):
    """The limit is then what is always kept."""
    c = context(models["llama"], "streaming_llm:sinks=64,interval=8", "", decode_budget="16")
    c.decode(ids(10))
    c.end_prompt()
    for t in ids(200, 1):
        c.decode(np.array([t], np.int32))
        assert c.stats()["kept"][0] <= 65 + 8
    assert c.stats()["n_evictions"] > 10
    c = context(models["llama"], "pyramidinfer:window=8,sinks=32", "", decode_budget="16")  # the prompt is frozen
    c.decode(ids(10))
    c.end_prompt()
    for t in ids(100, 1):
        c.decode(np.array([t], np.int32))
        assert c.stats()["kept"][0] <= 10 + 16 + 32


@pytest.mark.parametrize("policy", ["snapkv:window=8,kernel=3", "adakv:window=8,kernel=3", "h2o", "full"])
def test_damaged_states_are_refused(models, policy):
    c = context(models["llama"], policy, "" if policy == "full" else "24")
    c.decode(ids(60))
    if policy != "full":
        c.evict()
    data = bytearray(c.save())
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(200):
        bad = bytearray(data)
        if i % 4 == 0:
            bad = bad[:int(rng.integers(0, len(bad)))]
        else:
            for j in rng.integers(0, len(bad), 4) if i % 2 else rng.integers(0, 400, 2):
                bad[int(j)] ^= int(rng.integers(1, 256))
        d = context(models["llama"], policy, "" if policy == "full" else "24")
        try:
            d.load(bytes(bad))
        except ValueError:
            refused += 1
            assert d.pos_max() == -1
        if d.pos_max() + 5 < d.n_ctx:
            d.clear()
            d.decode(ids(5))
    assert refused > 50
    for other in ("full", "streaming_llm", "snapkv:window=9,kernel=3"):
        if other != policy:
            with pytest.raises(ValueError):
                context(models["llama"], other, "" if other == "full" else "24").load(bytes(data))
    c.load(bytes(data))
    assert c.pos_max() == 59


@pytest.mark.parametrize("head, says", [
    ((0x4b560000, 6), "has version 6, this build reads"),
    ((0x4b560001, 60), "of a context without a policy, or of an earlier version"),  # theirs: a tag with the number of streams, then of cells
    ((1, 60), "of a context without a policy, or of an earlier version"),
])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_state_of_another_version_is_refused(models, arch, head, says):
    """By its head, before anything else is read, with the reason in the log."""
    c, d = context(models[arch]), context(models[arch])
    c.decode(ids(60))
    c.evict()
    data = c.save_seq()
    at = data.index((0x4b560000).to_bytes(4, "little"))
    said = []
    _core.set_log(lambda level, text: said.append(text))
    try:
        with pytest.raises(ValueError):
            d.load_seq(data[:at] + np.array(head, np.uint32).tobytes() + data[at + 8:])
        with pytest.raises(ValueError):
            d.load_seq(data.replace(b"snapkv", b"sn\xabpkv", 1))  # is no text to show
    finally:
        _core.set_log(None)
    assert any(says in text for text in said) and any("under another policy, this context has snapkv" in text for text in said)
    d.load_seq(data)
    assert d.pos_max() == 59


@pytest.mark.parametrize("whole", [True, False])
def test_a_state_that_was_read_in_part_leaves_no_sums(models, whole):
    """h2o adds to them: what a truncated state left would count. Of one sequence, too, where the cache is not cleared
    as a whole."""
    c, fresh = context(models["llama"], "h2o"), context(models["llama"], "h2o")
    c.decode(ids(60))
    data = c.save() if whole else c.save_seq()
    with pytest.raises(ValueError):
        c.load(data[:-64]) if whole else c.load_seq(data[:-64])
    for x in (c, fresh):
        x.decode(ids(40, 1))
    assert all(np.array_equal(a["sums"], b["sums"]) for a, b in zip(c.signals(), fresh.signals()))


@pytest.fixture
def raw(tmp_path):
    """The memory of a context of two sequences under h2o, for C calls, and a Context on it."""
    from pykvc import llama_cpp as lib
    _core.set_log(None)  # theirs writes to stderr
    model = lib.llama_model_load_from_file(str(tiny.write(tmp_path/"llama.gguf")).encode(), lib.llama_model_default_params())
    how = lib.llama_context_default_params()
    how.n_ctx, how.n_ubatch, how.n_seq_max, how.kv_unified, how.n_threads, how.n_threads_batch = 1024, 64, 2, False, 1, 1
    _core.next_context("h2o:interval=8", "24")
    ctx = lib.llama_init_from_model(model, how)
    yield lib, ctx, lib.llama_get_memory(ctx), _core.Context.borrow(ctx)
    lib.llama_free(ctx)
    lib.llama_model_free(model)


@pytest.mark.parametrize("then", ["move", "take back", "clear"])
def test_a_copy_of_sums_that_is_followed_by_a_removal(models, raw, then):
    """llama.cpp copies K and V at the next decode: the sums are there before that, and only those of tokens that
    are."""
    lib, _, memory, c = raw
    c.decode(ids(60))
    lib.llama_memory_seq_cp(memory, 0, 1, -1, -1)
    if then == "clear":
        lib.llama_memory_clear(memory, False)
    else:
        lib.llama_memory_seq_rm(memory, 0 if then == "move" else 1, -1, -1)
    fresh = context(models["llama"], "h2o:interval=8", n_seq_max=2)
    if then == "move":
        fresh.decode(ids(60))
    assert c.pos_max(1) == fresh.pos_max()
    c.decode(ids(40, 1), 1)
    fresh.decode(ids(40, 1))
    assert all(np.array_equal(a["sums"], b["sums"]) for a, b in zip(c.signals(1), fresh.signals()))
    assert c.evict(1) and fresh.evict() and all(map(np.array_equal, c.kept(1), fresh.kept()))
    assert np.array_equal(c.logits(), fresh.logits())


def test_an_aborted_ubatch_under_h2o_takes_its_sequence_along(models, raw):
    """And says so: what it added to the sums cannot be taken out. The other sequence stays."""
    lib, ctx, _, c = raw
    c.decode(ids(60), 0)
    c.decode(ids(60), 1)
    said = []
    abort = lib.ggml_abort_callback(lambda _: True)
    _core.set_log(lambda level, text: said.append(text))
    lib.llama_set_abort_callback(ctx, abort, None)
    try:
        with pytest.raises(ValueError, match="code 2"):
            c.decode(ids(5, 1), 1)
    finally:
        lib.llama_set_abort_callback(ctx, lib.ggml_abort_callback(0), None)
        _core.set_log(None)
    assert any("seq_id = 1 as a whole" in text for text in said) and (c.pos_max(0), c.pos_max(1)) == (59, -1)
    fresh = context(models["llama"], "h2o:interval=8", n_seq_max=2)
    for x, seq in ((c, 1), (fresh, 0)):
        x.decode(ids(60), seq)
    assert all(np.array_equal(a["sums"], b["sums"]) for a, b in zip(c.signals(1), fresh.signals()))


def test_a_state_with_impossible_spans_or_positions_is_refused(models):
    c = context(models["llama"], "shotkv:window=8,recent=8")
    c.set_spans([(10, 50)])
    c.decode(ids(60))
    c.evict()
    data, d = c.save(), context(models["llama"], "shotkv:window=8,recent=8")
    kept = c.kept()[0][0].astype(np.int32)  # of the first head of the first layer, as they stand in the file
    for good, bad in ((np.array([10, 50], np.int32), np.array([50, 10], np.int32)), (kept, kept[::-1]), (kept, kept + 60)):
        assert data.count(good.tobytes()) >= 1
        with pytest.raises(ValueError, match="damaged"):
            d.load(data.replace(good.tobytes(), bad.tobytes(), 1))
    d.load(data)


def test_a_context_that_was_refused_leaves_its_policy_to_no_other(models):
    with pytest.raises(ValueError, match="flash"):
        context(models["llama"], flash_attn="off", type_v="q8_0")
    assert context(models["llama"], None, "").policy == "full"


def test_layers_with_other_numbers_of_heads(tmp_path):
    """Without a policy they are llama.cpp's own business, and kept() says what each holds; no policy evicts there."""
    model = _core.Model(str(tiny.write(tmp_path/"openelm.gguf", "openelm")))
    c = context(model, "full", "")
    c.decode(ids(30))
    assert [k.shape for k in c.kept()] == [(2, 30), (1, 30), (2, 30)] and (c.kept()[1] == range(30)).all()
    assert c.stats()["kept"] == [30]*3
    with pytest.raises(ValueError, match="KV heads"):
        context(model)


def test_a_layer_without_kv_heads(tmp_path):
    model = _core.Model(str(tiny.write(tmp_path/"deci.gguf", "deci")))
    c = context(model, "full", "")
    c.decode(ids(30))
    assert [k.shape for k in c.kept()] == [(2, 30), (0, 0), (2, 30)]
    assert c.stats()["kept"] == c.seq_stats()["kept"] == [30, 0, 30]
    with pytest.raises(ValueError, match="KV heads"):
        context(model)


@pytest.mark.parametrize("first, then, why", [
    (b"pyramidkv:window=32", b"chunkkv:reuse=2", "same tokens in every head"),
    (b"adakv:window=32", b"snapkv:window=32", "heads .* hold different ones: go on with adakv"),
])
def test_a_policy_that_cannot_go_on_from_another(tmp_path, first, then, why):
    import ctypes

    from pykvc import llama_cpp
    lib = ctypes.CDLL(str(next(llama_cpp.LIB.glob("libllama.*"))))
    lib.kvc_set_policy.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p]
    llm = llama_cpp.Llama(str(tiny.write(tmp_path/"llama.gguf")), n_ctx=512, n_ubatch=64, kv_policy=first.decode(), kv_budget=64, verbose=False, flash_attn=True)
    llm.eval(ids(200).tolist())
    assert llm._kv.ctx.evict()
    before = llm._kv.ctx.kept()
    assert lib.kvc_set_policy(llm._ctx.ctx, 0, then, b"48", None) == 0
    with pytest.raises(ValueError, match=why):
        llm._kv.ctx.evict()
    assert all(map(np.array_equal, before, llm._kv.ctx.kept()))
    llm.close()


def test_too_many_cells(models):
    with pytest.raises(ValueError, match="n_seq_max 256"):
        context(models["llama"], n_ctx=1 << 24, n_seq_max=256)


@pytest.mark.parametrize("part, why", [(0.5, "not within the file"), (0.01, "not within the file|remaining file size|header"), (0, "magic")])
def test_a_truncated_model(tmp_path, part, why):
    whole, cut = tiny.write(tmp_path/"whole.gguf").read_bytes(), tmp_path/"cut.gguf"
    cut.write_bytes(whole[:int(part*len(whole))])
    with pytest.raises(ValueError, match=f"is not a GGUF model llama.cpp can load: .*({why})"):
        pykvc.LLM(cut, n_ctx=256)


def test_a_model_without_a_tokenizer_takes_tokens(models):
    with pytest.raises(ValueError, match="no tokenizer"):
        models["llama"].tokenize(b"text")


def test_sums_where_the_sequences_do_not_divide_a_ubatch(models):
    """llama.cpp reserves a graph for a multiple of the sequences: 66 tokens here."""
    c = context(models["llama"], "h2o", n_ctx=1536, n_seq_max=3, flash_attn="off")
    for seq in range(3):
        c.decode(ids(100, seq), seq)
        assert c.evict(seq)
    assert all(np.isclose(layer["sums"].sum(), 2*24, rtol=1) for layer in c.signals())
