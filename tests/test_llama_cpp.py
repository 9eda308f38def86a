"""llama-cpp-python on our library: theirs where the policy is off, pykvc.LLM's tokens where it is on."""
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pykvc
from pykvc import llama_cpp
from pykvc.llama_cpp import Llama

QA = [f"Q: What is {a} plus {b}?\nA: {a} plus {b} is {a + b}.\n\n" for a, b in [(2, 3), (4, 4), (1, 6), (7, 2), (5, 5), (3, 6), (8, 1), (2, 2)]]
PROMPT = "".join(QA) + "Q: What is 3 plus 3?\nA:"
HOW = dict(n_ctx=1024, n_threads=2, flash_attn=False)
SNAPKV = dict(kv_policy="snapkv:window=16", kv_budget=64)
MESSAGES = [{"role": "system", "content": "You add numbers. " + " ".join(QA)}, {"role": "user", "content": "What is 3 plus 4?"}]


def opened(model_path, **how) -> Llama:
    return Llama(str(model_path), **{**HOW, "n_threads_batch": 2, "verbose": False, **how})


def answer(llm, text=PROMPT, n=12):
    """n greedy tokens."""
    tokens = []
    for token in llm.generate(llm.tokenize(text.encode(), special=True), temp=0):
        tokens.append(token)
        if len(tokens) == n:
            return tokens


def n_evaluated(llm):
    """A list that grows by the number of tokens of each llama_decode."""
    counts, decode = [], llm._ctx.decode
    llm._ctx.decode = lambda batch: (counts.append(batch.batch.n_tokens), decode(batch))[1]
    return counts


@pytest.fixture(scope="module")
def snapkv(model_path):
    llm = opened(model_path, **SNAPKV)
    yield llm
    llm.close()


@pytest.fixture
def fresh(snapkv):
    snapkv.reset()
    return snapkv


# -- the same tokens ------------------------------------------------------------------------------------------------

class Newest(pykvc.Policy):
    name, decode = "newest", "none"

    def score(self, layer):
        return layer.pos.astype(np.float32)


@pytest.mark.parametrize("how", [
    dict(kv_policy="full"), dict(SNAPKV), dict(kv_policy="h2o", kv_budget="25%", kv_decode_budget=4), dict(kv_policy="pyramidkv:window=16", kv_budget=0.3),
    dict(kv_policy="shotkv:window=16,recent=16", kv_budget=0.5), dict(kv_policy="streaming_llm:interval=4", kv_budget=64, kv_decode_budget=4),
    dict(kv_policy="snapkv:window=16", kv_cells=256, n_ubatch=64), dict(kv_policy=Newest(), kv_budget=64)], ids=lambda how: str(how["kv_policy"]))
def test_as_llm(model_path, how):
    prompt = PROMPT if "kv_cells" not in how else "".join(QA) + PROMPT  # longer than the cells
    with pykvc.LLM(model_path, **HOW, **how) as llm:
        expected, kept, stats = llm.generate(prompt, max_tokens=12).tokens, llm.kept(), llm.stats()
    llm = opened(model_path, **how)
    assert answer(llm, prompt) == expected
    assert [k.tolist() for k in llm.kept()] == [k.tolist() for k in kept]
    mine = llm.kv_stats()
    assert {key for key in stats if key not in mine} == {"prefill_ms", "decode_ms"}
    for key in ("n_tokens", "cells", "cells_allocated", "bytes_allocated", "bytes_used", "bytes_full", "n_evictions", "n_evicted"):
        assert mine[key] == stats[key], key
    assert (mine["n_evictions"] > 0) == (how["kv_policy"] != "full")
    llm.close()


STOCK = """
import hashlib, json, sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=1024, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False)
answer = llm(sys.argv[2], max_tokens=12, temperature=0, logprobs=2)["choices"][0]
print(json.dumps([answer["text"], llm.input_ids[:llm.n_tokens].tolist(), hashlib.sha256(llm._scores.tobytes()).hexdigest(), answer["logprobs"]["token_logprobs"],
                  llm.create_chat_completion(json.loads(sys.argv[3]), max_tokens=12, temperature=0)["choices"][0]["message"]["content"],
                  len(llm.save_state().llama_state)], default=float))
"""


