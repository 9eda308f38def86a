"""Policies on a real model: what evict() keeps is what the oracle keeps from the signals the engine gathered."""
import numpy as np
import pytest

import oracle
from pykvc import _core

N, BUDGET = 570, 128
STORY = [
    "The ferry left the northern pier at a quarter past six, with forty crates of lamp oil and one passenger.",
    "Her name was Ilse Brandt, and she carried a brass key that opened nothing she knew of.",
    "Nobody on the island remembered the keeper, but everyone remembered his garden: beans, roses, and a crooked pear tree.",
    "\"Ask at the post office,\" said the captain, \"they keep letters there longer than most people keep friends.\"",
    "In the ledger for 1887 somebody had written the number 4173 twice and crossed it out once.",
    "Rain came over the hill in sheets, and the goats went to stand under the chapel's porch, as they always did.",
    "The key, it turned out, was for a clock; the clock, however, was at the bottom of the well.",
    "They lowered a boy of nine on a rope, since he was the only one who asked to go.",
    "He came up with a bucket of mud, two coins, and a small iron door no larger than a hand.",
    "Behind a door of that size, the postmistress said, one keeps either money or bees.",
    "It was neither. Inside lay a folded map of the sea floor, dry as flour, with every rock marked in red ink.",
    "By winter the ferry took a new course, shorter by half an hour, and no ship was lost there again.",
]


def story_tokens(model):
    text = " ".join(STORY) + " Told again, the story went so: " + " ".join(reversed(STORY)) + " The passenger who carried the key was called"
    tokens = model.tokenize(text.encode())
    assert len(tokens) >= N
    return np.array(tokens[-N:], dtype=np.int32)


@pytest.fixture(scope="module")
def model(model_path):
    return _core.Model(str(model_path))


NAMES = [p["name"] + (":share=head" if p["share"] == "auto" else "") for p in _core.policies() if not p["name"].startswith(("full", "random"))]


@pytest.mark.parametrize("name,type_k", [(name, "f16") for name in NAMES] + [("keydiff:share=head", "q8_0"), ("snapkv", "q8_0"), ("expected_attention", "q8_0"), ("dropkv:share=head", "q8_0"), ("vase", "q8_0")])
def test_evict_keeps_what_the_oracle_keeps(model, name, type_k):
    tokens = story_tokens(model)
    spans = [(b, b + 37) for b in range(11, 500, 37)]
    ctx = _core.Context(model, n_ctx=1024, policy=name, budget=str(BUDGET), type_k=type_k, type_v=type_k)
    if name == "shotkv":
        ctx.set_spans(spans)
    ctx.decode(tokens)
    name = name.partition(":")[0]
    if name in ("finch", "kvzip"):
        ctx.ask(tokens[-30:])
    layers, scores = [{**layer, "budget": BUDGET} for layer in ctx.signals()], ctx.scores()
    policy = oracle.POLICIES[name]()

    for il, layer in enumerate(layers):
        np.testing.assert_array_equal(layer["pos"], np.tile(np.arange(N), (model.n_head_kv, 1)))
        expected = policy.score(layer, il, len(layers))
        matters = ~np.isnan(expected)
        np.testing.assert_allclose(scores[il][matters], expected[matters], rtol=2e-5, atol=2e-6 * abs(expected[matters]).max(initial=0))

    assert ctx.evict()
    kept = ctx.kept()
    n_keep = [int((x >= 0).sum())//model.n_head_kv for x in kept]  # a head on average: adakv's differ
    assert sum((x >= 0).sum() for x in kept) == model.n_head_kv * len(layers) * BUDGET
    assert sum(n_keep) == len(layers) * BUDGET
    assert (abs(n_keep - policy.budgets(N, len(layers), BUDGET)) <= 1).all()
    for il, (a, b) in enumerate(zip(kept, policy.kept(layers, n_keep, spans=spans if name == "shotkv" else []))):
        np.testing.assert_array_equal(a, b, err_msg=f"layer {il}")


@pytest.mark.parametrize("window", [1, 20])
def test_window_attention_is_the_attention_of_the_last_queries(model, window):
    """The engine's signal, against causal softmax rows that do not come from it: each sums to 1, as does their mean."""
    ctx = _core.Context(model, n_ctx=1024, policy=f"snapkv:window={window}", budget=str(BUDGET))
    ctx.decode(story_tokens(model))
    for layer in ctx.signals():
        assert layer["attn"].shape == (model.n_head, N) and layer["n_query"] == window
        np.testing.assert_allclose(layer["attn"].sum(axis=1), 1, atol=2e-3)
        newest = layer["attn"][:, N - window:]
        assert (newest >= 0).all() and (newest[:, -1] <= 1 / window + 1e-3).all()  # only the last query sees the last token


@pytest.mark.parametrize("name", ["finch", "kvzip"])
def test_a_probe_leaves_only_what_it_attended_to(model, name):
    """finch: the mean attention of the probe's queries, as snapkv's window sees it where the probe stays. kvzip: at least that."""
    tokens, probe = story_tokens(model)[:400], story_tokens(model)[400:440]
    how = dict(n_ctx=1024, budget=str(BUDGET))
    ctx, stays, never = (_core.Context(model, policy=p, **how) for p in (name, "snapkv:window=40", name))
    for c in (ctx, stays, never):
        c.decode(tokens)
    stays.decode(probe)
    ctx.ask(probe)
    assert ctx.pos_max() == 399
    for layer, full in zip(ctx.signals(), stays.signals()):
        mean = oracle.over_group(full["attn"], model.n_head_kv)[:, :400]
        if name == "finch":
            np.testing.assert_allclose(layer["probed"], mean, rtol=1e-4, atol=1e-7)
        else:
            assert (layer["probed"] >= mean*(1 - 1e-4)).all() and layer["probed"].max() <= 1 + 1e-5
    more = story_tokens(model)[440:450]
    for c in (ctx, never):
        c.decode(more)
    assert np.array_equal(ctx.logits(), never.logits())  # nothing of the probe is left
    assert all(np.isinf(x["probed"][:, 400:]).all() and np.isfinite(x["probed"][:, :400]).all() for x in ctx.signals())
    assert ctx.evict() and all((k[:, -10:] == np.arange(400, 410)).all() for k in ctx.kept())


@pytest.mark.parametrize("type_k,n_bytes", [("f16", 2), ("q8_0", 2), ("q4_0", 2), ("f32", 4), ("bf16", 4)])
def test_queries_are_kept_as_finely_as_attention_reads_them(model, type_k, n_bytes):
    ctx = _core.Context(model, n_ctx=256, policy="snapkv:window=24", budget="64", type_k=type_k, type_v=type_k)
    ctx.decode(story_tokens(model)[:100])
    layers = ctx.signals()
    assert ctx.stats()["bytes_signals"] == len(layers)*24*576*n_bytes  # SmolLM2: 9 query heads of 64
    for layer in layers:
        np.testing.assert_allclose(layer["attn"].sum(axis=1), 1, atol=2e-3)
