"""llm.context(): one prefill, several policies and budgets, questions that do not see each other."""
import pytest

import pykvc
from pykvc.prose import prose

TEXT = prose(30) + "The word on the blue door is marzipan. " + prose(30, seed=1)
QUESTION, OTHER = "\nQuestion: What is the word on the blue door?\nAnswer:", "\nIn one word, the story is about"
HOW = dict(n_ctx=4096, n_threads=1)


def alone(policy, budget, question, **how):
    """The same by hand: a fresh LLM, a context, an eviction, a question."""
    with pykvc.LLM(**HOW, kv_policy=policy, kv_budget=budget, **how) as llm:
        llm.prefill(TEXT)
        llm.compress()
        return [k.tolist() for k in llm.kept()], llm.generate(question, reset=False, compress=False, max_tokens=6).tokens


def test_questions_do_not_see_each_other_nor_policies():
    """In any order, from one evaluation, the same cells and answers as by hand."""
    with pykvc.LLM(**HOW, kv_policy="snapkv:share=all", kv_budget=256) as llm:
        ctx = llm.context(TEXT)
        ctx.ask(QUESTION, max_tokens=6)
        n_evaluated = llm.stats()["prefill_ms"]
        for policy, budget in (("keydiff", 200), ("snapkv", 300), ("snapkv:share=layers", 300), ("keydiff", 200), ("streaming_llm", 128)):
            assert ctx.compress(policy=policy, budget=budget)
            first = ctx.ask(QUESTION, max_tokens=6)
            ctx.ask(OTHER, max_tokens=9)
            again = ctx.ask(QUESTION, max_tokens=6)
            assert first.tokens == again.tokens and ctx.stats()["n_tokens"] == ctx.n_tokens
            kept, tokens = alone(policy, budget, QUESTION)
            assert [k.tolist() for k in llm.kept()] == kept and first.tokens == tokens and ctx.kept == [len(k[0]) for k in kept]
        assert n_evaluated > 0


@pytest.mark.parametrize("policy", ["snapkv:window=16", "h2o", "expected_attention:window=16"])
def test_a_question_takes_no_part_in_a_later_eviction(policy):
    """Its queries come after the context's last ones, and what it gives to cells is no sum of the context's."""
    with pykvc.LLM(**HOW, kv_policy=policy, kv_budget=256) as llm:
        ctx = llm.context(TEXT)
        assert not ctx.compress(budget=2000)  # it has fewer
        ctx.ask(QUESTION, max_tokens=20)
        assert ctx.compress(budget=200) and [k.tolist() for k in llm.kept()] == alone(policy, 200, QUESTION)[0]


def test_repetitions_are_heard_with_the_same_sinks():
    """kvzip's softmax is over them, too."""
    with pykvc.LLM(**HOW, kv_policy="kvzip:chunk=256,sinks=4", kv_budget=256) as llm:
        ctx = llm.context(TEXT)
        with pytest.raises(ValueError, match="sinks"):
            ctx.compress(policy="kvzip:chunk=256,sinks=64")
        assert ctx.compress(policy="kvzip:chunk=256,softmax=chunk,recent=8")


def test_one_repetition_serves_every_share():
    with pykvc.LLM(**HOW, kv_policy="kvzip:share=all,chunk=256", kv_budget=256) as llm:
        ctx = llm.context(TEXT)
        ctx.compress(budget=200)
        asked_ms = llm.stats()["probe_ms"]
        for share in ("layers", "head", "all"):
            ctx.compress(policy=f"kvzip:share={share},chunk=256", budget=128)
            assert [k.tolist() for k in llm.kept()] == alone(f"kvzip:share={share},chunk=256", 128, QUESTION)[0]
        ctx.compress(policy="snapkv", budget=128)  # its queries are the context's last ones, not the repetition's
        assert [k.tolist() for k in llm.kept()] == alone("snapkv", 128, QUESTION)[0]
        assert asked_ms > 0 and ctx._asked is not None


def test_a_context_survives_what_the_llm_does_meanwhile():
    with pykvc.LLM(**HOW, kv_policy="snapkv", kv_budget=256) as llm:
        ctx = llm.context(TEXT)
        ctx.compress(budget=128)
        before = ctx.ask(QUESTION, max_tokens=6).tokens
        llm.generate("Something else entirely.", max_tokens=4)
        assert ctx.ask(QUESTION, max_tokens=6).tokens == before
    with pykvc.LLM(**HOW) as llm:  # a whole cache is cut, not copied
        ctx = llm.context(TEXT)
        before = ctx.ask(QUESTION, max_tokens=6).tokens
        assert ctx.ask(OTHER, max_tokens=3).tokens and ctx.ask(QUESTION, max_tokens=6).tokens == before
        llm.generate("Something else entirely.", max_tokens=4)
        with pytest.raises(ValueError, match="make the context again"):
            ctx.ask(QUESTION)
        with pytest.raises(ValueError, match="kv_policy"):
            ctx.compress(budget=0.5)


def test_an_answers_own_tokens_are_evicted_by_the_chosen_policy():
    with pykvc.LLM(**HOW, kv_policy="keydiff", kv_budget=256) as llm:
        ctx = llm.context(TEXT)
        ctx.compress(policy="streaming_llm:interval=8", budget=128, decode_budget=16)
        for _ in range(2):  # also from a state that was restored
            answer = ctx.ask(OTHER, max_tokens=60)
            assert answer.n_predicted < 60 or answer.kv["cells"] <= 128 + 40 + 16 + 8
            llm.generate("Something else.", max_tokens=2)


@pytest.mark.parametrize("how, why", [
    (dict(policy="h2o", budget=64), "summed over all queries"), (dict(policy="nope", budget=64), "unknown policy"),
    (dict(policy="snapkv:window=64", budget=128), "keeps 32"), (dict(policy="kvzip:window=32", budget=128), "questions of its own"),
    (dict(budget=8), "at least 33"), (dict(budget="x"), "number of tokens"), (dict(policy="adakv", budget=128), "heads different"),
])
def test_what_cannot_be_leaves_the_context_as_it_was(how, why):
    with pykvc.LLM(**HOW, kv_policy="snapkv", kv_budget=256) as llm:
        ctx = llm.context(tokens=range(1000, 1400))
        before = ctx.ask(OTHER, max_tokens=3).tokens
        with pytest.raises(ValueError, match=why):
            ctx.compress(**how)
        assert ctx.ask(OTHER, max_tokens=3).tokens == before and ctx.kept == [400]*len(ctx.kept)


def test_a_closed_llm():
    llm = pykvc.LLM(**HOW, kv_policy="snapkv", kv_budget=256)
    ctx = llm.context(tokens=range(1000, 1100))
    llm.close()
    with pytest.raises(ValueError, match="closed"):
        ctx.ask("More?")
    assert ctx.n_tokens == 100
