"""llm.pipeline(), evictions one after another, states in memory, policies by module:Class."""
import importlib
import subprocess
import sys

import numpy as np
import pytest

import pykvc
from pykvc.prose import prose
from pykvc.spans import segment_spans

TEXT = prose(20) + "The word on the blue door is marzipan. " + prose(20, seed=1)
QUESTIONS = ["What is the word on the blue door?", "In one word, what is the text about?"]
HOW = dict(n_ctx=2048, n_threads=1)

MINE = '''
import numpy as np, pykvc
class Newest(pykvc.Policy):
    name = "newest"
    def __init__(self, sinks=4, low=False):
        self.sinks, self.low = sinks, low
    def score(self, layer):
        return np.tile(np.arange(layer.n_kv, dtype=np.float32)*(-1 if self.low else 1), (layer.n_head_kv, 1))
class Plain(pykvc.Policy):
    name, sinks = "plain", 4
    def score(self, layer):
        return layer.pos.astype("float32")
class NoPolicy:
    pass
'''


@pytest.fixture(scope="module")
def llm(model_path):
    with pykvc.LLM(model_path, **HOW, kv_policy="snapkv", kv_budget=0.5) as llm:
        yield llm


def test_a_pipeline_is_a_context_in_the_template(llm):
    answers = llm.pipeline(TEXT, QUESTIONS, max_tokens=8)
    for question, answer in zip(QUESTIONS, answers):
        whole = llm.apply_chat_template([{"role": "user", "content": TEXT + question}])
        at = whole.index(question)
        llm.reset()
        llm.prefill(whole[:at])
        assert llm.compress()
        assert llm.generate(whole[at:], reset=False, max_tokens=8).tokens == answer.tokens
    assert answers[0].kv["bytes_used"] < 0.6*answers[0].kv["bytes_full"]


def test_policy_and_budget_of_a_pipeline(llm):
    short = llm.pipeline(TEXT, QUESTIONS[:1], policy="streaming_llm", budget=64, max_tokens=4)[0]
    assert max(short.kv["kept"]) == 64
    raw = llm.pipeline(TEXT, QUESTIONS[:1], raw=True, max_tokens=4)[0]
    assert raw.n_prompt < short.n_prompt + len(llm.tokenize(TEXT))


def test_budget_and_kv_budget_are_one(llm):
    ask = dict(policy="streaming_llm", max_tokens=1)
    assert max(llm.pipeline(TEXT, QUESTIONS[:1], kv_budget=64, **ask)[0].kv["kept"]) == 64
    llm.reset()
    llm.prefill(TEXT)
    assert llm.compress(budget=64) and max(llm.stats()["kept"]) == 64
    for call in (lambda **how: llm.pipeline(TEXT, QUESTIONS[:1], **ask, **how), llm.compress):
        with pytest.raises(ValueError, match="the same: give one"):
            call(budget=64, kv_budget=64)
    with pytest.raises(ValueError, match=r"LLM's own policy: llm.context\(text\).compress\('keydiff'\)"):
        llm.compress("keydiff")


def test_spans_of_a_pipeline_are_the_texts(model_path):
    spans = segment_spans(TEXT, "sentence")[1:3]
    with pykvc.LLM(model_path, **HOW, kv_policy="shotkv", kv_budget=0.6) as llm:
        found = []
        feed = llm._session.feed
        llm._session.feed = lambda ids, given: found.append([llm.detokenize(ids[a:b]) for a, b in given]) or feed(ids, given)
        llm.pipeline(TEXT, QUESTIONS[:1], spans=spans, max_tokens=1)
        llm.reset()
        llm.prefill(TEXT, spans=spans, span_unit="chars")
    in_template, _, alone = found  # of the text, of a question, of the text without a template
    assert len(alone) == 2 and in_template == alone


@pytest.mark.parametrize("how, words", [
    (dict(context=" ", questions=["a"]), "context"), (dict(context="a", questions="a"), "questions"), (dict(context="a", questions=[]), "questions"),
    (dict(context="a", questions=[" "]), "questions"), (dict(context=TEXT, questions=["a"], policy="strange"), "unknown policy"),
    (dict(context=TEXT, questions=["a"], policy=["snapkv"]), "budget is a list"), (dict(context=TEXT, questions=["a"], spans=[(0, 1)], segment="sentence"), "not both"),
    (dict(context=TEXT, questions=["a"], spans=[(0, 1)], span_unit="tokens"), "characters"), (dict(context=TEXT, questions=["a"], policy="h2o"), "summed"),
    (dict(context=TEXT, questions=["a"], raw=True, system="x"), "system")])
def test_a_pipeline_refuses_before_it_evaluates(llm, how, words):
    llm.reset()
    llm.prefill("One two")
    n = llm.n_tokens
    with pytest.raises(ValueError, match=words):
        llm.pipeline(**how)
    assert llm.n_tokens == n


def test_a_pipeline_without_a_policy_asks_the_whole(model_path):
    with pykvc.LLM(model_path, **HOW) as llm:
        answer = llm.pipeline(TEXT, QUESTIONS[:1], max_tokens=4)[0]
        assert answer.kv["bytes_used"] == answer.kv["bytes_full"]
        with pytest.raises(ValueError, match="kv_policy"):
            llm.pipeline(TEXT, QUESTIONS, budget=64)


