"""LLM on SmolLM2-135M: the protocols, streams, saved states, and every mistake. Short prompts: this runs on 2 cores."""
import gc
import os
import weakref

import numpy as np
import pytest

import pykvc
import tiny
from pykvc import _core

SHOTS = [f"Q: What is {a} plus {b}?\nA: {a} plus {b} is {a + b}.\n\n" for a, b in [(2, 3), (4, 4), (1, 6), (7, 2), (5, 5), (3, 6), (8, 1), (2, 2)]]
QUESTION = "Q: What is 3 plus 3?\nA:"
PROMPT = "".join(SHOTS) + QUESTION


@pytest.fixture(scope="module")
def full(model_path):
    with pykvc.LLM(model_path, n_ctx=1024) as llm:
        yield llm


@pytest.fixture(scope="module")
def half(model_path):
    """snapkv at half the prompt."""
    with pykvc.LLM(model_path, n_ctx=1024, kv_policy="snapkv:window=16", kv_budget=0.5) as llm:
        yield llm


# -- answers --------------------------------------------------------------------------------------------------------

def test_generate(full):
    answer = full.generate(PROMPT, max_tokens=12)
    assert answer.n_prompt == len(full.tokenize(PROMPT)) and answer.n_predicted == len(answer.tokens) <= 12
    assert answer.text and answer.stop_reason in ("length", "eos")
    assert answer.kv["kept"] and set(answer.kv["kept"]) == {answer.n_prompt} and answer.kv["bytes_used"] == answer.kv["bytes_full"]
    assert answer.timings["prefill_tps"] > 0 and answer.timings["evict_ms"] < answer.timings["prefill_ms"]
    assert full.generate(PROMPT, max_tokens=12).tokens == answer.tokens
    assert full.generate(tokens=full.tokenize(PROMPT), max_tokens=12).tokens == answer.tokens


def test_stream_gives_the_same_text(full):
    whole = full.generate(PROMPT, max_tokens=12, echo=True)
    stream = full.generate(PROMPT, max_tokens=12, echo=True, stream=True)
    with pytest.raises(ValueError, match="not ended"):
        stream.result
    assert "".join(stream) == whole.text == stream.result.text and whole.text.startswith(PROMPT)


def test_stop_strings_never_leak(full):
    text = full.generate(PROMPT, max_tokens=12).text
    stop = text[3:6]
    stream = full.generate(PROMPT, max_tokens=12, stop=[stop, "never to be seen"], stream=True)
    assert "".join(stream) == text[:text.index(stop)] and stream.result.stop_reason == "stop"


def test_an_abandoned_stream_is_over(full):
    stream = full.generate(PROMPT, max_tokens=12, stream=True)
    next(stream)
    expected = full.generate(PROMPT, max_tokens=4).tokens
    with pytest.raises(RuntimeError, match="is over"):
        next(stream)
    assert full.generate(PROMPT, max_tokens=4).tokens == expected


def test_sampling_is_seeded(full):
    hot = dict(max_tokens=8, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0)
    first, again, other = (full.generate(PROMPT, seed=seed, **hot).tokens for seed in (1, 1, 2))
    assert first == again != other


def test_max_tokens_0_only_prefills(full):
    answer = full.generate(PROMPT, max_tokens=0)
    assert answer.tokens == [] and answer.stop_reason == "length" and full.n_tokens == answer.n_prompt
    assert full.logits().shape == (full._session.model.n_vocab,)


def test_going_on_equals_going_through(full):
    whole = full.generate(PROMPT, max_tokens=8).tokens
    head = full.generate(PROMPT, max_tokens=3).tokens
    tail = full.generate(max_tokens=5, reset=False).tokens
    assert head + tail == whole


def test_the_context_fills(model_path):
    with pykvc.LLM(model_path, n_ctx=256) as llm:
        n_ctx = llm.n_ctx
        answer = llm.generate(tokens=llm.tokenize(PROMPT * 3)[:n_ctx - 4], max_tokens=-1)
        assert answer.stop_reason in ("context", "eos") and llm.n_tokens <= n_ctx


