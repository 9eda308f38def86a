"""How tokens are chosen: SamplingParams, grammars, JSON schemas, log-probabilities, biases."""
import inspect
import json
from dataclasses import fields, replace

import numpy as np
import pytest

import pykvc
from pykvc import SamplingParams, _core, arguments

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}, "size": {"enum": ["small", "large"]}},
        "required": ["city", "size"], "additionalProperties": False}
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def llm(model_path):
    with pykvc.LLM(model_path, n_ctx=512, n_seq_max=2) as llm:
        yield llm


def test_type_hints_name_every_field():
    assert list(arguments.Sampling.__annotations__) == [f.name for f in fields(SamplingParams)]


@pytest.mark.parametrize("method", ["generate", "generate_batch"])
def test_help_shows_every_field(method):
    shown = inspect.signature(getattr(pykvc.LLM, method)).parameters
    for field in fields(SamplingParams):
        assert shown[field.name].default == field.default
    assert "sampling_params" in shown and "own" not in shown and "rendered" not in shown


@pytest.mark.parametrize("given, words", [
    ({"temperature": -1}, "temperature"), ({"temperature": True}, "temperature"), ({"top_k": -1}, "top_k"), ({"top_p": 0}, "top_p"),
    ({"min_p": 2}, "min_p"), ({"typical_p": 0}, "typical_p"), ({"repeat_penalty": 0}, "repeat_penalty"),
    ({"presence_penalty": float("nan")}, "presence_penalty"), ({"frequency_penalty": float("inf")}, "frequency_penalty"),
    ({"max_tokens": -2}, "max_tokens"), ({"seed": -2}, "seed"), ({"stop": ""}, "stop"), ({"stop": 5}, "stop"), ({"logit_bias": {1: 10**400}}, "logit_bias"), ({"logprobs": -1}, "logprobs"),
    ({"logit_bias": [1]}, "logit_bias"), ({"logit_bias": {-1: 0.0}}, "logit_bias"), ({"logit_bias": {1: float("inf")}}, "logit_bias"),
    ({"grammar": ""}, "grammar"), ({"grammar": 'root ::= "a"', "json_schema": {}}, "not both"),
])
def test_a_wrong_value_is_named(given, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**given)


@pytest.mark.parametrize("given, words", [
    ({"grammar": "rot ::= \"a\""}, "root"), ({"grammar": "root ::= root \"a\""}, "left recursion"), ({"grammar": "root ::= ("}, "GBNF"),
    ({"json_schema": "{"}, "json_schema"), ({"json_schema": []}, "json_schema"), ({"json_schema": {"type": "strange"}}, "strange"),
    ({"json_schema": {"x": {1, 2}}}, "json_schema"), ({"logit_bias": {10**6: 1.0}}, "vocabulary"), ({"sampling_params": {}}, "SamplingParams"),
])
def test_what_only_the_model_can_tell_is_told_before_anything_is_evaluated(llm, given, words):
    llm.prefill("One two")
    n = llm.n_tokens
    with pytest.raises(ValueError, match=words):
        llm.generate(PROMPT, **given)
    with pytest.raises(ValueError, match=words):
        llm.generate_batch([PROMPT], **given)
    with pytest.raises(ValueError, match=words):
        llm.pipeline("A text.", ["Why?"], **given)
    assert llm.n_tokens == n
    llm.reset()


def test_an_unknown_name_is_a_type_error(llm):
    for call in (lambda: llm.generate(PROMPT, tempreature=1), lambda: llm.generate_batch([PROMPT], tempreature=1)):
        with pytest.raises(TypeError, match="'tempreature': did you mean 'temperature'"):
            call()
    for name, says in (("temp", "did you mean 'temperature'"), ("kv_buget", "did you mean 'kv_budget'"),
                       ("xyzzy", "there are .*kv_query")):
        with pytest.raises(TypeError, match=says):
            llm.generate(PROMPT, **{name: 1})


def test_a_seed_of_minus_1_is_a_random_one(llm, model_path):
    hot = dict(max_tokens=12, temperature=2.0, top_k=0, top_p=1.0, min_p=0.0)
    assert len({tuple(llm.generate(PROMPT, seed=-1, **hot).tokens) for _ in range(3)}) == 3
    with pykvc.LLM(model_path, n_ctx=256, seed=-1) as other:
        assert other.generate(PROMPT, **hot).tokens != other.generate(PROMPT, **hot).tokens


def test_params_are_the_names_and_a_name_beside_them_wins(llm):
    how = SamplingParams(max_tokens=12, temperature=1.0, seed=7, repeat_penalty=1.1, presence_penalty=0.3, frequency_penalty=0.2, typical_p=0.9)
    by_name = llm.generate(PROMPT, **{f.name: getattr(how, f.name) for f in fields(how)})
    assert llm.generate(PROMPT, sampling_params=how).tokens == by_name.tokens
    assert llm.generate(PROMPT, sampling_params=how, max_tokens=5).tokens == by_name.tokens[:5]
    assert llm.generate(PROMPT, sampling_params=replace(how, seed=8)).tokens != by_name.tokens


def test_each_prompt_of_a_batch_has_its_own(llm):
    how = [SamplingParams(max_tokens=3), SamplingParams(max_tokens=6, logprobs=1), SamplingParams(max_tokens=4, temperature=1, seed=3)]
    answers = llm.generate_batch([PROMPT]*3, sampling_params=how)
    assert [len(a.tokens) for a in answers] == [3, 6, 4]
    assert [a.logprobs is None for a in answers] == [True, False, True]
    for answer, own in zip(answers[:2], how):  # a random one turns on how logits are rounded in a batch
        assert answer.text == llm.generate(PROMPT, sampling_params=own).text
    with pytest.raises(ValueError, match="list of 3"):
        llm.generate_batch([PROMPT]*3, sampling_params=how[:2])


