"""Layers whose memory is not the host's, on a device that the CPU plays (tests/stock/counting.cpp): what is kept, and
what crosses."""
import counting
import gguf
import hypothesis.strategies as st
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings

import pykvc
from pykvc import _core

N, BUDGET, BLOCK = 700, 300, 256
EVICTS = [p["name"] for p in pykvc.policies() if not p["heads_differ"] and p["name"] != "full"]
PLAIN = [name for name in EVICTS if next(p for p in pykvc.policies() if p["name"] == name)["needs"]["probe"] == "none"]
DIFFER = ["adakv:window=8,kernel=1,alpha=0", "keydiff:share=all", "snapkv:window=8,kernel=1,share=layer", "h2o:share=all"]  # heads of a layer
TOKENS = np.random.default_rng(5).integers(1, 100, 4*N).astype(np.int32)


@pytest.fixture(scope="module")
def device():
    with counting.registered() as found:
        yield found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("offload")/"llama.gguf", n_layer=4)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Heads of 64, whose rows are whole numbers of I32 in every type."""
    return tiny.write(tmp_path_factory.mktemp("offload")/"wide.gguf", n_layer=4, head_dim=64)


def context(path, policy, n_gpu_layers=99, budget=str(BUDGET), **how):
    model = _core.Model(str(path), n_gpu_layers=n_gpu_layers)
    ctx = _core.Context(model, **{"n_ctx": 2048, "n_ubatch": 128, "n_threads": 1, **how}, policy=policy, budget=budget)
    if str(policy).partition(":")[0] in ("shotkv", "random_shot"):
        ctx.set_spans([(i, i + 20) for i in range(0, N - 40, 20)])
    return ctx


def held(ctx):
    """Slots of each head: [n_layer, n_head_kv]."""
    return np.array([(layer >= 0).sum(axis=1) for layer in ctx.kept()])


def in_blocks(ctx):
    """Views of the cache off the host begin at whole blocks."""
    n = held(ctx)
    return not ((n.max() - n) % BLOCK).any()


@pytest.mark.parametrize("n_gpu_layers", [99, 2])
@pytest.mark.parametrize("policy", PLAIN + DIFFER)
def test_what_is_kept_is_what_the_scores_say(device, path, policy, n_gpu_layers):
    ctx = context(path, policy, n_gpu_layers)
    on_spans = policy in ("shotkv", "random_shot")  # whose spans are of the first turn, and not known to plan()
    for step in range(1 if on_spans else 2):
        ctx.decode(TOKENS[N*step:N*(step + 1)])
        pos, scores = ctx.kept(), ctx.scores()
        assert ctx.evict() and in_blocks(ctx)
        if not on_spans:
            for il, (kept, slots) in enumerate(zip(ctx.kept(), _core.plan(ctx.policy, pos, scores, BUDGET, n_block=BLOCK))):
                expected = np.where(slots < 0, -1, np.take_along_axis(pos[il], slots, axis=1))
                np.testing.assert_array_equal(kept, expected, err_msg=f"layer {il}")
    ctx.decode(TOKENS[:3])
    assert np.isfinite(ctx.logits()).all()


@pytest.mark.parametrize("policy", ["streaming_llm", "h2o", "random_head"])
def test_kept_as_on_the_host(device, path, policy):
    kept = []
    for n_gpu_layers in (0, 2, 99):
        ctx = context(path, policy, n_gpu_layers)
        ctx.decode(TOKENS[:N])
        ctx.evict()
        kept.append(ctx.kept())
    for others in kept[1:]:
        for a, b in zip(kept[0], others):
            same = np.mean([len(np.intersect1d(x, y))/len(x) for x, y in zip(a, b)])
            assert same == 1 if policy != "h2o" else same > 0.98  # sums round


CACHES = ["f16", "f32", "bf16", "q8_0", "q5_1", "q4_0"]


@pytest.mark.parametrize("policy, cache", [  # h2o runs without flash attention, which a quantized V needs
    *[(policy, cache) for policy in ("snapkv:window=8", "knorm:share=layers", "pyramidkv:window=8", "adakv:window=8") for cache in CACHES],
    *[("h2o", cache) for cache in CACHES if not cache.startswith("q")]])
def test_a_graph_moves_the_bytes_that_the_host_would(device, wide, policy, cache):
    """Whatever the type of the cache, with values transposed (h2o) or not. pretend_lacking() has rows moved through the
    host."""
    states, read = [], []
    for lacking in ([], ["GET_ROWS"]):
        ctx = context(wide, policy, type_k=cache, type_v=cache)
        ctx.decode(TOKENS[:N])
        _core.pretend_lacking(lacking)
        try:
            device.reset()
            assert ctx.evict()
            read.append(device.read)
        finally:
            _core.pretend_lacking([])
        ctx.decode(TOKENS[N:N + 5])
        states.append((ctx.save(), ctx.logits().tobytes()))
    assert states[0] == states[1]
    rows = 4*N*2*2*64*{"f16": 2, "f32": 4, "bf16": 2, "q8_0": 34/32, "q5_1": 24/32, "q4_0": 18/32}[cache]
    assert read[1] > read[0] + rows/3


@pytest.mark.parametrize("policy", ["streaming_llm", "random", "snapkv:window=8", "tova", "h2o", "pyramidkv:window=8", "chunkkv:window=8", "shotkv:window=8",
                                    "pyramidinfer:window=64", "knorm", "keydiff", "expected_attention:window=16", *DIFFER])
def test_scores_cross_and_rows_do_not(device, path, policy):
    n_head, n_layer = 4, 4
    ctx = context(path, policy)
    ctx.decode(TOKENS[:N])
    device.reset()
    assert ctx.evict()
    window = 16*n_head*32*2 if policy.startswith("expected") else 0  # of queries, which are fitted on the host
    norms = 2*N*4 if policy.startswith("expected") else 0
    assert device.read <= n_layer*(n_head*N*4 + window + norms + 64)


class Given(pykvc.Policy):
    """Heads keep the slots it is told to, -1s first."""
    name, heads_differ = "given", True

    def __init__(self, slots):
        self.slots = slots

    def score(self, layer):
        return np.zeros((layer.n_head_kv, layer.n_kv), np.float32)

    def budgets(self, request):
        return [x.shape[1] for x in self.slots]

    def keep(self, il, request, n_keep):
        return self.slots[il]


@pytest.mark.parametrize("how", [{}, {"type_k": "q8_0", "type_v": "q8_0"}, {"flash_attn": "off"}])
@pytest.mark.parametrize("n_gpu_layers", [99, 2])
def test_heads_that_differ_answer_as_on_the_host(device, path, n_gpu_layers, how):
    """The same sets, in two sequences of different lengths, a second prompt and single tokens: but for rounding."""
    rng = np.random.default_rng(0)

    def some(n, n_most):  # of n slots: heads of n_most and of one and two blocks less, the last ten in each
        def head(n_less):
            return [-1]*n_less + sorted([*rng.choice(n - 10, n_most - n_less - 10, replace=False), *range(n - 10, n)])
        return [np.array([head(BLOCK*((il + h) % 3)) for h in range(2)], np.int32) for il in range(4)]

    how = {"n_seq_max": 2, "n_ctx": 4096, **how}
    given = Given([])
    contexts = [context(path, given, layers, **how) for layers in (n_gpu_layers, 0)]
    logits = [[], []]

    def decode(tokens, seq):
        for ctx, rows in zip(contexts, logits):
            ctx.decode(tokens, seq)
            rows.append(ctx.logits().copy())

    for seq, n, n_most in ((0, N, 560), (1, N + 300, 640)):
        decode(TOKENS[:n], seq)
        given.slots = some(n, n_most)
        assert all(ctx.evict(seq) for ctx in contexts)
        decode(TOKENS[n:n + 20], seq)
    for token in TOKENS[:4]:
        for seq in (0, 1):
            decode(np.array([token], np.int32), seq)
    assert np.ptp(held(contexts[0]), axis=1).max() == 2*BLOCK and in_blocks(contexts[0])
    np.testing.assert_allclose(*logits, atol=0.1)


def test_heads_of_any_length_are_refused_there(device, path):
    """A policy of one's own that keeps whatever it likes: the cache stays as it was."""
    slots = [np.stack([np.arange(40), np.where(np.arange(40) < 7, -1, np.arange(40))]).astype(np.int32)]*4
    ctx = context(path, Given(slots))
    ctx.decode(TOKENS[:N])
    with pytest.raises(ValueError, match="whole blocks of 256.*40 and 33.*n_gpu_layers 0"):
        ctx.evict()
    assert (held(ctx) == N).all()
    ctx.decode(TOKENS[:3])


