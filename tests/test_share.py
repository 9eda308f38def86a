"""share=: one ranking over the heads of a layer, of all layers, or of each layer's length. Against the oracle, on
made-up scores and a model."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import pykvc
from pykvc import _core
from test_policies import oracle_of

N_LAYER, N_HEAD_KV = 5, 3
SHARING = [p["name"] for p in _core.policies() if p["share"]]
SHARES = ["layers", "layer", "all"]


def made_up(seed, n, sharp=3.0):
    """Scores whose layers and heads deserve different numbers; quarters, so that many are equal."""
    rng = np.random.default_rng(seed)
    pos = [np.tile(np.arange(n, dtype=np.int32), (N_HEAD_KV, 1)) for _ in range(N_LAYER)]
    scale = rng.gamma(1 / sharp, size=(N_LAYER, N_HEAD_KV, 1))
    return pos, [(np.round(16 * scale[il] * rng.random((N_HEAD_KV, n))) / 4).astype(np.float32) for il in range(N_LAYER)]


def expected(spec, pos, scores, budget, share):
    return oracle.shared(oracle_of(spec), pos, scores, budget, share)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", SHARING)
def test_plan_is_the_oracles(name, share):
    for seed, n, budget in ((0, 90, 41), (1, 333, 70), (2, 200, 150)):
        pos, scores = made_up(seed, n)
        kept = _core.plan(f"{name}:share={share}", pos, scores, budget)
        for il, (a, b) in enumerate(zip(kept, expected(name, pos, scores, budget, share))):
            np.testing.assert_array_equal(a, b, err_msg=f"layer {il}")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(60, 400), part=st.floats(0, 1), name=st.sampled_from(SHARING), share=st.sampled_from(SHARES),
       sharp=st.sampled_from([0.5, 3.0, 20.0]))
def test_every_share_takes_the_budget_and_no_more(seed, n, part, name, share, sharp):
    pos, scores = made_up(seed, n, sharp)
    budget = 40 + int(part * (n - 40))
    kept = _core.plan(f"{name}:share={share}", pos, scores, budget)
    n_held = [int((x >= 0).sum()) for x in kept]
    assert sum(n_held) == N_LAYER * N_HEAD_KV * budget
    if share == "layers":
        assert all((x >= 0).all() for x in kept)
    if share == "layer":
        assert set(n_held) == {N_HEAD_KV * budget}
    for layer in kept:
        for head in layer:
            assert (np.diff(head[head >= 0]) > 0).all() and head.max() < n


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("weights", [[1]*N_LAYER, [1 + il for il in range(N_LAYER)], [100] + [0.5]*(N_LAYER - 1)])
def test_weights_of_layers_are_the_oracles(name, weights):
    """kvpress' PerLayerCompressionPress: however the scores are, each layer has its part."""
    spec = f"{name}:share={'/'.join(map(str, weights))}"
    for seed, n, budget in ((0, 90, 41), (1, 333, 70), (2, 200, 150)):
        pos, scores = made_up(seed, n)
        kept = _core.plan(spec, pos, scores, budget)
        for il, (a, b) in enumerate(zip(kept, oracle.weighted(oracle_of(name), pos, scores, budget, weights))):
            np.testing.assert_array_equal(a, b, err_msg=f"layer {il}")
        assert sum(x.shape[1] for x in kept) == N_LAYER*budget
        if len(set(weights)) == 1:
            even = _core.plan(f"{name}:share=head", pos, scores, budget)
            assert [x.tolist() for x in kept] == [x.tolist() for x in even]


def test_weights_have_one_spelling():
    assert _core.parse_spec("knorm:share=2.0/1/0.50") == _core.parse_spec("knorm:share=2/1/.5")
    assert "share=2/1/0.5" in _core.parse_spec("knorm:share=2.0/1/0.50")


