"""Policies that ask: what LLM evaluates for them, and that nothing of it stays."""
import pytest

import pykvc
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
            assert llm.stats()["cells"] <= 1024 and llm.stats()["n_evictions"] > 3
        logits = llm.logits()
        assert llm.compress() and llm.stats()["cells"] == 512 and llm.n_tokens == n
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
        assert answer.n_predicted == 700 and answer.kv["cells"] <= 512  # the answer alone would fill them
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
])
def test_mistakes(policy, call, why):
    with pykvc.LLM(n_ctx=1024, n_threads=2, kv_policy=policy, kv_budget=200) as llm, pytest.raises(ValueError, match=why):
        llm.generate("A short story.", max_tokens=2, **call)


def test_repetitions_need_room():
    with pytest.raises(ValueError, match="repetitions"):
        pykvc.LLM(n_ctx=1024, n_ubatch=32, kv_policy="kvzip", kv_budget=200)
    with pykvc.LLM(n_ctx=1024, n_threads=2, kv_policy="kvzip", kv_budget=200) as llm, pytest.raises(ValueError, match="prefix"):
        llm.generate_batch(["a", "b"])