POOLED = ["keydiff:share=layers", "snapkv:window=8,share=layers", "keydiff:share=all", "adakv:window=8,kernel=1,alpha=0"]


@pytest.mark.parametrize("cache", ["f16", "q8_0"])
@pytest.mark.parametrize("policy", POOLED)
def test_a_pool_answers_as_rows_of_their_own_do(device, path, policy, cache):
    """Two sequences, whose layers and heads draw their rows from one pool (cells). Their prompts fit, so both keep the
    same."""
    how = {"n_seq_max": 2, "n_ctx": 4096, "type_k": cache, "type_v": cache}
    pooled, plain = context(path, policy, cells="1536", **how), context(path, policy, **how)
    for seq, n in ((0, N), (1, N + 300), (0, 200)):
        for ctx in (pooled, plain):
            ctx.begin_prompt(seq)
            ctx.decode(TOKENS[:n], seq)
        assert all(ctx.evict(seq) for ctx in (pooled, plain)) and in_blocks(pooled)
        assert all(map(np.array_equal, pooled.kept(seq), plain.kept(seq)))
        for other in (0, 1):
            for ctx in (pooled, plain):
                ctx.decode(TOKENS[n:n + 20], other)
            np.testing.assert_allclose(pooled.logits(), plain.logits(), atol=2e-2)
    assert pooled.stats()["bytes_allocated"] < plain.stats()["bytes_allocated"]/2
    pooled.clear(1)
    pooled.copy(0, 1)
    for seq in (0, 1):
        pooled.decode(TOKENS[20:25], seq)
        plain.decode(TOKENS[20:25], 0) if seq == 0 else None
        np.testing.assert_allclose(pooled.logits(), plain.logits(), atol=2e-2)