def test_a_layer_gets_what_its_scores_deserve():
    """Two layers of 100 tokens, a budget of 50: the second one's scores are above all of the first one's."""
    pos, rng = [np.tile(np.arange(100, dtype=np.int32), (2, 1))] * 2, np.random.default_rng(0)
    scores = [rng.random((2, 100)).astype(np.float32), 2 + rng.random((2, 100)).astype(np.float32)]
    n_keep = lambda share: [(x >= 0).sum()/2 for x in _core.plan(f"kvzip:share={share},sinks=0,recent=0", pos, scores, 50)]
    assert n_keep("head") == [50, 50] and n_keep("layers") == [1, 99]  # min_budget: no layer is left without a token
    assert n_keep("all") == [1, 99] and n_keep("layer") == [50, 50]


def test_what_is_empty_is_passed_over():
    """A head that lost slots at an earlier eviction cannot keep them again, and its first tokens are those that it
    holds."""
    pos, scores = made_up(5, 120)
    for il in range(N_LAYER):
        pos[il][1, :60], scores[il][1, :60] = -1, -np.inf
    for share in SHARES[1:]:
        kept = _core.plan(f"kvzip:share={share},sinks=2,recent=4", pos, scores, 40)
        assert all((x[1][x[1] >= 0] >= 60).all() and set(x[1]) >= {60, 61} for x in kept)
        for a, b in zip(kept, oracle.shared(oracle.kvzip(sinks=2, recent=4), pos, scores, 40, share)):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("spec,named", [
    ("kvzip:share=heads", ["share", "head", "layers", "layer", "all"]), ("kvzip:count=cells", ["kvzip", "no parameter 'count'"]),
    ("streaming_llm:share=layers", ["streaming_llm", "cannot share", "kvzip", "snapkv"]), ("random:share=all", ["random", "cannot share"]),
    ("shotkv:share=layer", ["cannot share"]), ("pyramidkv:share=layers", ["cannot share"]), ("snapkv:share=1/0/1", ["weights", "above 0"]),
    ("snapkv:share=1/", ["weights"]), ("snapkv:share=1/x", ["weights"]), ("snapkv:share=3", ["head", "layers"]), ("streaming_llm:share=1/2", ["cannot share"]),
])
def test_a_share_that_cannot_be_is_refused(spec, named):
    with pytest.raises(ValueError) as error:
        _core.parse_spec(spec)
    assert [word for word in named if word not in str(error.value)] == []


def test_a_budget_below_what_every_head_keeps():
    pos, scores = made_up(0, 90)
    for share in SHARES:
        with pytest.raises(ValueError, match="least that works is 37"):
            _core.plan(f"kvzip:share={share}", pos, scores, 30)


# -- on a model -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model(model_path):
    return _core.Model(str(model_path))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["snapkv", "keydiff"])
def test_evict_keeps_what_the_oracle_keeps(model, name, share):
    tokens = np.random.default_rng(3).integers(0, 40000, 400, dtype=np.int32)
    ctx = _core.Context(model, n_ctx=512, policy=f"{name}:share={share}", budget="100")
    for step in range(2):  # the second time heads and layers hold different tokens already
        ctx.decode(tokens[250*step:250*step + 200])
        pos, scores = ctx.kept(), ctx.scores()
        assert ctx.evict()
        for il, (kept, slots) in enumerate(zip(ctx.kept(), expected(name, pos, scores, 100, share))):
            by_slot = np.take_along_axis(pos[il], np.maximum(slots, 0), axis=1)
            np.testing.assert_array_equal(kept, np.where(slots < 0, -1, by_slot), err_msg=f"step {step}, layer {il}")
    assert not ctx.evict()  # it holds its budget
    n_held = sum(int((x >= 0).sum()) for x in ctx.kept())
    assert n_held == 100*len(pos)*model.n_head_kv
    assert ctx.stats()["bytes_used"] == n_held*ctx.stats()["bytes_full"]//(350*len(pos)*model.n_head_kv)  # a head takes what it holds
    ctx.decode(tokens[:5])
    assert np.isfinite(ctx.logits()).all()


