"""The whole policy table against tests/oracle.py, on made-up signals: scores, plans, budgets, spec strings. No model."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from pykvc import _core

N_LAYER, N_HEAD_KV, GROUP, HEAD_DIM = 5, 3, 3, 16
TABLE = {p["name"]: p for p in _core.policies()}
NAMES = list(TABLE)
VARIANTS = ["keydiff:share=head,sinks=3,recent=0.25", "h2o:recent=0.25", "streaming_llm:sinks=0",
            "snapkv:window=16,kernel=7,pool=max", "snapkv:kernel=1",
            "pyramidkv:window=8,beta=3", "pyramidkv:beta=1", "adakv:alpha=0", "adakv:alpha=0.95,window=16,pool=max",
            "pyramidinfer:recent=0.5,decay=0.5,sinks=2", "chunkkv:chunk=7,window=9",
            "chunkkv:pool=avg,chunk=20", "chunkkv:pool=max,kernel=3", "chunkkv:reuse=2", "finch:pool=avg,kernel=7,recent=3", "finch:pool=none", "kvzip:sinks=0,share=head",
            "expected_attention:epsilon=0.02,sinks=0,recent=0", "expected_attention:sinks=9,recent=3", "shotkv:fit=trim", "shotkv:queries=all",
            "shotkv:layers=shared", "random_shot:fit=trim,seed=3", "random:seed=7", "snapkv:values=wo,window=16", "h2o:values=wo", "tova:values=wo",
            "finch:values=wo", "kvzip:values=wo,share=head", "defensive:share=head,mass=0.5,pool=max", "dropkv:share=head,window=4",
            "vase:range=0.6,seed=4,window=8", "rkv:lambda=0.6,kernel=3"]
# each with heads that keep equally many: tests/test_share.py is about the others
SPECS = [f"{name}:share=head" if TABLE[name]["share"] == "auto" else name for name in NAMES] + VARIANTS


def params_of(spec):
    """Every parameter of a spec, as numbers and words."""
    text = dict(item.split("=") for item in _core.parse_spec(spec).partition(":")[2].split(",") if item)
    declared = {p["name"]: p for p in TABLE[spec.partition(":")[0]]["params"]}
    return {k: v if declared[k]["choices"] else int(v) if declared[k]["integer"] else float(v) for k, v in text.items()}


def oracle_of(spec):
    params = params_of(spec)
    for name in ("interval", "share"):  # how often the engine asks, and what tests/test_share.py is about: no matters of the method
        params.pop(name, None)
    weighed = params.pop("values", "plain") == "wo" and not spec.startswith("criticalkv")
    policy = oracle.POLICIES[spec.partition(":")[0]](**params)
    return oracle.critical(policy) if weighed else policy


def make_layers(seed, n, window=32, newest=1.0):
    """Signals as Context.signals() gives them, from random Q and K."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(N_LAYER):
        keys = rng.standard_normal((N_HEAD_KV, n, HEAD_DIM)).astype(np.float32)
        pos = np.tile(np.arange(n, dtype=np.int32), (N_HEAD_KV, 1))
        w = min(max(window, 1), n)
        q = rng.standard_normal((w, N_HEAD_KV * GROUP, HEAD_DIM)).astype(np.float32)
        rows = oracle.attention(q, keys.swapaxes(0, 1), 1.0, pos[0, -w:], pos)
        attn = oracle.window_mean(rows, newest)
        sums = rng.gamma(0.5, size=(N_HEAD_KV, n))
        mean, root = rng.standard_normal((N_HEAD_KV * GROUP, HEAD_DIM)) / 4, rng.standard_normal((N_HEAD_KV * GROUP, HEAD_DIM, 2 * HEAD_DIM)) / 9
        out.append({"pos": pos, "attn": attn.astype(np.float32), "sums": sums.astype(np.float32), "keys": keys, "n_query": w,
                    "probed": rng.gamma(0.3, size=(N_HEAD_KV, n)).astype(np.float32), "q_mean": mean.astype(np.float32),
                    "q_cov": (root @ root.swapaxes(1, 2)).astype(np.float32), "v_norm": rng.gamma(3, size=(N_HEAD_KV, n)).astype(np.float32), "attn_rows": rows.astype(np.float32),
                    "value_rows": rng.standard_normal((N_HEAD_KV, n, HEAD_DIM)).astype(np.float32), "budget": n//2,
                    "o_norm": rng.gamma(3, size=(N_HEAD_KV * GROUP, n)).astype(np.float32)})
    return out