def test_a_head_that_wins_every_ranking_has_no_more_rows_than_there_are(device, tmp_path):
    """Its keys are short, which knorm keeps: cut to what kv_cells have, heads still differ by blocks."""
    path = tiny.write(tmp_path/"llama.gguf", n_layer=4)
    weights = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "blk.1.attn_k.weight")
    weights.data[:32] *= 0.05
    weights.data.flush()
    ctx = context(path, "knorm:share=all", budget="", cells="768", n_ctx=1024, n_ubatch=64)
    for i in range(0, 1024, 64):
        ctx.decode(TOKENS[i:i + 64])
        assert in_blocks(ctx)
    assert ctx.stats()["n_evictions"] > 2


@pytest.mark.parametrize("policy", DIFFER)
def test_less_and_less(device, path, policy):
    """Heads that differ already, which hold less than a block above the others' blocks."""
    ctx = context(path, policy)
    ctx.decode(TOKENS[:1400])
    before = held(ctx)
    for budget in ("1100", "700", "420", "260", "130", "70", "40"):
        ctx.set_budget(budget, "")
        ctx.evict()  # not where blocks have left less already
        assert in_blocks(ctx) and (held(ctx) <= before).all() and held(ctx).min() > 0
        assert held(ctx).sum() <= int(budget)*before.size
        before = held(ctx)
    ctx.decode(TOKENS[:20])


@pytest.mark.parametrize("policy, cells", [("adakv:window=8,kernel=1,alpha=0", ""), ("adakv:window=8,kernel=1,alpha=0", "1536"), ("keydiff:share=all", "")])
def test_a_state_of_a_cache_on_the_host_has_no_blocks(device, path, policy, cells):
    host, there = context(path, policy, n_gpu_layers=0, cells=cells), context(path, policy, cells=cells)
    host.decode(TOKENS[:N])
    host.evict()
    assert not in_blocks(host)
    with pytest.raises(ValueError, match="saved on the CPU"):
        there.load_seq(host.save_seq())
    there.decode(TOKENS[:N])
    assert there.evict() and in_blocks(there)


SEQ = st.integers(0, 1)
STEPS = st.lists(st.one_of(
    st.tuples(st.just("decode"), SEQ, st.sampled_from([1, 3, 90, 400, 700])), st.tuples(st.just("evict"), SEQ, st.just(0)),
    st.tuples(st.just("tail"), SEQ, st.integers(1, 60)), st.tuples(st.just("copy"), SEQ, st.just(0)),
    st.tuples(st.just("state"), SEQ, st.just(0)), st.tuples(st.just("clear"), SEQ, st.just(0))), min_size=6, max_size=16)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, policy=st.sampled_from(POOLED), n_gpu_layers=st.sampled_from([99, 0]))