def test_weights_on_a_model(model):
    n_layer = model.n_layer
    weights = "/".join(str(1 + il % 3) for il in range(n_layer))
    ctx = _core.Context(model, n_ctx=512, policy=f"keydiff:share={weights}", budget="100")
    ctx.decode(np.arange(1000, 1300, dtype=np.int32))
    assert ctx.evict()
    lengths = [x.shape[1] for x in ctx.kept()]
    assert sum(lengths) == 100*n_layer and lengths[2] == pytest.approx(3*lengths[0], abs=3)
    with pytest.raises(ValueError, match=f"2 weights, but {n_layer} layers"):
        _core.Context(model, n_ctx=512, policy="keydiff:share=1/2", budget="100")
    with pytest.raises(ValueError, match="2 weights"):
        ctx.set_policy("keydiff:share=1/2", "100")


def test_share_of_a_policy_in_python(model_path):
    class Keys(pykvc.Policy):
        name, keys, share = "keys_apart", True, "layers"

        def score(self, layer):
            return -np.linalg.norm(layer.keys, axis=-1)

    with pykvc.LLM(model_path, n_ctx=512, kv_policy=Keys(), kv_budget=60) as llm:
        llm.prefill(tokens=list(range(1000, 1300)))
        llm.compress()
        lengths = [x.shape[1] for x in llm.kept()]
        assert sum(lengths) == 60*len(lengths) and len(set(lengths)) > 3
        pos = [np.tile(np.arange(300, dtype=np.int32), (x.shape[0], 1)) for x in llm.kept()]
    with pykvc.LLM(model_path, n_ctx=512, kv_policy="knorm:share=layers", kv_budget=60) as llm:
        llm.prefill(tokens=list(range(1000, 1300)))
        llm.compress()
        assert [x.shape[1] for x in llm.kept()] == lengths and len(pos) == len(lengths)


@pytest.mark.parametrize("n_block", [16, 64, 256])
@pytest.mark.parametrize("budget", [100, 300, 700])
def test_whole_blocks_take_no_more_than_the_budget(n_block, budget):
    """A GPU's layers differ by whole blocks; together they hold what layers of any length do, but for less than a slot
    a layer."""
    rng, n_layer, n_kv = np.random.default_rng(budget + n_block), 9, 1000
    pos = [np.tile(np.arange(n_kv, dtype=np.int32), (2, 1))]*n_layer
    scores = [(rng.random((2, n_kv))*rng.uniform(0.5, 2)).astype(np.float32) for _ in range(n_layer)]
    spec = "snapkv:share=layers,window=8"
    exact = np.array([x.shape[1] for x in _core.plan(spec, pos, scores, budget)])
    blocks = np.array([x.shape[1] for x in _core.plan(spec, pos, scores, budget, n_block=n_block)])
    assert len(set(exact)) > 2 and exact.sum() == n_layer*budget
    assert not ((blocks.max() - blocks) % n_block).any() and blocks.min() >= min(exact.min(), 9)
    if blocks.min() > 9 + n_block:  # nothing stands in the way of rounding down
        assert n_layer*budget - 2*n_layer < blocks.sum() <= n_layer*budget
    assert blocks.sum() <= n_layer*(budget + n_block) and (abs(blocks - exact) < 2*n_block).all()


@pytest.mark.parametrize("n_block", [16, 64])
@pytest.mark.parametrize("spec", ["keydiff:share=all", "snapkv:share=layer,window=8", "adakv:window=8"])
def test_whole_blocks_of_heads_take_no_more_than_the_budget(spec, n_block):
    """Where heads differ, they do; each keeps its best, and as many as before but for two blocks."""
    rng, n_layer, n_kv, budget = np.random.default_rng(n_block), 5, 1000, 300
    pos = [np.tile(np.arange(n_kv, dtype=np.int32), (4, 1))]*n_layer
    scores = [(rng.random((4, n_kv))*rng.uniform(0.5, 2, (4, 1))).astype(np.float32) for _ in range(n_layer)]
    plans = [_core.plan(spec, pos, scores, budget, n_block=n) for n in (1, n_block)]
    exact, blocks = (np.array([(x >= 0).sum(axis=1) for x in plan]) for plan in plans)
    assert exact.sum() == 4*n_layer*budget and np.ptp(exact, axis=1).min() > n_block
    assert not ((blocks.max() - blocks) % n_block).any() and (abs(blocks - exact) < 2*n_block).all()
    assert 4*n_layer*(budget - 1) <= blocks.sum() <= 4*n_layer*budget
    for one, other in zip(*plans):
        for a, b in zip(one, other):
            assert np.isin(a[a >= 0], b).all() or np.isin(b[b >= 0], a).all()