def make_spans(seed, n):
    """Shots of 5 to 60 tokens behind a head of 3, one gap of 5, the question behind them."""
    rng = np.random.default_rng(seed)
    cuts = [3]
    while cuts[-1] < n - 8:
        cuts.append(min(cuts[-1] + int(rng.integers(5, 60)), n - 8))
    return [(a + 5 if i == 2 else a, b) for i, (a, b) in enumerate(zip(cuts, cuts[1:])) if b - a > 5]


def core_scores(spec, layers):
    return [_core.score(spec, x["pos"], il=il, n_layer=len(layers), n_head=N_HEAD_KV * GROUP, n_query=x["n_query"], head_dim=HEAD_DIM,
                        **{name: x[name] for name in ("attn", "sums", "keys", "probed", "q_mean", "q_cov", "v_norm", "o_norm", "attn_rows",
                                                 "value_rows", "budget")}) for il, x in enumerate(layers)]


def signals_for(spec, seed, n):
    needs = TABLE[spec.partition(":")[0]]["needs"]
    return make_layers(seed, n, params_of(spec).get("window", needs["window"]), needs["newest"])


def spans_for(spec, seed, n):
    return make_spans(seed, n) if TABLE[spec.partition(":")[0]]["needs"]["spans"] else []


def whole_budgets(kept):
    """What each layer keeps: a head on average, for adakv's heads differ (-1: nothing there)."""
    n_slots = [int((x >= 0).sum()) for x in kept]
    assert all(n % len(x) == 0 for n, x in zip(n_slots, kept))
    return [n // len(x) for n, x in zip(n_slots, kept)]


def assert_same(kept, expected):
    assert len(kept) == len(expected)
    for il, (a, b) in enumerate(zip(kept, expected)):
        np.testing.assert_array_equal(a, b, err_msg=f"layer {il}")


def test_oracle_covers_the_table():
    assert list(oracle.POLICIES) == NAMES


# -- agreement with the oracle ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [100, 333])
@pytest.mark.parametrize("spec", SPECS)
def test_score(spec, n):
    layers = signals_for(spec, n, n)
    for il, (layer, ours) in enumerate(zip(layers, core_scores(spec, layers))):
        assert ours.shape == (N_HEAD_KV, n) and ours.dtype == np.float32 and np.isfinite(ours).all()
        expected = oracle_of(spec).score(layer, il, N_LAYER)
        if expected is not None:
            matters = ~np.isnan(expected)
            largest = abs(expected[matters]).max(initial=0)
            np.testing.assert_allclose(ours[matters], expected[matters], rtol=2e-5, atol=2e-6 * largest)


@pytest.mark.parametrize("seed,n,budget,ties", [(0, 100, 64, False), (1, 411, 65, True), (2, 411, 207, False), (3, 700, 389, True),
                                                (4, 256, 250, False)])
@pytest.mark.parametrize("spec", [s for s in SPECS if "random_shot" not in s])  # drawn while planning: see test_random_shot
def test_plan(spec, seed, n, budget, ties):
    layers, spans = signals_for(spec, seed, n), spans_for(spec, seed, n)
    pos, policy = [x["pos"] for x in layers], oracle_of(spec)
    scores = [policy.score(x, il, N_LAYER) for il, x in enumerate(layers)]
    if scores[0] is None:
        scores = core_scores(spec, layers)
    scores = [np.nan_to_num(s).astype(np.float32) for s in scores]
    if ties:  # quarters: sums of them are exact in F32 too
        scores = [s.clip(-99, 99) for s in scores]
        scores = [(4 * s / max(s.std(), 1e-9)).round() / 4 for s in scores]
    kept = _core.plan(spec, pos, scores, budget, spans=spans)
    n_keep = np.array(whole_budgets(kept))
    ideal = policy.budgets(n, N_LAYER, budget)
    assert (abs(n_keep - ideal) <= 1).all(), ideal
    assert_same(kept, policy.plan(pos, scores, n_keep, spans=spans))


@pytest.mark.parametrize("spec", [s for s in SPECS if TABLE[s.partition(":")[0]]["decode"] != "none" and "random_shot" not in s])
def test_plan_while_decoding(spec):
    """Generated tokens over their budget: a frozen prompt stays whole, uneven over the layers where the prompt's budgets were."""
    frozen = [0] * N_LAYER
    if TABLE[spec.partition(":")[0]]["decode"] == "generated":
        frozen = [120, 110, 100, 90, 80] if TABLE[spec.partition(":")[0]]["layers_differ"] else [100] * N_LAYER
    rng, policy = np.random.default_rng(5), oracle_of(spec)
    pos, scores = [], []
    for f in frozen:
        old = np.sort([rng.permutation(400)[:f] for _ in range(N_HEAD_KV)], axis=1)
        pos.append(np.concatenate([old, np.tile(np.arange(400, 500), (N_HEAD_KV, 1))], axis=1).astype(np.int32))
        row = rng.random(f + 100).astype(np.float32)
        scores.append(np.tile(row, (N_HEAD_KV, 1)) if spec.startswith(("tova", "pyramidinfer")) else
                      rng.random(pos[-1].shape).astype(np.float32))
    budget = int(np.mean(frozen)) + 60
    kept = _core.plan(spec, pos, scores, budget, prompt=False, n_frozen=frozen)
    assert whole_budgets(kept) == [f + 60 for f in frozen]
    assert_same(kept, policy.plan(pos, scores, whole_budgets(kept), frozen, prompt=False))


# -- what every policy promises --------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(100, 700), share=st.floats(0, 1), spec=st.sampled_from(SPECS))
def test_invariants(seed, n, share, spec):
    rng = np.random.default_rng(seed)
    pos = [np.tile(np.arange(n, dtype=np.int32), (N_HEAD_KV, 1))] * N_LAYER
    scores = [rng.random((N_HEAD_KV, n)).astype(np.float32).round(2) for _ in pos]
    spans = spans_for(spec, seed, n)
    budget = 60 + int(share * (n - 60))
    kept = _core.plan(spec, pos, scores, budget, spans=spans)

    assert sum(whole_budgets(kept)) == N_LAYER * (n if spec == "full" else budget)
    p = params_of(spec)
    # PyramidInfer's window is only whose attention counts: what it keeps of the newest is `recent`.
    # A probe's window is the question's, expected_attention's what is fitted: what they keep of the newest is `recent`, too, in tokens.
    asks = spec.startswith(("finch", "kvzip", "expected_attention"))
    window = 1 if spec.startswith(("tova", "pyramidinfer")) else p["recent"] if asks else p.get("window", 0)
    for il in range(N_LAYER):
        assert kept[il].dtype == np.int32 and kept[il].shape[0] == N_HEAD_KV
        heads = [row[row >= 0] for row in kept[il]]
        longest = max(map(len, heads))
        assert [[-1] * (longest - len(head)) + head.tolist() for head in heads] == kept[il].tolist()
        assert longest == min(map(len, heads)) or TABLE[spec.partition(":")[0]]["heads_differ"]
        for row in heads:
            assert (np.diff(row) > 0).all() and row.max() < n
            assert set(range(p.get("sinks", 0))) | set(range(n - window, n)) <= set(row.tolist())
    assert_same(_core.plan(spec, pos, scores, budget, spans=spans), kept)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("budget", [100, 101, 5000])
def test_budget_of_everything_keeps_everything(spec, budget):
    layers = signals_for(spec, 0, 100)
    kept = _core.plan(spec, [x["pos"] for x in layers], core_scores(spec, layers), budget, spans=spans_for(spec, 0, 100))
    assert_same(kept, [x["pos"] for x in layers])


def test_adakv_gives_each_head_what_its_scores_deserve():
    """Three heads, budget 60 with a window of 32: 84 slots beside the windows. At alpha 0 the sharp head gets what is above the
    others' level, at 0.5 the others keep 14 of their own, at 1 it is snapkv."""
    n, budget = 400, 60
    pos, rng = [np.tile(np.arange(n, dtype=np.int32), (3, 1))], np.random.default_rng(0)
    score = [np.stack([rng.random(n) + 2, rng.random(n), rng.random(n)]).astype(np.float32)]

    def n_kept(alpha):
        return (_core.plan(f"adakv:alpha={alpha}", pos, score, budget)[0] >= 0).sum(axis=1).tolist()
    assert n_kept(0) == [32 + 84, 32, 32] and n_kept(0.5) == [32 + 56, 32 + 14, 32 + 14] and n_kept(1) == [60, 60, 60]
    assert_same(_core.plan("adakv:alpha=1", pos, score, budget), _core.plan("snapkv", pos, score, budget))
    ties = _core.plan("adakv:alpha=0", pos, [np.zeros((3, n), np.float32)], budget)[0]
    assert ties.tolist() == [[*range(28), *range(n - 32, n)]] * 3
    with pytest.raises(ValueError, match="33"):
        _core.plan("adakv", pos, score, 32)


def test_adakv_passes_empty_slots_over():
    """What a shorter head has lost is not chosen again, and what it has is all it can keep."""
    n, pos = 300, np.tile(np.arange(300, dtype=np.int32), (2, 1))
    score = np.random.default_rng(1).random((2, n)).astype(np.float32)
    pos[1, :240], score[1, :240] = -1, -np.inf
    kept, = _core.plan("adakv:alpha=0.5", [pos], [score], 100)
    assert (kept >= 0).sum() == 200 and (kept[1][kept[1] >= 0] >= 240).all()
    kept, = _core.plan("adakv:alpha=0.5", [pos], [score], 250)
    assert (kept >= 0).sum() == 360 and kept.shape[1] == 300 and (kept[1, :240] == -1).all()


def test_random_depends_on_its_seed_alone():
    def draw(spec, seed_of_signals):
        layers = signals_for(spec, seed_of_signals, 400)
        return _core.plan(spec, [x["pos"] for x in layers], core_scores(spec, layers), 100)[0][0].tolist()

    assert draw("random", 0) == draw("random:seed=0", 1) != draw("random:seed=1", 0)
    assert 130 < np.mean(draw("random", 0)) < 270  # the mean of 100 of 0..399, at 6 standard errors


def test_random_head_draws_for_each_head():
    """Every head and layer has a draw of its own, the same every time, and all positions are as likely."""
    pos = [np.tile(np.arange(400, dtype=np.int32), (N_HEAD_KV, 1))] * N_LAYER
    scores = [_core.score("random_head:seed=2", p, il=il) for il, p in enumerate(pos)]
    kept = _core.plan("random_head:seed=2", pos, scores, 100)
    heads = [tuple(row) for layer in kept for row in layer]
    assert len(set(heads)) == len(heads) and all(row[-1] == 399 for row in heads)
    assert abs(np.mean(heads) - 199.5) < 15 and np.mean([len(set(a) & set(b)) for a, b in zip(heads, heads[1:])]) < 35
    assert_same(kept, _core.plan("random_head:seed=2", pos, [_core.score("random_head:seed=2", p, il=il) for il, p in enumerate(pos)], 100))
    assert not np.array_equal(scores[0], _core.score("random_head:seed=3", pos[0]))


def test_random_shot():
    """What shotkv always keeps, whole shots, one in part at most; another seed, other shots."""
    n, budget, spans = 600, 300, make_spans(1, 600)
    pos = [np.tile(np.arange(n, dtype=np.int32), (N_HEAD_KV, 1))]
    score = [np.zeros((N_HEAD_KV, n), np.float32)]
    draws = [_core.plan(f"random_shot:seed={seed}", pos, score, budget, spans=spans)[0] for seed in range(8)]
    for kept in draws:
        assert (kept == kept[0]).all()
        slots = set(kept[0].tolist())
        outside = set(range(n)) - {j for b, e in spans for j in range(b, e)}
        assert outside | set(range(4)) | set(range(n - 32, n)) <= slots
        share = [np.mean([j in slots for j in range(max(b, 4), min(e, n - 32))]) for b, e in spans if b < n - 32]
        assert sum(0 < x < 1 for x in share) <= 1 and any(x == 1 for x in share)
    assert len({kept.tobytes() for kept in draws}) > 4


# -- spec strings and budgets ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec", SPECS)
def test_canonical_spec(spec):
    canonical = _core.parse_spec(spec)
    assert _core.parse_spec(canonical) == canonical
    name, _, rest = canonical.partition(":")
    given_here = dict(item.split("=") for item in spec.partition(":")[2].split(",") if item)
    assert [item for item in rest.split(",") if item] == [f"{p['name']}={given_here.get(p['name'], p['value'])}" for p in TABLE[name]["params"]
                                                             if p["name"] not in ("share", "values") or given_here.get(p["name"], p["value"]) != p["value"]]


def test_parameters_explain_themselves():
    for policy in TABLE.values():
        assert policy["title"] and policy["decode"] in ("none", "whole", "generated")
        for p in policy["params"]:
            assert p["doc"], (policy["name"], p["name"])
            assert p["value"] in p["choices"] if p["choices"] else p["min"] <= float(p["value"]) <= p["max"]


@pytest.mark.parametrize("spec,named", [
    ("nope", NAMES), ("", NAMES), ("SnapKV", NAMES), ("snapkv:windw=3", ["windw", "window", "kernel", "pool"]), ("full:window=3", ["window"]),
    ("snapkv:window=0", ["window", "1", "1024"]), ("snapkv:window=1.5", ["window", "whole"]), ("snapkv:window=x", ["window", "x"]),
    ("snapkv:window=", ["window"]), ("snapkv:pool=sum", ["pool", "avg", "max"]), ("snapkv:window=8,window=9", ["window", "twice"]),
    ("snapkv:window", ["key=value"]), ("h2o:recent=nan", ["recent"]), ("h2o:recent=2", ["recent", "0", "1"]), ("shotkv:fit=stop", ["skip", "trim"]),
])
def test_bad_spec_names_what_is_valid(spec, named):
    with pytest.raises(ValueError) as error:
        _core.parse_spec(spec)
    assert [word for word in named if word not in str(error.value)] == []


@pytest.mark.parametrize("text,expected", [("512", ("tokens", 512)), ("25%", ("ratio", 0.25)), ("0.25", ("ratio", 0.25)), ("1.0", ("ratio", 1)),
                                           ("100%", ("ratio", 1)), ("1", ("tokens", 1)), ("", ("none", 0))])
def test_budget(text, expected):
    assert _core.parse_budget(text) == expected


@pytest.mark.parametrize("text", ["0", "-3", "0%", "101%", "1.5", "abc", "nan", "inf", "nan%", "12x", "0.0", "99999999999"])
def test_bad_budget(text):
    with pytest.raises(ValueError, match="decode_budget.*512.*25%"):
        _core.parse_budget(text, "decode_budget")


def test_heads_that_hold_less_than_a_block():
    """What is left of a block above the other head's blocks may be more than such a head has. Both then keep a little
    less."""
    pos = np.full((2, 1118), -1, np.int32)
    pos[0], pos[1, -94:] = np.arange(1118), np.arange(1024, 1118)
    score = np.where(pos < 0, -np.inf, np.random.default_rng(3).random(pos.shape)).astype(np.float32)
    score[0] += 1
    kept = _core.plan("keydiff:share=all", [pos], [score], 552, n_block=256)[0]
    n = (kept >= 0).sum(axis=1)
    assert (n[0] - n[1]) % 256 == 0 and 0 < n[1] <= 94 and 552 < n[0] and n.sum() <= 2*552