def test_policy_off_is_stock(model_path, stock):
    """Theirs on llama.cpp without us, and ours: the same logits, bit for bit."""
    def run(code, lib):
        return json.loads(_python(code, lib, str(model_path), PROMPT, json.dumps(MESSAGES)).stdout)
    ours = run(STOCK.replace("from llama_cpp", "from pykvc.llama_cpp"), "nowhere")
    assert ours == run(STOCK, stock.parent/"bin")


def _python(code, lib, *args, check=True, **env):
    done = subprocess.run([sys.executable, "-I", "-c", code, *args], text=True, capture_output=True, env={**os.environ, "LLAMA_CPP_LIB_PATH": str(lib), **env})
    assert not check or done.returncode == 0, done.stderr
    return done


# -- theirs, with evictions -----------------------------------------------------------------------------------------

def test_chat_and_stream(fresh):
    how = dict(messages=MESSAGES, max_tokens=12, temperature=0)
    whole = fresh.create_chat_completion(**how)
    assert fresh.kv_stats()["n_evictions"] >= 1 and whole["usage"]["prompt_tokens"] > 200 > fresh.kv_stats()["cells"]
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in fresh.create_chat_completion(**how, stream=True)]
    assert len(pieces) > 3 and "".join(pieces) == whole["choices"][0]["message"]["content"]


def test_a_chat_goes_on(fresh):
    counts = n_evaluated(fresh)
    first = fresh.create_chat_completion(MESSAGES, max_tokens=8, temperature=0)["choices"][0]["message"]
    n_first, counts[:] = sum(counts), []
    fresh.create_chat_completion([*MESSAGES, first, {"role": "user", "content": "And 5 plus 1?"}], max_tokens=8, temperature=0)
    assert counts[0] < 40 < n_first
    assert fresh.kv_stats()["cells"] <= 64 + 8  # the whole chat was evicted to the budget again


def test_grammar_and_tools(fresh):
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "no" | "yes"', verbose=False)
    assert fresh(PROMPT, max_tokens=8, temperature=0, grammar=grammar)["choices"][0]["text"] in ("no", "yes")
    add = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}}
    fresh.chat_format, before = "chatml-function-calling", fresh.chat_format
    call = fresh.create_chat_completion(MESSAGES, tools=[add], tool_choice={"type": "function", "function": {"name": "add"}}, max_tokens=24, temperature=0)
    fresh.chat_format = before
    call = call["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "add" and isinstance(json.loads(call["arguments"])["a"], int)
    assert fresh.kv_stats()["n_evictions"] >= 1


def test_a_draft_model(model_path, snapkv):
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
    drafted = opened(model_path, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4), **SNAPKV)
    counts = n_evaluated(drafted)
    snapkv.reset()
    assert answer(drafted) == answer(snapkv) and max(counts[1:]) > 1
    assert drafted.kv_stats()["n_evictions"] == 1
    drafted.close()


def test_states(model_path, fresh):
    begun = answer(fresh)
    state, cells = fresh.save_state(), fresh.kv_stats()["cells"]
    longer = PROMPT + fresh.detokenize(begun).decode() + "\n\nQ: What is 4 plus 2?\nA:"
    expected = answer(fresh, longer)
    fresh.reset()
    answer(fresh, "Something else.", 2)
    fresh.load_state(state)
    assert fresh.kv_stats()["cells"] == cells and answer(fresh, longer) == expected
    fresh.load_state(state)  # knows what its eviction saw
    assert answer(fresh) == begun

    full = opened(model_path)
    with pytest.raises(RuntimeError, match="state"):
        full.load_state(state)
    assert answer(full, n=2)
    full.close()
    state.llama_state = state.llama_state[:100] + bytes(len(state.llama_state) - 100)
    with pytest.raises(RuntimeError, match="state"):
        fresh.load_state(state)
    assert answer(fresh) == begun  # and is usable