def test_a_python_policy_with_rules_of_its_own_cannot_share():
    class Own(pykvc.Policy):
        name, share = "own_rule", "layers"

        def score(self, layer):
            return np.zeros((layer.n_head_kv, layer.n_kv), np.float32)

        def budgets(self, request):
            return [request.budget]*len(request.layers)

    with pytest.raises(ValueError, match="budgets.*share"):
        pykvc.LLM(kv_policy=Own(), kv_budget=60)


def test_generated_tokens_stay_where_heads_differ(model):
    with pytest.raises(ValueError, match="share=all.*share=head and layers"):
        _core.Context(model, n_ctx=256, policy="keydiff:share=all", budget="64", decode_budget="32")
    ctx = _core.Context(model, n_ctx=256, policy="keydiff:share=layers,interval=8", budget="64", decode_budget="16")
    ctx.decode(np.arange(2000, 2150, dtype=np.int32))
    ctx.evict()
    ctx.end_prompt()
    for i in range(60):
        ctx.decode(np.array([3000 + i], np.int32))
    n = [x.shape[1] for x in ctx.kept()]
    assert 64 + 16 <= sum(n)/len(n) <= 64 + 16 + 8 and len(set(n)) > 3


@pytest.mark.parametrize("cells", ["", "256"])
@pytest.mark.parametrize("policy", ["keydiff", "snapkv:share=layers", "pyramidkv", "keydiff:share=all", "snapkv:share=layer", "adakv"])
def test_sequences_whose_layers_differ_are_as_if_alone(model_path, policy, cells):
    """Several at once, of different lengths and budgets: the cells of each are those of one alone, and so are the
    logits of one token. With kv_cells each has a pool of its own, and evicts in mid-prompt, too."""
    model = _core.Model(str(model_path))
    rng = np.random.default_rng(6)
    prompts = [rng.integers(0, 40000, n, dtype=np.int32) for n in (310, 150, 260)]
    how = dict(n_ctx=512, n_ubatch=64, n_threads=1, policy=policy, cells=cells)
    together = _core.Context(model, n_seq_max=3, budget="80", **how)
    for seq, (prompt, budget) in enumerate(zip(prompts, ("80", "60", "120"))):
        together.set_budget(budget, "", seq)
        together.decode(prompt, seq)
        together.evict(seq)
        together.end_prompt(seq)
    token = np.array([77], np.int32)
    for seq, (prompt, budget) in enumerate(zip(prompts, ("80", "60", "120"))):
        alone = _core.Context(model, budget=budget, **how)
        alone.decode(prompt)
        alone.evict()
        assert all(map(np.array_equal, together.kept(seq), alone.kept()))
        assert together.seq_stats(seq)["bytes_used"] == alone.seq_stats(0)["bytes_used"]
        alone.decode(token)
        together.decode(token, seq)
        assert np.array_equal(together.logits(), alone.logits())
    together.decode_batch(np.array([5, 6, 7], np.int32), np.arange(3, dtype=np.int32))  # in one view, each with its own mask
    for seq, prompt in enumerate(prompts):
        alone = _core.Context(model, budget=("80", "60", "120")[seq], **how)
        alone.decode(prompt)
        alone.evict()
        alone.decode(token)
        alone.decode(np.array([5 + seq], np.int32))
        ours, theirs = together.logits()[seq], alone.logits()[-1]
        assert abs(ours - theirs).max() < 0.05*abs(theirs).max() and ours.argmax() == theirs.argmax()  # products of other shapes round differently