def test_interrupt_leaves_it_usable(full, monkeypatch):
    expected = full.generate(PROMPT, max_tokens=6).tokens
    session, calls, decode = full._session, [], full._session.decode

    def interrupted(ids):
        calls.append(ids)
        if len(calls) == 4:
            raise KeyboardInterrupt
        decode(ids)
    monkeypatch.setattr(session, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        full.generate(PROMPT, max_tokens=6)
    monkeypatch.undo()
    assert full.n_tokens == session.ctx.pos_max() + 1
    assert full.generate(PROMPT, max_tokens=6).tokens == expected


def test_interrupt_within_a_span_leaves_it_usable(model_path, monkeypatch):
    """Spans of what was not evaluated are gone with it."""
    with pykvc.LLM(model_path, n_ctx=512, n_batch=32, n_ubatch=32, kv_policy="shotkv:window=8,recent=8", kv_budget=64) as llm:
        text = "This is a sentence about rivers. "*12

        def interrupted(self, ids):
            self.decode(ids[:40])
            raise KeyboardInterrupt
        monkeypatch.setattr(type(llm._session), "_decode_prompt", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.prefill(text)
        monkeypatch.undo()
        assert 0 < llm.n_tokens == 40 and all(end <= 40 for _, end in llm._session.spans)
        llm.prefill(" And some more.")
        assert llm.generate(" Of it the", reset=False, max_tokens=3).n_predicted == 3


def test_interrupt_under_h2o_leaves_it_usable(model_path, monkeypatch):
    """No tail of it can be removed: the tokens that were evaluated stay, and the next prompt begins anew."""
    decode = _core.Context.decode
    with pykvc.LLM(model_path, n_ctx=256, kv_policy="h2o", kv_budget=48) as llm:
        expected = llm.generate(PROMPT, max_tokens=6).tokens
        for n_calls in (1, 2, 4):  # in the prompt, in the answer before and after another token
            calls = []

            def interrupted(*args, **kwargs):  # the engine looks for signals after a llama_decode
                decode(*args, **kwargs)
                calls.append(args)
                if len(calls) == n_calls:
                    raise KeyboardInterrupt
            monkeypatch.setattr(_core.Context, "decode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(PROMPT, max_tokens=6)
            monkeypatch.undo()
            assert llm.n_tokens == llm._session.ctx.pos_max() + 1 > 0
            assert llm.generate(PROMPT, max_tokens=6).tokens == expected


# -- eviction -------------------------------------------------------------------------------------------------------

def test_question_in(half, full):
    answer = half.generate(PROMPT, max_tokens=8)
    assert sum(answer.kv["kept"])/len(answer.kv["kept"]) == int(0.5*answer.n_prompt + 0.5)
    assert answer.kv["evictions"] == half.generate(PROMPT, max_tokens=2).kv["evictions"] == 1 and answer.kv["bytes_used"] < answer.kv["bytes_full"]
    assert answer.tokens[0] == full.generate(PROMPT, max_tokens=1).tokens[0]  # sampled before the eviction


def test_question_out(half):
    context = "".join(SHOTS)

    def ask():
        half.reset()
        half.prefill(context)
        assert half.compress()
        return half.generate(QUESTION, reset=False, max_tokens=6)
    answer = ask()
    n_context = len(half.tokenize(context))
    assert set(answer.kv["kept"]) == {int(0.5*n_context + 0.5)} and answer.n_prompt == n_context + len(half.tokenize(QUESTION))
    assert answer.timings["evict_ms"] > 0 and ask().tokens == answer.tokens
    assert answer.kv["evictions"] == 1 and half.generate(QUESTION, reset=False, max_tokens=2).kv["evictions"] == 0


@pytest.mark.parametrize("policy", ["snapkv:window=8", "shotkv:window=8", "keydiff", "h2o", "pyramidkv:window=8", "adakv:window=8"])
def test_the_budget_holds_on_every_turn(model_path, tmp_path, policy):
    """Whether or not the first one was below it; also after a file. What goes on from an answer is no prompt, and evicts nothing."""
    with pykvc.LLM(model_path, n_ctx=512, n_threads=1, kv_policy=policy, kv_budget=48) as llm:
        mean = lambda kept: round(sum(kept)/len(kept)) if not policy.startswith("adakv") else round(np.mean([(k >= 0).sum()/len(k) for k in llm.kept()]))
        assert llm.generate("Hello.", max_tokens=2).kv["evictions"] == 0
        for turn in range(3):
            answer = llm.generate("".join(SHOTS[turn:turn + 2]) + QUESTION, reset=False, max_tokens=1)
            assert mean(answer.kv["kept"]) == 48 and answer.kv["evictions"] == 1
        assert llm.generate(reset=False, max_tokens=3).kv["evictions"] == 0
        llm.save(tmp_path/"state")
        llm.reset()
        llm.load(tmp_path/"state")
        assert llm.generate(reset=False, max_tokens=3).kv["evictions"] == 0
        assert llm.generate(QUESTION, reset=False, max_tokens=1).kv["evictions"] == 1


def test_what_compress_left_is_asked_as_it_is(half):
    """compress() by hand: the questions after it are not evicted, until the next reset. compress=False: this prompt is not."""
    half.reset()
    half.prefill(PROMPT)
    assert half.compress()
    n_evictions = half.stats()["n_evictions"]
    for _ in range(2):
        half.generate(QUESTION, reset=False, max_tokens=2)
        assert half.stats()["n_evictions"] == n_evictions
    assert half.generate(PROMPT, max_tokens=2).kv["evictions"] == 1
    half.generate(PROMPT, max_tokens=2, compress=False)
    assert half.stats()["cells"] == half.n_tokens


def test_a_budget_without_a_policy_takes_the_recommended_one(model_path, capsys):
    recommended = next(p["name"] for p in _core.policies() if p["recommended"])
    for how in ({"kv_budget": 0.5}, {"kv_decode_budget": 64}, {"kv_cells": 256, "n_ubatch": 64}):
        with pykvc.LLM(model_path, n_ctx=512, **how) as llm:
            assert llm.policy.startswith(recommended) and f"kv_policy: {recommended}" in capsys.readouterr().err
    with pykvc.LLM(model_path, n_ctx=512) as llm:
        assert llm.policy == "full" and not capsys.readouterr().err
    with pytest.raises(ValueError, match="the policy is full"):
        pykvc.LLM(model_path, kv_policy="full", kv_budget=0.5)


def test_a_budget_of_one_prompt(half, full, tmp_path):
    """Until the next reset or load."""
    n = len(half.tokenize(PROMPT))
    assert set(half.generate(PROMPT, kv_budget=40, max_tokens=2).kv["kept"]) == {40}
    assert set(half.generate(" And 4?", reset=False, compress=True, max_tokens=1).kv["kept"]) == {40}
    assert set(half.generate(PROMPT, max_tokens=2).kv["kept"]) == {n//2}
    half.reset()
    half.prefill(PROMPT)
    half.save(tmp_path/"whole")
    for budget, kept in (("30%", round(0.3*n)), (50, 50), (None, n//2)):
        half.load(tmp_path/"whole")
        assert half.compress(kv_budget=budget) and set(half.stats()["kept"]) == {kept}
    with pykvc.LLM(half.path, n_ctx=1024, kv_policy="streaming_llm:interval=4", kv_decode_budget=8) as llm:
        for budget in ({}, dict(kv_decode_budget=4)):
            with pytest.raises(ValueError, match="kv_budget"):
                llm.compress(**budget)
        llm.prefill(PROMPT)
        assert llm.compress(kv_budget=40, kv_decode_budget=20)
        llm.evaluate([5]*40, generated=True)
        assert 40 + 20 <= llm.stats()["kept"][0] <= 40 + 20 + 4
        assert set(llm.generate(PROMPT, kv_budget=40, max_tokens=2).kv["kept"]) == {40}
    for llm, budget, says in ((half, 3, "at least"), (half, "x", "kv_budget"), (full, 40, "the policy is full")):
        before = llm.n_tokens, list(llm.stats()["kept"])
        for call in (lambda: llm.generate(PROMPT, kv_budget=budget), lambda: llm.compress(kv_budget=budget)):
            with pytest.raises(ValueError, match=says):
                call()
        assert (llm.n_tokens, list(llm.stats()["kept"])) == before


FORCED = [(policy["name"] + ":interval=32"*any(p["name"] == "interval" and p["value"] != "32" for p in policy["params"]), {})
          for policy in _core.policies() if policy["decode"] != "none"]  # keydiff: layers differ


@pytest.mark.parametrize("name, more", [*FORCED, ("finch", dict(kv_cells=256, n_ubatch=32)),
                                        ("snapkv:window=16", dict(kv_cells=256, n_ubatch=32)), ("full", {})])
def test_an_answer_that_is_given_is_evicted_as_one_that_is_generated(model_path, name, more):
    decodes = (name, {}) in FORCED
    how = {} if name == "full" else dict(kv_policy=name, kv_budget=0.5, kv_decode_budget=0.25 if decodes else None, **more)
    query = dict(kv_query=QUESTION) if name == "finch" else {}
    with pykvc.LLM(model_path, n_ctx=1024, n_threads=2, **how) as llm:
        answer = llm.generate(PROMPT, max_tokens=120 + 80*bool(more), **query)
        sampled = llm.stats()
        llm.reset()
        calls, decode = [], llm._session.decode
        llm.prefill(PROMPT, **query)
        first = llm.logits()
        if how:
            llm.compress()
        llm._session.decode = lambda ids, **rest: calls.append(len(ids)) or decode(ids, **rest)
        logits = llm.evaluate(answer.tokens[:-1], generated=True)
        forced = llm.stats()
    assert len(calls) < len(answer.tokens)/3
    if name == "keydiff":  # what many tokens at once leave in the cache rounds differently, and a layer may be a cell longer for it
        assert max(abs(a - b) for a, b in zip(forced["kept"], sampled["kept"])) <= 2
        forced["kept"] = sampled["kept"]
    assert [forced[what] for what in ("kept", "bytes_used")] == [sampled[what] for what in ("kept", "bytes_used")]
    assert forced["n_evictions"] - sampled["n_evictions"] == sampled["n_evictions"] >= (3 if decodes else bool(how))
    assert logits.shape == (len(answer.tokens) - 1, *first.shape)
    same = np.vstack([first[None], logits]).argmax(axis=1) == answer.tokens
    assert same.mean() > 0.9  # rounding turns what is nearly as likely


def test_an_answer_needs_a_prompt(full):
    full.reset()
    with pytest.raises(ValueError, match="prefill"):
        full.evaluate([1, 2], generated=True)


def test_kept_and_scores(half):
    answer = half.generate(PROMPT, max_tokens=1)
    kept, scores = half.kept(), half.scores()
    assert [k.shape[1] for k in kept] == answer.kv["kept"] == half.stats()["kept"]
    for k, s in zip(kept, scores):
        assert k.dtype == np.int32 and s.dtype == np.float32 and k.shape == s.shape
        assert (np.diff(k, axis=1) > 0).all() and k.max() == answer.n_prompt - 1 and not np.isnan(s).any()


def test_shots_live_or_die_as_wholes(model_path):
    with pykvc.LLM(model_path, n_ctx=1024, kv_policy="shotkv", kv_budget=0.6) as llm:
        answer = llm.generate(shots=SHOTS, question=QUESTION, max_tokens=1)
        assert answer.n_prompt == len(llm.tokenize(PROMPT))
        spans = llm._session.spans
        assert len(spans) == len(SHOTS) and spans[-1][1] == answer.n_prompt - len(llm.tokenize(QUESTION, add_special=False))
        for layer in llm.kept():
            held = set(layer[0].tolist())
            parts = [sum(p in held for p in range(*span))/(span[1] - span[0]) for span in spans]
            # in part only: the first (sinks), the last (window), and one that takes the rest of the budget
            assert sum(0 < part < 1 for part in parts) <= 3 and 1 in parts
            assert set(range(spans[-1][1], answer.n_prompt)) <= held


def test_spans_by_segment_are_those_of_the_shots(model_path):
    with pykvc.LLM(model_path, n_ctx=1024, kv_policy="shotkv", kv_budget=0.6) as llm:
        llm.generate(shots=SHOTS, question=QUESTION, max_tokens=1)
        by_shots, kept = llm._session.spans, llm.kept()
        llm.generate(PROMPT, spans=by_shots, max_tokens=1)
        assert all((a == b).all() for a, b in zip(llm.kept(), kept))
        llm.reset()
        llm.prefill(PROMPT, segment="re:^Q: ")
        assert llm._session.spans[:-1] == by_shots  # the last one is the question
        llm.generate(PROMPT, max_tokens=1)
        assert len(llm._session.spans) > len(SHOTS)  # sentences: questions and answers apart


def test_chat(model_path):
    messages = [{"role": "system", "content": "You answer briefly."}, {"role": "user", "content": "What is 2 plus 3?"},
                {"role": "assistant", "content": "2 plus 3 is 5."}, {"role": "user", "content": "And 4 plus 4?"}]
    with pykvc.LLM(model_path, n_ctx=512, kv_policy="shotkv:window=8", kv_budget=0.9) as llm:
        assert "".join(m["content"] for m in messages[:1]) in llm.apply_chat_template(messages)
        assert llm.chat(messages, max_tokens=8).text and len(llm._session.spans) == 2


# -- policies in Python -----------------------------------------------------------------------------------------------

class OldestFirst(pykvc.Policy):
    name = "oldest_first"

    def score(self, layer):
        return -layer.pos


class MyWindow(pykvc.Policy):
    name, window, sinks, recent = "my_window", 16, 4, 16

    def score(self, layer):
        assert layer.attn.shape == (layer.n_head, layer.n_kv) and layer.keys is None
        return layer.attn.reshape(layer.n_head_kv, -1, layer.n_kv).mean(axis=1)


class Expected(pykvc.Policy):
    """expected_attention without the covariance and the sinks."""
    name, window, future, keys, values, recent = "expected", 24, 64, True, True, 32

    def score(self, layer):
        assert layer.attn is None and layer.n_query == 24 and layer.q_cov.shape == (layer.n_head, layer.head_dim, layer.head_dim)
        x = np.einsum("kgd,knd->kgn", layer.q_mean.reshape(layer.n_head_kv, -1, layer.head_dim), layer.keys)
        x = np.exp(x - x.max(axis=2, keepdims=True))
        return (x / x.sum(axis=2, keepdims=True)).mean(axis=1) * layer.v_norm


class EveryOther(OldestFirst):
    name = "every_other"

    def budgets(self, request):
        return [request.budget] * len(request.layers)

    def keep(self, layer_index, request, n_keep):
        return np.tile(np.arange(n_keep) * 2, (request.layers[layer_index].pos.shape[0], 1))


@pytest.mark.parametrize("policy, expected", [(OldestFirst(), lambda n: range(50)), (EveryOther(), lambda n: range(0, 100, 2))])
def test_python_policy_decides(model_path, policy, expected):
    with pykvc.LLM(model_path, n_ctx=512, kv_policy=policy, kv_budget=50) as llm:
        answer = llm.generate(PROMPT, max_tokens=1)
        assert set(answer.kv["kept"]) == {50} and policy.name in llm.policy
        assert all((layer == list(expected(answer.n_prompt))).all() for layer in llm.kept())


def test_python_policy_sees_attention(model_path):
    with pykvc.LLM(model_path, n_ctx=512, kv_policy=MyWindow(), kv_budget=50) as llm:
        n = llm.generate(PROMPT, max_tokens=4).n_prompt
        for layer in llm.kept():
            assert set(range(4)) | set(range(n - 16, n)) <= set(layer[0].tolist())


def test_python_policy_sees_expected_queries(model_path):
    with pykvc.LLM(model_path, n_ctx=512, kv_policy=Expected(), kv_budget=50) as llm:
        n = llm.generate(PROMPT, max_tokens=4).n_prompt
        for layer in llm.kept():
            assert layer.shape[1] == 50 + 3 and set(range(n - 32, n)) <= set(layer[0].tolist())


def test_python_policy_mistakes(model_path):
    class Wrong(OldestFirst):
        def score(self, layer):
            return layer.pos[:, :3]
    with pykvc.LLM(model_path, n_ctx=512, kv_policy=Wrong(), kv_budget=50) as llm:
        with pytest.raises(ValueError, match="oldest_first.score"):
            llm.generate(PROMPT, max_tokens=2)
        assert llm.generate(PROMPT, max_tokens=2, compress=False).n_predicted == 2
    for score in (lambda self, layer: layer.attn.mean(axis=0), lambda self, layer: layer.attn):  # without window
        policy = type("Forgot", (OldestFirst,), {"score": score})()
        with pykvc.LLM(model_path, n_ctx=512, kv_policy=policy, kv_budget=50) as llm:
            with pytest.raises(ValueError, match=r"None.*layer.attn \(set window\)"):
                llm.generate(PROMPT, max_tokens=2)
    for cls, says in ((type("NoScore", (pykvc.Policy,), {"name": "a"}), "no score"), (type("Named", (OldestFirst,), {"name": "full"}), "built-in"),
                      (type("Late", (OldestFirst,), {"decode": "later"}), "decode"), (type("Minus", (OldestFirst,), {"window": -1}), "window"),
                      (type("Unfitted", (OldestFirst,), {"future": 8}), "window")):
        with pytest.raises(ValueError, match=says):
            pykvc.LLM(model_path, kv_policy=cls(), kv_budget=50)


# -- truncate, save, load -----------------------------------------------------------------------------------------------

def test_truncate(full, half):
    full.generate(PROMPT, max_tokens=4)
    tokens = full.tokenize(PROMPT)
    full.truncate(len(tokens) - 5)
    with pytest.raises(ValueError, match="nothing to go on from"):
        full.generate(reset=False)
    branch = full.generate(tokens=tokens[-5:], reset=False, max_tokens=6).tokens
    full.reset()
    full.prefill(tokens=tokens[:-5])
    assert branch == full.generate(tokens=tokens[-5:], reset=False, max_tokens=6).tokens

    n = half.generate(PROMPT, max_tokens=4).n_prompt
    floor = half._session.ctx.pos_floor()
    assert 0 < floor <= n
    with pytest.raises(ValueError, match=str(floor)):
        half.truncate(floor - 1)
    half.truncate(half.n_tokens)
    half.truncate(0)
    assert half.n_tokens == 0


@pytest.mark.parametrize("pending", [True, False])
def test_save_and_load(half, tmp_path, pending):
    path = tmp_path / "state"
    half.reset()
    half.prefill(PROMPT)
    half.compress()
    head = half.generate(reset=False, max_tokens=3).tokens if pending else []
    half.save(path)
    kept, logits = half.kept(), half.logits()
    expected = half.generate(reset=False, max_tokens=5).tokens
    half.generate("Something else.", max_tokens=2, compress=False)
    half.load(path)
    assert half.n_tokens == len(half.tokenize(PROMPT)) + max(0, len(head) - 1)
    assert all((a == b).all() for a, b in zip(half.kept(), kept)) and (half.logits() == logits).all()
    assert half.generate(reset=False, max_tokens=5).tokens == expected


def test_heads_that_differ(full, model_path, tmp_path):
    """adakv: a head of a layer keeps the budget on average, takes the memory of what it keeps, and all goes on from there."""
    how = dict(n_ctx=1024, kv_policy="adakv:window=16", kv_budget=0.5)
    with pykvc.LLM(model_path, **how) as llm, pykvc.LLM(model_path, n_ctx=1024, kv_policy="snapkv:window=16", kv_budget=0.5) as even:
        answer, same = llm.generate(PROMPT, max_tokens=8), even.generate(PROMPT, max_tokens=1)
        n = int(0.5*answer.n_prompt + 0.5)
        assert answer.tokens[0] == full.generate(PROMPT, max_tokens=1).tokens[0]
        llm.truncate(answer.n_prompt)
        assert all((k >= 0).sum() == n*len(k) and k.min() == -1 for k in llm.kept())
        assert [k.shape[1] for k in llm.kept()] == llm.stats()["kept"] == answer.kv["kept"]
        assert same.kv["bytes_used"] == llm.stats()["bytes_used"] < full.generate(PROMPT, max_tokens=1).kv["bytes_used"]
        assert all((np.isneginf(s) == (k < 0)).all() for s, k in zip(llm.scores(), llm.kept()))
        assert not llm.compress()  # it is met

        llm.prefill(PROMPT)
        assert llm.compress()
        llm.save(tmp_path / "state")
        kept, expected = llm.kept(), llm.generate(reset=False, max_tokens=5).tokens
        llm.load(tmp_path / "state")
        assert all((a == b).all() for a, b in zip(llm.kept(), kept)) and llm.generate(reset=False, max_tokens=5).tokens == expected
        floor = llm._session.ctx.pos_floor()
        with pytest.raises(ValueError, match=str(floor)):
            llm.truncate(floor - 1)
        llm.truncate(floor)
        assert llm.generate(QUESTION, reset=False, max_tokens=3).n_predicted == 3


def test_a_model_without_a_tokenizer_answers_in_tokens(tmp_path):
    with pykvc.LLM(tiny.write(tmp_path/"model.gguf"), n_ctx=256, n_seq_max=2) as llm:
        alone = llm.generate(tokens=list(range(50)), max_tokens=8)
        assert (alone.text, len(alone.tokens), alone.n_predicted) == ("", 8, 8)
        assert [one.tokens for one in llm.generate_batch([list(range(50))]*2, max_tokens=8)] == [alone.tokens]*2
        for call in (lambda: llm.detokenize([1]), lambda: llm.generate("text", max_tokens=1), lambda: llm.generate(tokens=[1], echo=True, max_tokens=1)):
            with pytest.raises(ValueError, match="no tokenizer"):
                call()


def test_a_state_of_other_weights_is_refused(tmp_path):
    """Base and instruct have one architecture and one size."""
    a, b = (tiny.write(tmp_path/f"{seed}.gguf", seed=seed) for seed in (0, 1))
    with pykvc.LLM(a, n_ctx=256) as one, pykvc.LLM(b, n_ctx=256) as other:
        one.prefill(tokens=list(range(100)))
        one.save(tmp_path/"state")
        with pytest.raises(ValueError, match="weights"):
            other.load(tmp_path/"state")


def test_load_says_what_differs(half, full, model_path, tmp_path):
    path, cut, foreign = tmp_path / "state", tmp_path / "cut", tmp_path / "foreign"
    half.generate(PROMPT, max_tokens=2)
    half.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    data = path.read_bytes()
    foreign.write_bytes(b"GGUF" + data)
    expected = full.generate(PROMPT, max_tokens=3).tokens
    with pytest.raises(ValueError, match="kv_policy"):
        full.load(path)
    with pytest.raises(ValueError, match="not a state"):
        full.load(foreign)
    with pytest.raises(ValueError, match="cannot read"):
        full.load(tmp_path / "none")
    for n in (3, 8, 20, 400, len(data) - 1):
        cut.write_bytes(data[:n])
        with pytest.raises(ValueError, match="truncated|damaged|not a state"):
            half.load(cut)
    cut.write_bytes(data[:-50] + bytes([data[-50] ^ 1]) + data[-49:])
    with pytest.raises(ValueError, match="checksum"):
        half.load(cut)
    at = data.index(b'"tokens"') + 12  # the header is under it, too: a digit of a token
    at = next(i for i in range(at, len(data)) if data[i:i + 1].isdigit())
    cut.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
    with pytest.raises(ValueError, match="checksum"):
        half.load(cut)
    half.load(path)
    assert full.generate(PROMPT, max_tokens=3).tokens == expected


# -- mistakes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, says", [
    (dict(n_seq_max=6, n_batch=4), "n_seq_max"), (dict(n_ctx=-1), "n_ctx"), (dict(n_batch=0), "n_batch"), (dict(n_threads=True), "n_threads"), (dict(type_k="q3"), "q8_0"),
    (dict(flash_attn="yes"), "flash_attn"), (dict(kv_policy="snapvk", kv_budget=9), "snapkv"), (dict(kv_policy=3), "kv_policy"),
    (dict(kv_policy=OldestFirst, kv_budget=9), "instance"), (dict(kv_policy="snapkv"), "kv_budget"), (dict(kv_budget=True), "kv_budget"),
    (dict(kv_policy="snapkv", kv_budget=1.5), "ratio"), (dict(kv_policy="snapkv", kv_budget=0), "kv_budget"),
    (dict(kv_policy="snapkv", kv_budget="120%"), "kv_budget"), (dict(kv_policy="snapkv:windw=3", kv_budget=9), "window"),
    (dict(kv_policy="snapkv:window=32", kv_budget=20), "33"), (dict(model="nothing.gguf"), "does not exist"),
    (dict(model=3), "a string, not 3"), (dict(model=b"x"), "a string, not b'x'"), (dict(seed=-2), "seed"), (dict(model=__file__), "GGUF"),
])
def test_bad_set_up(model_path, arguments, says):
    with pytest.raises(ValueError, match=says):
        pykvc.LLM(**{"model": model_path, "n_ctx": 256, **arguments})


@pytest.mark.parametrize("arguments, says", [
    (dict(), "give a prompt"), (dict(prompt=""), "empty"), (dict(prompt=3), "string"), (dict(prompt=[1, 2]), "go as tokens="), (dict(prompt="a", tokens=[1]), "one of them"),
    (dict(tokens=[-1]), "token id"), (dict(tokens=[10**6]), "token id"), (dict(prompt="a", max_tokens=-2), "max_tokens"),
    (dict(prompt="a", temperature=-1), "temperature"), (dict(prompt="a", top_p=2), "top_p"), (dict(prompt="a", stop=[""]), "stop"),
    (dict(prompt="a b c d", spans=[(0, 2), (1, 3)]), "overlaps"), (dict(prompt="a b", spans=[(0, 99)]), "leaves"),
    (dict(prompt="a b", spans=[(0, 9)], span_unit="chars"), "characters"), (dict(prompt="a b", spans=[(0, 1)], span_unit="bytes"), "span_unit"),
    (dict(prompt="a b", spans=[(0, 1)], segment="sentence"), "not both"), (dict(prompt="a b", segment="re:("), "regular"),
    (dict(shots=["a"]), "question"), (dict(question="a"), "shots"), (dict(shots="a", question="b"), "list"),
    (dict(shots=["a"], question="b", prompt="c"), "beside"), (dict(prompt="word " * 2000), "n_ctx is 1024"),
])
def test_bad_call_changes_nothing(full, arguments, says):
    full.reset()
    full.prefill("The sky is")
    n_tokens = full.n_tokens
    with pytest.raises(ValueError, match=says):
        full.generate(**arguments)
    assert full.n_tokens == n_tokens and full.generate(reset=False, max_tokens=1).n_predicted == 1


def test_close_frees_at_once(model_path):
    """Not when the garbage collector comes by: a model is hundreds of megabytes."""
    llm = pykvc.LLM(model_path, n_ctx=256, kv_policy="finch", kv_budget=64)
    session = weakref.ref(llm._session)
    gc.disable()
    try:
        llm.close()
        assert session() is None
    finally:
        gc.enable()


def test_the_same_file_is_loaded_once(model_path, tmp_path):
    """One copy of the weights for two LLMs, until both are closed; another file, or one that changed, has its own."""
    path = tmp_path/"model.gguf"
    path.write_bytes(model_path.read_bytes())
    one, two, other = (pykvc.LLM(p, n_ctx=128, kv_policy=policy, kv_budget=budget) for p, policy, budget in (
        (path, "full", None), (path, "tova", 32), (model_path, "full", None)))
    model = weakref.ref(one._session.model)
    assert two._session.model is model() and other._session.model is not model()
    tokens = one.generate(PROMPT[:60], max_tokens=4).tokens
    one.close()
    assert two.generate(PROMPT[:60], max_tokens=4, compress=False).tokens == tokens
    os.utime(path, (1, 1))
    with pykvc.LLM(path, n_ctx=128) as later:
        assert later._session.model is not model()
    two.close()
    assert model() is None
    other.close()


def test_closed(model_path):
    llm = pykvc.LLM(model_path, n_ctx=256)
    llm.close()
    for call in (lambda: llm.generate("a"), lambda: llm.tokenize("a"), llm.kept, llm.reset, llm.stats):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_text_round_trip(full):
    for text in ("Grüße, 世界! 🦙", "a\n\n b\t", "<|im_start|>user"):
        assert full.detokenize(full.tokenize(text)) == text