@pytest.mark.parametrize("kind", ["LlamaRAMCache", "LlamaDiskCache"])
def test_a_cache_of_prompts(fresh, kind, tmp_path):
    def ask(text):
        return fresh(text, max_tokens=6, temperature=0)["choices"][0]["text"]
    other = PROMPT.replace("plus", "minus")
    expected = [ask(PROMPT), ask(other)]
    fresh.set_cache(getattr(llama_cpp, kind)(*[str(tmp_path)]*(kind == "LlamaDiskCache")))
    try:
        assert [ask(PROMPT), ask(other), ask(PROMPT)] == [*expected, expected[0]]
    finally:
        fresh.set_cache(None)


def test_names_that_are_not_ours_are_theirs():
    from pykvc.llama_cpp import LogitsProcessorList
    assert LogitsProcessorList is llama_cpp.theirs.LogitsProcessorList and llama_cpp.Llama is Llama
    with pytest.raises(ImportError, match="Lama"):
        from pykvc.llama_cpp import Lama  # noqa: F401


def test_from_pretrained(model_path, monkeypatch):
    files = ["README.md", "q4/a.gguf", "b.gguf"]
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repo: files)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name, local_dir, cache_dir: {"q4/a.gguf": model_path}[name])
    how = {**HOW, **SNAPKV, "verbose": False}
    with_policy = Llama.from_pretrained("user/repo", "q4/*.gguf", **how)
    assert len(answer(with_policy, n=3)) == 3 and with_policy.kv_stats()["n_evictions"] == 1
    with_policy.close()
    with pytest.raises(ValueError, match="2 files of user/repo fit .*q4/a.gguf, b.gguf"):
        Llama.from_pretrained("user/repo", "*.gguf", **how)
    with pytest.raises(ValueError, match="0 files of .*README.md"):
        Llama.from_pretrained("user/repo", "c.gguf", **how)


def test_an_aborted_call_under_h2o_leaves_nothing_half_summed(model_path):
    """What its queries added to the sums cannot be taken out: the sequence begins anew."""
    llm, calls = opened(model_path, kv_policy="h2o", kv_budget=64), []
    expected = answer(llm, n=3)
    llm.reset()

    @llama_cpp.ggml_abort_callback
    def stop(_):
        calls.append(1)
        return len(calls) > 100
    llama_cpp.llama_set_abort_callback(llm._ctx.ctx, stop, None)
    with pytest.raises(RuntimeError):
        answer(llm, n=3)
    llama_cpp.llama_set_abort_callback(llm._ctx.ctx, llama_cpp.ggml_abort_callback(0), None)
    assert llm._kv.ctx.pos_max() == -1
    llm.reset()
    assert answer(llm, n=3) == expected
    llm.close()


def test_pickle(snapkv):
    again = pickle.loads(pickle.dumps(snapkv))
    snapkv.reset()
    assert answer(again, n=3) == answer(snapkv, n=3) and again.kv_stats()["n_evictions"] == 1
    again.close()


# -- prefixes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [PROMPT, "".join(QA[:4]) + "Q: What is 1 plus 1?\nA:", PROMPT[:-12] + "4 plus 5?\nA:"], ids=["the same", "evicted part", "window"])
def test_a_branch_is_as_a_fresh_one(fresh, text):
    expected = answer(fresh, text)
    fresh.reset()
    answer(fresh)
    counts = n_evaluated(fresh)
    assert answer(fresh, text) == expected
    assert counts[0] == len(fresh.tokenize(text.encode()))


def test_what_extends_goes_on(fresh):
    n_before = fresh.kv_stats()["n_evictions"]  # of the context
    begun = answer(fresh)
    counts = n_evaluated(fresh)
    answer(fresh, PROMPT + fresh.detokenize(begun).decode() + "\n\nQ: What is 4 plus 2?\nA:", n=2)
    assert counts[0] < 20 and fresh.kv_stats()["n_evictions"] == n_before + 2


def test_below_the_floor(fresh):
    answer(fresh)
    fresh.n_tokens = 20
    with pytest.raises(ValueError, match="it goes on from"):
        fresh.eval([1])
    n_before = fresh.kv_stats()["n_evictions"]
    fresh.reset()
    fresh.eval(fresh.tokenize(PROMPT.encode()))  # the low-level way, as generate() does it
    tokens = [fresh.sample(temp=0)]
    for _ in range(3):
        fresh.eval(tokens[-1:])
        tokens.append(fresh.sample(temp=0))
    assert fresh.kv_stats()["n_evictions"] == n_before + 1
    fresh.reset()
    assert tokens == answer(fresh, n=4)


