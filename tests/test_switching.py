"""A sequence that goes from one policy to another, and what is removed, emptied or loaded between them. Random
weights."""
import subprocess
import sys

import numpy as np
import pytest

import pykvc
import tiny
from pykvc import _core

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return {arch: _core.Model(str(tiny.write(folder/f"{arch}.gguf", arch, n_layer=4 if arch == "llama" else None)))
            for arch in ("llama", "gpt-oss", "gemma4", "qwen35")}


def context(model, policy, budget="40", **kwargs):
    return _core.Context(model, **{"n_ctx": 512, "n_ubatch": 256, "n_threads": 1, "policy": policy, "budget": budget, **kwargs})


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, tiny.N_VOCAB, n, dtype=np.int32)


@pytest.mark.parametrize("policy", ["snapkv:window=8", "tova"])
def test_attention_after_a_probe_wants_queries_of_its_own(models, policy):
    """A probe's queries take the place of the last ones, and are gone with it."""
    c = context(models["llama"], "kvzip:window=64", "60")
    c.decode(ids(100))
    c.ask(ids(100, 1))
    assert c.evict()
    before = c.kept()
    c.set_policy(policy, "30")
    with pytest.raises(ValueError, match="taken by the questions of another policy"):
        c.evict()
    assert all(map(np.array_equal, before, c.kept()))
    c.decode(ids(10, 2))
    assert c.evict() and c.stats()["kept"] == [30]*4


def test_a_sequence_emptied_amid_layers_of_different_length_is_read_from_its_first_row(models):
    """The graph of as many tokens was of the layout before: it has to go."""
    first, again = ids(100, 1), ids(100, 2)

    def logits(own: bool) -> np.ndarray:
        c = context(models["llama"], "snapkv:window=8,share=head")
        if own:
            c.set_policy("pyramidkv:window=8", "40")
            c.decode(first)
            assert c.evict() and len(set(c.stats()["kept"])) > 1
            c.decode(again)
            c.clear(0)
        c.decode(again)
        return c.logits()
    np.testing.assert_array_equal(logits(True), logits(False))


@pytest.mark.parametrize("policy", ["expected_attention:sinks=0,window=16", "keydiff:sinks=0", "criticalkv:window=16"])
@pytest.mark.parametrize("flash_attn", ["on", "off"])
def test_a_head_without_a_row(models, policy, flash_attn):
    """One that held nothing but the tail, which is removed: its score is 0 numbers long."""
    c = context(models["llama"], policy + ",share=layer", "36", flash_attn=flash_attn)
    c.decode(ids(100))
    assert c.evict() and c.remove_tail(c.pos_floor())
    c.decode(ids(1, 3))
    held = [(kept >= 0).sum(axis=1) for kept in c.kept()]
    if policy != "criticalkv:window=16":  # a query that a head does not hold itself sees nothing there
        assert [np.isfinite(score).sum(axis=1).tolist() for score in c.scores()] == [n.tolist() for n in held]
    c.decode(ids(60, 4))
    assert c.evict() and np.isfinite(c.logits()).all()


@pytest.mark.parametrize("arch", ["llama", "gpt-oss", "gemma4", "qwen35"])
def test_the_state_of_an_empty_sequence_empties_all_of_it(models, arch):
    """Its sliding windows and recurrent states, too."""
    def logits(used: bool) -> np.ndarray:
        c = context(models[arch], "knorm", "30", n_seq_max=2)
        empty = c.save_seq(1)
        if used:
            c.decode(ids(20, 1))
            c.load_seq(empty, 0)
            assert c.pos_max() == -1
        c.decode(ids(20, 2))
        return c.logits()
    np.testing.assert_array_equal(logits(True), logits(False))


@pytest.mark.parametrize("policy", ["shotkv:window=4,sinks=0", "chunkkv:window=4", "random_shot:window=4,sinks=0"])
def test_whole_units_want_heads_that_hold_the_same(models, policy):
    c = context(models["llama"], policy)
    c.set_spans([(i, i + 10) for i in range(0, 100, 10)])
    c.decode(ids(110))
    c.set_policy("snapkv:window=4", "60")
    assert c.evict()
    before = c.kept()
    c.set_policy(policy, "40")
    with pytest.raises(ValueError, match="same tokens in every head"):
        c.evict()
    assert all(map(np.array_equal, before, c.kept()))


@pytest.mark.parametrize("policy", ["pyramidkv:window=8", "pyramidinfer:window=8", "adakv:window=8", "keydiff:share=layers"])
def test_what_was_evicted_to_its_budget_is_not_over_it(models, policy):
    c = context(models["llama"], policy)
    c.decode(ids(100))
    assert c.evict() and not c.evict() and c.n_evictions() == 1


def test_what_no_window_helps_is_said_first(models):
    c = context(models["llama"], "snapkv:window=8")
    with pytest.raises(ValueError, match="asks questions of its own.*Start it with the one that needs most"):
        c.check_policy("kvzip:window=64", "40", "")
    with pytest.raises(ValueError, match="needs the last 64 queries, and this context keeps 8"):
        c.check_policy("snapkv:window=64", "80", "")


def test_a_removal_of_nothing_leaves_budgets(models):
    c = context(models["llama"], "knorm")
    c.set_budget("20", "")
    assert c.remove_tail(0)
    c.decode(ids(100))
    assert c.evict() and c.stats()["kept"] == [20]*4


def test_a_mask_of_nothing_is_none(models):
    c = context(models["llama"], "snapkv:window=8", "60")
    c.decode(ids(20))
    assert not c.evict(mask_only=True)
    c.decode(ids(1))
    assert np.isfinite(c.logits()).all()


def test_a_call_that_fails_leaves_no_logits(models):
    class Fails(pykvc.Policy):
        window, interval, fail = 4, 1, False

        def score(self, layer):
            if self.fail:
                raise KeyError("no score")
            return np.zeros((layer.n_head_kv, layer.n_kv), np.float32)
    policy = Fails()
    c = context(models["llama"], policy, "100", cells="256", n_ubatch=64)
    c.decode(ids(60))
    policy.fail = True
    with pytest.raises(ValueError, match="no score"):
        c.decode(ids(400, 1))
    with pytest.raises(ValueError, match="no logits"):
        c.logits()


def test_plan_checks_what_it_is_given():
    pos, score = [np.arange(5, dtype=np.int32)[None]], [np.zeros((1, 5), np.float32)]
    for spans in ([(3, 1)], [(0, 2), (1, 4)], [(-1, 2)]):
        with pytest.raises(ValueError, match="ascending and disjoint"):
            _core.plan("shotkv:window=2,sinks=0", pos, score, 4, spans=spans)
    with pytest.raises(ValueError, match="n_frozen is 0 to"):
        _core.plan("chunkkv:window=2", pos, score, 4, n_frozen=[9])


def test_a_policy_that_no_context_took_ends_with_python():
    program = ("import numpy as np, pykvc\nclass Own(pykvc.Policy):\n    def score(self, layer): return np.zeros(1)\n"
               "pykvc._core.next_context(Own(), '20')\n")
    assert subprocess.run([sys.executable, "-I", "-c", program]).returncode == 0