def test_a_bias_forbids_and_forces(llm):
    free = llm.generate(PROMPT, max_tokens=1).tokens[0]
    assert llm.generate(PROMPT, max_tokens=1, logit_bias={free: float("-inf")}).tokens[0] != free
    assert llm.generate(PROMPT, max_tokens=4, logit_bias={100: 1000.0}).tokens == [100]*4


def test_penalties_change_what_repeats(llm):
    loop = "again and again and again and again and again and"
    repeated = llm.generate(loop, max_tokens=24).tokens
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 5.0}, {"repeat_penalty": 1.5}):
        varied = llm.generate(loop, max_tokens=24, **penalty).tokens
        assert len(set(varied)) > len(set(repeated)), penalty


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_follows_its_schema(llm, temperature):
    for seed in range(3):
        answer = llm.generate("A city: ", max_tokens=80, json_schema=CITY, temperature=temperature, seed=seed)
        assert answer.stop_reason == "eos"
        found = json.loads(answer.text)
        assert set(found) == {"city", "size"} and found["size"] in ("small", "large")


def test_a_grammar_and_a_schema_as_text_are_the_same(llm):
    as_dict = llm.generate("A city: ", max_tokens=60, json_schema=CITY)
    as_text = llm.generate("A city: ", max_tokens=60, json_schema=json.dumps(CITY))
    as_gbnf = llm.generate("A city: ", max_tokens=60, grammar=_core.json_schema_to_grammar(json.dumps(CITY)))
    assert as_dict.tokens == as_text.tokens == as_gbnf.tokens


def test_a_grammar_holds_under_a_policy_in_a_batch_and_in_a_chat(model_path):
    grammar = 'root ::= ("yes" | "no") "."'
    with pykvc.LLM(model_path, n_ctx=512, n_seq_max=2, kv_policy="snapkv:window=8", kv_budget=24) as llm:
        long = "One two three four five six seven eight nine ten. "*6
        assert llm.generate(long, grammar=grammar).text in ("yes.", "no.")
        assert {a.text for a in llm.generate_batch([long, PROMPT, long], grammar=grammar)} <= {"yes.", "no."}
        assert llm.chat([{"role": "user", "content": "Is it?"}], grammar=grammar).text in ("yes.", "no.")
        assert llm.conversation().ask("Is it?", sampling_params=SamplingParams(grammar=grammar)).text in ("yes.", "no.")


def test_logprobs_are_those_of_the_logits(llm):
    answer = llm.generate(PROMPT, max_tokens=6, logprobs=3, temperature=0.8, seed=1, logit_bias={5: 2.0})
    assert len(answer.logprobs) == len(answer.tokens) == 6
    prompt = llm.tokenize(PROMPT)
    llm.reset()
    logits = llm.evaluate(prompt + answer.tokens)[len(prompt) - 1:-1].astype(np.float64)
    rows = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    for row, found, token in zip(rows, answer.logprobs, answer.tokens):
        assert found.token == token and found.logprob == pytest.approx(row[token], abs=1e-2)
        assert [t.token for t in found.top] == sorted(range(len(row)), key=lambda t: (-row[t], t))[:3]
        assert [t.logprob for t in found.top] == pytest.approx(sorted(row)[::-1][:3], abs=1e-2)
        assert found.text == llm.detokenize([token]) and found.top[0].top == []
    llm.reset()


def test_logprobs_end_where_the_tokens_do(llm):
    answer = llm.generate("A city: ", max_tokens=80, json_schema=CITY, logprobs=0)
    assert answer.stop_reason == "eos" and len(answer.logprobs) == len(answer.tokens)
    assert all(one.top == [] for one in answer.logprobs)
    assert llm.generate(PROMPT, max_tokens=2).logprobs is None
    stream = llm.generate(PROMPT, max_tokens=3, logprobs=1, stream=True)
    "".join(stream)
    assert len(stream.result.logprobs) == 3


def test_conversation_keeps_its_own_number_of_tokens(llm):
    chat = llm.conversation()
    asked = []
    llm_chat, llm.chat = llm.chat, lambda *a, **how: asked.append(how["sampling_params"].max_tokens) or llm_chat(*a, **how)
    try:
        for how in ({}, {"max_tokens": 3}, {"sampling_params": SamplingParams(max_tokens=2)}):
            list(zip(range(1), chat.ask("Hello", stream=True, **how)))
            chat.end()
    finally:
        del llm.chat
    assert asked == [512, 3, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_that_takes_all_that_a_grammar_allows(llm, temperature):
    taken = {token: -float("inf") for word in ("y", "ye", "yes", "e", "es", "s") for token in llm.tokenize(word, add_special=False)}
    with pytest.raises(ValueError, match="logit_bias takes all that it allows"):
        llm.generate(PROMPT, grammar='root ::= "yes"', logit_bias=taken, max_tokens=8, temperature=temperature)
    assert llm.generate(PROMPT, grammar='root ::= "yes"', logit_bias={5: np.float32(1)}, max_tokens=8).text == "yes"


@pytest.mark.parametrize("how, match", [
    ({"grammar": "root ::= " + "("*100000 + '"a"' + ")"*100000}, "grammar has brackets 100000 deep"),
    ({"json_schema": '{"type": "array", "items": '*20000 + "{}" + "}"*20000}, "json_schema has brackets 20001 deep")])
def test_brackets_within_brackets(llm, how, match):
    with pytest.raises(ValueError, match=match):
        llm.generate(PROMPT, max_tokens=1, **how)