# -- mistakes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how, match", [
    (dict(kv_policy="snapvk", kv_budget=64), "did you mean 'snapkv'"), (dict(kv_policy="snapkv", kv_budget=3), "at least 33 tokens"),
    (dict(kv_policy="snapkv"), "evicts nothing without a budget"), (dict(kv_policy="snapkv", kv_budget=1.5), "retained ratio in"),
    (dict(kv_policy="full", kv_budget=64), "the policy is full"), (dict(kv_policy="snapkv", kv_budget=64, kv_decode_budget=8), "does not evict generated tokens"),
    (dict(kv_policy="finch", kv_budget=100), "only pykvc.LLM"), (dict(kv_policy="snapkv", kv_budget=64, embedding=True), "embedding context"),
    (dict(kv_policy="h2o", kv_budget=64, flash_attn=True), "use flash_attn off"), (dict(kv_policy="h2o", kv_budget=64, draft_model=print), "draft_model"),
    (dict(kv_policy="snapkv", kv_budget=64, kv_cells=100), "n_ubatch"), (dict(type_k=1000), r"type_k is one of 0 \(f32\), 1 \(f16\)"),
    (dict(type_v=-1), "type_v"), (dict(lora_path="/none"), "lora_path"), (dict(lora_path=__file__), "is not a LoRA of this model: invalid magic"),
    (dict(lora_path=__file__, kv_policy="criticalkv", kv_budget=64), "output projection"), (dict(n_cxt=9), "'n_cxt': did you mean 'n_ctx'"),
    (dict(kv_buget=64), "did you mean 'kv_budget'"), (dict(xyzzy=1), "there are attention_type, .*kv_policy"),
    (dict(compression_ratio=0.5), "kv_budget is the share that stays")], ids=str)
def test_mistakes(model_path, how, match):
    with pytest.raises(ValueError, match=match):
        opened(model_path, **how)
    after = opened(model_path)  # nothing of it is left for the next context
    assert after.kv_stats()["n_evictions"] == 0 and answer(after, n=1)
    after.close()


@pytest.mark.parametrize("gbnf, says", [('root = "yes', "failed to parse"), ('foo ::= "a"', "'root'"), ('root ::= root "a"', "left recursion"),
                                        ("root ::= " + "("*600, "600 deep"), (None, "is a LlamaGrammar")])
def test_a_grammar_with_a_mistake(fresh, gbnf, says):
    grammar = "yes" if gbnf is None else llama_cpp.LlamaGrammar.from_string(gbnf)
    for ask in (lambda: fresh("Is it?", grammar=grammar), lambda: list(fresh("Is it?", grammar=grammar, stream=True)),
                lambda: fresh.create_chat_completion(MESSAGES[1:], grammar=grammar)):
        with pytest.raises(ValueError, match=says):
            ask()
    assert answer(fresh, n=1)


def test_nothing_to_embed(model_path):
    llm = opened(model_path, embedding=True, n_ctx=128)
    for call, nothing in itertools.product((llm.embed, llm.create_embedding), ("", [], ["a", ""], 3, b"a")):
        with pytest.raises(ValueError, match=r"embed\(\) takes a text"):
            call(nothing)
    assert len(llm.embed("a b")) == 2 and len(llm.embed(iter(["a", "b"]))) == 2
    llm.close()


def test_parts_of_a_message_are_one_text(fresh):
    ask = lambda content: fresh.create_chat_completion([{"role": "user", "content": content}], max_tokens=1)["usage"]
    assert ask([{"type": "text", "text": "Hello"}, {"type": "text", "text": "you"}]) == ask("Hello\nyou")


def test_not_a_model(tmp_path, model_path):
    (tmp_path/"no.gguf").write_text("this is no model")
    with pytest.raises(ValueError, match="expected 'GGUF'"):
        opened(tmp_path/"no.gguf", **SNAPKV)
    with pytest.raises(ValueError, match="expected 'GGUF'|not a GGUF"):  # LLM still hears llama.cpp's reason
        pykvc.LLM(tmp_path/"no.gguf")
    closed = opened(model_path)
    closed.close()
    with pytest.raises(ValueError, match="was closed"):
        closed.kv_stats()