def test_whatever_is_done_to_a_pool(device, path, steps, policy, n_gpu_layers):
    """As to rows of their own: the same slots, the same logits but for rounding."""
    how = {"n_seq_max": 2, "n_ctx": 4096}
    contexts = [context(path, policy, n_gpu_layers, cells="1792", **how), context(path, policy, n_gpu_layers, **how)]
    for step, seq, n in steps:
        told = []
        for ctx in contexts:
            last = ctx.pos_max(seq)
            try:
                if step == "decode" and last + n < 1400:  # no eviction in mid-prompt
                    ctx.decode(TOKENS[last + 1:last + 1 + n], seq)
                    told.append(ctx.logits().copy())
                elif step == "evict":
                    ctx.begin_prompt(seq)
                    told.append(ctx.evict(seq))
                elif step == "tail":
                    told.append(ctx.remove_tail(max(last - n, 0), seq))
                elif step == "copy" and last >= 0:
                    ctx.clear(1 - seq)
                    ctx.copy(seq, 1 - seq)
                elif step == "state" and last >= 0:
                    ctx.load_seq(ctx.save_seq(seq), 1 - seq)
                elif step == "clear":
                    ctx.clear(seq)
            except ValueError as error:  # a window whose queries were removed
                told.append(str(error))
        if step == "decode" and told:
            np.testing.assert_allclose(*told, atol=2e-2)
        else:
            assert told[:1] == told[1:]
        for s in (0, 1):
            assert all(map(np.array_equal, *(ctx.kept(s) for ctx in contexts)))
    assert n_gpu_layers == 0 or in_blocks(contexts[0])


@pytest.mark.parametrize("policy", POOLED)
def test_a_pool_that_is_too_small_for_the_prompt(device, path, policy):
    """It is evicted in mid-prompt. Rows that a graph moves are the ones that the host would, and do not cross. A state
    has them all, and goes on the same."""
    states, read = [], []
    for lacking in ([], ["GET_ROWS"]):
        ctx = context(path, policy, cells="768", n_ctx=4096)
        _core.pretend_lacking(lacking)
        try:
            for token in range(0, 2500, 500):
                ctx.decode(TOKENS[token:token + 500])
                assert in_blocks(ctx) and held(ctx).sum() <= 768*8
            device.reset()
            assert ctx.evict()
            read.append(device.read)
            ctx.decode(TOKENS[:40])
        finally:
            _core.pretend_lacking([])
        assert ctx.stats()["n_evictions"] > 3 and np.isfinite(ctx.logits()).all()
        states.append((ctx.save(), ctx.logits().tobytes()))
    assert states[0] == states[1] and read[1] > 2*read[0]
    again = context(path, policy, cells="768", n_ctx=4096)
    again.load(states[0][0])
    for x in (ctx, again):
        x.decode(TOKENS[:200])
    np.testing.assert_array_equal(ctx.logits(), again.logits())
    assert all(x.remove_tail(x.pos_max() - 100) for x in (ctx, again)) and all(map(np.array_equal, ctx.kept(), again.kept()))
    with pytest.raises(ValueError, match="damaged"):
        again.load(states[0][0][:-5000])
    again.decode(TOKENS[:40])
    assert again.pos_max() == 39 and np.isfinite(again.logits()).all()


@pytest.mark.parametrize("how, why", [({"n_gpu_layers": 2}, "only on one device"), ({"flash_attn": "off"}, "only with flash attention")])
def test_where_there_is_no_pool(device, path, how, why, capfd):
    for policy in ("adakv:window=8", "keydiff:share=all"):
        with pytest.raises(ValueError, match=why):
            context(path, policy, cells="512", **how)
    assert "share=head" in context(path, "keydiff", cells="512", **how).policy


def test_a_cache_that_stays_on_the_host(device, path):
    ctx = context(path, "snapkv:window=8", offload_kqv=False)
    there = context(path, "snapkv:window=8", 0)
    for c in (ctx, there):
        c.decode(TOKENS[:N])
    device.reset()
    assert ctx.evict() and there.evict() and device.read == 0
    same = [len(np.intersect1d(a, b))/a.size for x, y in zip(ctx.kept(), there.kept()) for a, b in zip(x, y)]
    assert np.mean(same)*2 > 0.95