def test_one_policy_after_another(llm):
    """The second chooses among what the first kept, as kvpress' ComposedPress."""
    ctx = llm.context(TEXT)
    ctx.compress("streaming_llm", 200)
    first = [set(k[0].tolist()) for k in llm.kept()]
    assert ctx.compress(["streaming_llm", "snapkv"], [200, 100])
    both = [k[0].tolist() for k in llm.kept()]
    assert all(len(k) == 100 and set(k) <= whole for k, whole in zip(both, first))
    ctx.compress("snapkv", 100)
    assert both != [k[0].tolist() for k in llm.kept()]
    n = ctx.n_tokens
    ctx.compress(["knorm", "snapkv"], [0.5, 0.25])
    assert np.mean(ctx.kept) == pytest.approx(n/4, abs=1)  # of the whole, not of a half


def test_a_failed_second_policy_leaves_the_whole(llm):
    ctx = llm.context(TEXT)
    with pytest.raises(ValueError):
        ctx.compress(["knorm", "snapkv:window=32"], [0.5, 8])
    ctx.go_back()
    assert {k.shape[1] for k in llm.kept()} == {ctx.n_tokens}


def test_states_in_memory_and_in_a_file_are_the_same(llm, tmp_path):
    llm.generate(TEXT, max_tokens=3)
    data = llm.save_state()
    llm.save(tmp_path/"state")
    assert (tmp_path/"state").read_bytes() == data
    goes_on = llm.generate(reset=False, max_tokens=6).tokens
    for load in (lambda: llm.load_state(data), lambda: llm.load_state(bytearray(data)), lambda: llm.load(tmp_path/"state")):
        llm.reset()
        load()
        assert llm.generate(reset=False, max_tokens=6).tokens == goes_on
    for wrong, words in ((data[:-5], "truncated"), (b"what", "not a state"), ("text", "bytes")):
        with pytest.raises(ValueError, match=words):
            llm.load_state(wrong)
    assert llm.n_tokens > 0


# -- policies by name ------------------------------------------------------------------------------------------------------

@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path/"my_policies.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_policy_by_module_and_class(module, model_path):
    for spec, n_sinks in (("my_policies:Newest", 4), ("my_policies:Newest:sinks=2", 2)):
        with pykvc.LLM(model_path, **HOW, kv_policy=spec, kv_budget=32) as llm:
            llm.prefill(tokens=list(range(1000, 1200)))
            llm.compress()
            assert llm.policy == "newest" and llm.kept()[0][0].tolist() == [*range(n_sinks), *range(200 - 32 + n_sinks, 200)]
            context = llm.context(tokens=list(range(1000, 1200)))
            mine = importlib.import_module("my_policies").Newest()
            for policy in (spec, mine, [mine, "knorm"], 3):
                with pytest.raises(ValueError, match="policy is a spec|is the LLM's own: make one with LLM"):
                    context.compress(policy, [0.5, 0.4] if isinstance(policy, list) else 0.5)


def test_a_class_without_an_init_takes_its_attributes(module, model_path):
    """That of docs/tutorial.md, as docs/guide.md names it."""
    with pykvc.LLM(model_path, **HOW, kv_policy="my_policies:Plain:sinks=2", kv_budget=32) as llm:
        llm.prefill(tokens=list(range(1000, 1200)))
        llm.compress()
        assert llm.kept()[0][0].tolist() == [0, 1, *range(170, 200)]


@pytest.mark.parametrize("spec, words", [
    ("my_policies:Nobody", "Nobody"), ("my_nothing:Newest", "my_nothing"), ("my_policies:NoPolicy", "subclass"),
    ("my_policies:Newest:sunks=1", "sunks"), ("my_policies:Plain:sunks=1", "did you mean 'sinks'"), ("my_policies:Plain:name=a", "'name'"), ("my_policies:Newest:sinks=-1", "sinks"), ("my_policies:Newest:sinks=x", "sinks"), ("snapkv:window", "key=value")])
def test_a_name_that_names_nothing(module, model_path, spec, words):
    with pytest.raises(ValueError, match=words):
        pykvc.LLM(model_path, **HOW, kv_policy=spec, kv_budget=32)


def test_the_command_line_finds_it_where_it_is_called(module, model_path):
    done = subprocess.run([sys.executable, "-m", "pykvc.cli", "generate", "-m", str(model_path), "-p", "One two three four five six seven. "*9, "-n", "2", "--raw",
                           "--kv-policy", "my_policies:Newest:sinks=2", "--kv-budget", "20", "--json"], cwd=module, capture_output=True, text=True)
    assert '"policy": "newest"' in done.stdout, done.stderr


@pytest.mark.parametrize("how, match", [
    (dict(spans=[(-5, 20)]), "leaves the prompt"), (dict(spans=[(20, 10)]), "empty or leaves"), (dict(spans=[(5, 5)]), "is empty"),
    (dict(spans=[(0, len(TEXT) + 1)]), f"has {len(TEXT)} characters"), (dict(questions=(q for q in QUESTIONS)), "list of strings")])
def test_spans_are_those_of_the_text(llm, how, match):
    with pytest.raises(ValueError, match=match):
        llm.pipeline(TEXT, **{"questions": QUESTIONS, "max_tokens": 1, **how})