def test_images_are_refused():
    with pytest.raises(ImportError, match="libmtmd"):
        import llama_cpp.mtmd_cpp  # noqa: F401


# -- whose library --------------------------------------------------------------------------------------------------

def test_versions_agree():
    root = Path(__file__).parent.parent
    assert json.loads((root/"third_party/llama_cpp.json").read_text())["version"] == llama_cpp.VERSION == llama_cpp.theirs.__version__
    assert f'"llama-cpp-python=={llama_cpp.VERSION}"' in (root/"pyproject.toml").read_text()


def test_theirs_first(stock):
    for code in ("import llama_cpp; from pykvc.llama_cpp import Llama", "import pykvc, llama_cpp; from pykvc.llama_cpp import Llama"):
        done = _python(code, stock.parent/"bin", check=False)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and last.startswith("ImportError: llama_cpp was imported before, on ") and f"LLAMA_CPP_LIB_PATH={llama_cpp.LIB}" in last
    assert _python("import llama_cpp; from pykvc.llama_cpp import Llama; print(Llama.__mro__[1] is llama_cpp.Llama)", llama_cpp.LIB).stdout == "True\n"


def test_any_program(model_path):
    """Theirs, which knows nothing of us, by the environment alone."""
    code = STOCK.replace("logits_all=True, ", "").replace(", logprobs=2", "").replace('answer["logprobs"]["token_logprobs"]', "0")
    args = code, llama_cpp.LIB, str(model_path), PROMPT, json.dumps(MESSAGES)
    full = json.loads(_python(*args).stdout)
    evicted = json.loads(_python(*args, LLAMA_ARG_KV_POLICY="snapkv:window=16", LLAMA_ARG_KV_BUDGET="64").stdout)
    assert evicted[-1] < 0.6*full[-1]


AGAIN = """
import json, sys
from llama_cpp import Llama, llama_perf_context
llm, questions = Llama(sys.argv[1], n_ctx=1024, n_threads=1, verbose=False), sys.argv[2:]

def ask(messages):
    answer = llm.create_chat_completion(messages, max_tokens=12, temperature=0)
    return answer["choices"][0]["message"]["content"]

def user(text):
    return {"role": "user", "content": text}

warm = [ask([user(q)]) for q in questions]
cold = [llm.reset() or ask([user(q)]) for q in questions]
before, n = llama_perf_context(llm._ctx.ctx).n_p_eval, llm.n_tokens
ask([user(questions[-1]), {"role": "assistant", "content": cold[-1]}, user("Why?")])
print(json.dumps([warm, cold, llama_perf_context(llm._ctx.ctx).n_p_eval - before, n]))
"""


@pytest.mark.parametrize("policy", ["snapkv", "tova", "keydiff", "streaming_llm"])
def test_the_same_prompt_again_in_a_program_that_knows_nothing_of_us(model_path, policy):
    """Their server asks so. Theirs evaluates but the last token of it again, which would look at a cache evicted from
    itself."""
    questions = ["What is 3 plus 4?"]*2 + ["What is the capital of France?"]*2 + ["What is 3 plus 4?"]
    done = _python(AGAIN, llama_cpp.LIB, str(model_path), *questions, LLAMA_ARG_KV_POLICY=policy, LLAMA_ARG_KV_BUDGET="75%")
    warm, cold, n_read, n_there = json.loads(done.stdout)
    assert warm == cold and all(warm)
    assert n_read < n_there  # a conversation that goes on is still not evaluated again


def test_a_prompt_is_heard_in_full_after_a_long_answer(model_path):
    """Nothing was evicted, so the prompt goes on from what is there; but not from so late that an answer has taken its queries."""
    how = dict(kv_policy="snapkv", kv_budget=len(PROMPT))  # above its tokens
    llm, fresh = opened(model_path, **how), opened(model_path, **how)
    answer(llm, n=60)
    counts = n_evaluated(llm)
    assert answer(llm, n=2) == answer(fresh, n=2) and counts[0] == 32
    llm.close()
    fresh.close()