def test_layers_differ_by_blocks_over_many_turns(device, path):
    """Ratios, whose longest layer has another length at each turn: views would begin anywhere without rounding."""
    for n_gpu_layers in (99, 2):
        ctx = context(path, "pyramidkv:window=8,beta=8", n_gpu_layers, budget="40%", n_ctx=4096)
        for turn in range(6):
            ctx.begin_prompt()
            ctx.decode(TOKENS[turn*410:(turn + 1)*410 - 37*turn])
            ctx.evict()
            assert in_blocks(ctx), (n_gpu_layers, turn, ctx.seq_stats()["kept"])
            ctx.end_prompt()
            for token in TOKENS[:3]:
                ctx.decode(np.array([token], np.int32))
        assert np.isfinite(ctx.logits()).all()


@pytest.mark.parametrize("policy", ["snapkv:window=8", "h2o", "keydiff:share=layers", *DIFFER])
def test_states_tails_and_copies(device, path, policy):
    ctx = context(path, policy, n_seq_max=2, n_ctx=1024)
    ctx.decode(TOKENS[:N])
    ctx.evict()
    state = ctx.save_seq()
    ctx.decode(TOKENS[:20])
    expected = ctx.logits().copy()
    if not policy.startswith("h2o"):  # whose sums cannot be taken back
        assert ctx.remove_tail(N)
        ctx.decode(TOKENS[:20])
        np.testing.assert_allclose(ctx.logits(), expected, atol=2e-2)
    ctx.load_seq(state, 1)
    ctx.decode(TOKENS[:20], 1)
    np.testing.assert_allclose(ctx.logits(), expected, atol=2e-2)
    ctx.clear(0)
    ctx.copy(1, 0)
    ctx.decode(TOKENS[20:25], 0)
    again = ctx.logits().copy()
    ctx.decode(TOKENS[20:25], 1)
    np.testing.assert_allclose(ctx.logits(), again, atol=2e-2)


@pytest.fixture(scope="module")
def wordy(tmp_path_factory):
    """With as many tokens as a small model knows: llama.cpp's compute buffer is then of its usual size."""
    return tiny.write(tmp_path_factory.mktemp("offload")/"wordy.gguf", n_layer=2, n_vocab=32768)


@pytest.mark.parametrize("policy", PLAIN + DIFFER)
def test_an_eviction_takes_no_memory_that_was_not_reserved(device, wordy, policy):
    """It computes in llama.cpp's compute buffer, which is there from the beginning, and which --fit counts."""
    ctx = context(wordy, policy, n_ubatch=512)
    reserved = device.allocated
    ctx.decode(TOKENS[:N])
    assert ctx.evict()
    ctx.decode(TOKENS[:30])
    assert device.allocated - reserved < 2**20


@pytest.mark.parametrize("policy", ["pyramidinfer", "snapkv:window=1024"])
def test_the_workspace_does_not_grow_with_the_context(device, tmp_path, policy):
    path = tiny.write(tmp_path/"long.gguf", n_layer=1, n_ctx=65536)
    grown = []
    for n in (8192, 32768):
        ctx = context(path, policy, budget="2048", n_ctx=n, n_ubatch=512)
        ctx.decode(np.tile(TOKENS, 12)[:n - 600])
        before = device.allocated
        assert ctx.evict()
        grown.append(device.allocated - before)
        del ctx
    assert max(grown) < 80*2**20  # of 32 MiB for probabilities; all of them would be 134 MB a window of 256


@pytest.mark.parametrize("policy, n", [("snapkv:window=8", 0), ("keydiff:share=head", 0), ("pyramidkv:window=8", 1)])
def test_a_rollback_reserves_nothing_where_layers_are_alike(path, policy, n):
    ctx = context(path, policy, 0)
    ctx.decode(TOKENS[:N])
    ctx.evict()
    ctx.decode(TOKENS[:9])
    lines = []
    _core.set_log(lambda level, text: lines.append(text))
    try:
        for _ in range(3):
            ctx.remove_tail(N + 4)
            ctx.decode(TOKENS[4:9])
    finally:
        _core.set_log(None)
    assert bool(sum("graph_reserve" in line for line in lines)) == bool(n), lines


@pytest.mark.parametrize("decode", ["2147483647", "2147483000"])
def test_a_limit_as_large_as_an_int_evicts_nothing(path, decode):
    ctx = _core.Context(_core.Model(str(path)), n_ctx=1024, policy="tova:interval=8", budget="300", decode_budget=decode)
    ctx.decode(TOKENS[:400])
    ctx.evict()
    ctx.end_prompt()
    for i in range(40):
        ctx.decode(TOKENS[i:i + 1])
    assert ctx.n_evictions() == 1 and ctx.seq_stats()["cells"] == 340
