"""pykvc as a model of lm-evaluation-harness: tasks of our own, without network, through its command line and its API."""
import json
import os
import subprocess
import sys

import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from typer.testing import CliRunner

import pykvc
from evals.cli import app
from pykvc.lm_eval import PykvcLM

FACTS = "".join(f"{name} has {n} apples.\n" for name, n in zip(("Ann", "Bob", "Cleo", "Dan", "Eve", "Fay", "Gil", "Hal"), (3, 5, 2, 9, 4, 7, 6, 8)))
CHOICES = [" seven apples.", " two apples in a bag.", " no idea"]
SNAPKV = dict(kv_policy="snapkv:window=8", kv_budget=24)
CHOICE = """
task: apples_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}{{name}} has"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""
GENERATE = """
task: apples_generate
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{context}}{{name}} has"
doc_to_target: " {{number}}"
generation_kwargs: {until: ["apples", "\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"context": FACTS, "name": name, "number": n, "choices": CHOICES, "label": 0} for name, n in (("Fay", 7), ("Cleo", 2), ("Ann", 3))]
    (folder/"rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        (folder/f"{name}.yaml").write_text(text.replace("DATA", str(folder/"rows.jsonl")))
    return folder


@pytest.fixture(scope="module")
def full(model_path):
    return PykvcLM(str(model_path), n_ctx=512)


@pytest.fixture(scope="module")
def snapkv(model_path):
    return PykvcLM(str(model_path), n_ctx=512, **SNAPKV)


def asked(kind, *args):
    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(args)]


def run(tasks, model_args, *more):
    env = {**os.environ, "HF_HOME": str(tasks/"hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-I", "-m", "pykvc.lm_eval", "--model", "pykvc", "--model_args", model_args, "--include_path", str(tasks),
               "--limit", "2", "--output_path", str(tasks/"out"), "--log_samples", "--tasks", "apples_choice,apples_generate", *more]
    return subprocess.run(command, env=env, text=True, capture_output=True)


def test_command_line(tasks, model_path):
    done = run(tasks, f"model={model_path},n_ctx=512,kv_policy=snapkv:window=8,kv_budget=24")
    assert done.returncode == 0, done.stderr
    assert "snapkv:window=8,kernel=5,pool=avg: 2 evictions in 6 requests" in done.stderr  # three choices of one context
    assert "snapkv:window=8,kernel=5,pool=avg: 2 evictions in 2 requests" in done.stderr
    results = json.loads(next((tasks/"out").rglob("results*.json")).read_text())
    assert results["n-samples"]["apples_choice"]["effective"] == 2 and 0 <= results["results"]["apples_choice"]["acc,none"] <= 1
    samples = [json.loads(line) for line in next((tasks/"out").rglob("samples_apples_generate*.jsonl")).read_text().splitlines()]
    with pykvc.LLM(model_path, n_ctx=512, **SNAPKV) as llm:
        for sample in samples:
            expected = llm.generate(sample["arguments"]["gen_args_0"]["arg_0"], max_tokens=6, stop=["apples", "\n"]).text
            assert sample["resps"] == [[expected]]

    bad = run(tasks, f"model={model_path},kv_policy=snapvk,kv_budget=24")
    assert bad.returncode == 2 and bad.stderr.strip().splitlines()[-1].startswith("unknown policy 'snapvk' (did you mean 'snapkv'?)")


def _expected(llm, context, continuation, hold_back=0):
    """One token a call, on an LLM of its own."""
    whole, ids = llm.tokenize(context + continuation), llm.tokenize(context)
    cut = len(ids) - hold_back
    llm.reset()
    llm.prefill(tokens=ids[:cut])
    llm.compress()
    if hold_back:
        llm.prefill(tokens=ids[cut:])
    total, greedy = 0.0, True
    for token in whole[len(ids):]:
        x = llm.logits().astype(np.float64)
        total += x[token] - x.max() - np.log(np.exp(x - x.max()).sum())
        greedy &= bool(x.argmax() == token)
        llm.prefill(tokens=[token])
    return total, greedy


@pytest.mark.parametrize("how", [{}, SNAPKV, dict(SNAPKV, hold_back=4), dict(SNAPKV, hold_back=40), dict(kv_policy="h2o", kv_budget=24),
                                 dict(kv_policy="streaming_llm:interval=2", kv_budget=24, kv_decode_budget=2)], ids=str)
def test_loglikelihood(model_path, how):
    context = FACTS + "Fay has"
    lm = PykvcLM(str(model_path), n_ctx=512, **how)
    got = lm.loglikelihood(asked("loglikelihood", *((context, choice) for choice in CHOICES), (context + " ", "7"), (FACTS, "Bob")), disable_tqdm=True)
    hold_back = how.get("hold_back", 0)
    with pykvc.LLM(model_path, n_ctx=512, **{k: v for k, v in how.items() if k != "hold_back"}) as llm:
        if not how.get("kv_decode_budget"):  # else the reference would have to tell the prompt's end
            assert got[:3] == [pytest.approx(_expected(llm, context, choice, hold_back), abs=0.2) for choice in CHOICES]
    alone = [lm.loglikelihood(asked("loglikelihood", (context, choice)), disable_tqdm=True)[0] for choice in CHOICES]
    assert got[:3] == alone  # whatever was scored before
    assert got[3][0] < 0 and got[4][0] < 0


def test_what_eviction_changes(full, snapkv, model_path):
    """The first token is predicted before the eviction, those after it are not; hold_back makes it see the compressed cache."""
    context, one, more = FACTS + "Fay has", " seven", " seven apples and Gil has six"
    ask = lambda lm, text: lm.loglikelihood(asked("loglikelihood", (context, text)), disable_tqdm=True)[0][0]  # noqa: E731
    assert ask(snapkv, one) == pytest.approx(ask(full, one), abs=1e-4)
    assert abs(ask(snapkv, more) - ask(full, more)) > 0.05
    held = PykvcLM(str(model_path), n_ctx=512, hold_back=1, **SNAPKV)
    assert abs(ask(held, one) - ask(full, one)) > 0.01


# -- question-out -------------------------------------------------------------------------------------------------------

SHOTS = [f"Q: How many apples has {name}?\nA: {name} has {n}.\n\n" for name, n in (("Ann", 3), ("Bob", 5), ("Cleo", 2), ("Dan", 9))]
OUT = dict(kv_policy="snapkv:window=8", kv_budget=32, protocol="question-out")
HOW = {"until": ["Q:"], "max_gen_toks": 6}


def of(name):
    return "".join(SHOTS) + f"Q: How many apples has {name}?\nA:"


@pytest.mark.parametrize("policy", ["snapkv:window=8", "shotkv:window=8,recent=8", "adakv:window=8", "finch:window=64,recent=8", "kvzip:recent=8"])
def test_question_out_evicts_the_examples_before_it_reads_the_question(model_path, policy):
    lm = PykvcLM(str(model_path), n_ctx=512, n_ubatch=128, **{**OUT, "kv_policy": policy})
    head, asks = "".join(SHOTS).rstrip(), policy.startswith("finch")  # SmolLM2 joins the line breaks with what follows
    questions = [f"Q: How many apples has {name}?\nA:" for name in ("Dan", "Ann")]
    texts = lm.generate_until(asked("generate_until", *(("".join(SHOTS) + question, HOW) for question in questions)), disable_tqdm=True)
    scores = lm.loglikelihood(asked("loglikelihood", *(("".join(SHOTS) + question, " Dan has 9") for question in questions)), disable_tqdm=True)
    with pykvc.LLM(model_path, n_ctx=512, n_ubatch=128, kv_policy=policy, kv_budget=32) as llm:
        for question, text, score in zip(questions, texts, scores):
            spans, begin = [], 0
            for shot in SHOTS:
                spans.append((begin, begin := min(begin + len(shot), len(head))))
            context = llm.context(head, spans=spans, span_unit="chars", kv_query=question if asks else None)
            context.compress()
            rest = llm.tokenize(head + "\n\n" + question)[context.n_tokens:]
            assert context.ask(tokens=rest, max_tokens=6, stop=["Q:"]).text == text
            context.go_back()
            llm.prefill(tokens=rest, spans=())
            total = 0.0
            for token in llm.tokenize(" Dan has 9", add_special=False):
                x = llm.logits().astype(np.float64)
                total += x[token] - x.max() - np.log(np.exp(x - x.max()).sum())
                llm.prefill(tokens=[token])
            assert score[0] == pytest.approx(total, abs=0.2)


@pytest.mark.parametrize("policy", [OUT["kv_policy"], "adakv:window=8", "keydiff:share=all"])
@pytest.mark.parametrize("protocol, n", [("question-out", 1), ("question-in", 5)])
def test_sixteen_at_a_time_share_the_examples(model_path, capsys, protocol, n, policy):
    """Evaluated once; evicted once where the question is not known, else with each question. Heads may differ."""
    lm = PykvcLM(str(model_path), n_ctx=512, batch_size=16, **{**OUT, "protocol": protocol, "kv_policy": policy})
    assert lm.llm._session.ctx.n_seq_max == 16
    contexts = [of(name) for name in ("Dan", "Ann", "Cleo", "Eve", "Bob")]
    texts = lm.generate_until(asked("generate_until", *((context, HOW) for context in contexts)), disable_tqdm=True)
    assert f" {n} evictions in 5 requests" in capsys.readouterr().err
    with pykvc.LLM(model_path, n_ctx=512, n_seq_max=16, kv_policy=policy, kv_budget=32) as llm:
        head, question_in = "".join(SHOTS).rstrip(), protocol == "question-in"
        n_head = len(llm.tokenize(head))
        assert texts == [answer.text for answer in llm.generate_batch(
            [llm.tokenize(context)[n_head:] for context in contexts], prefix=head, compress_prefix=not question_in, compress=question_in,
            max_tokens=6, stop=["Q:"])]


def test_where_the_question_begins(model_path):
    lm = PykvcLM(str(model_path), n_ctx=512, **OUT)
    split = lambda text, **how: lm._prompt(text, lm.tok_encode(text), **{"n_more": 8, **how})  # noqa: E731
    whole = of("Dan")
    found = split(whole)
    assert found.text == "".join(SHOTS).rstrip() and lm.llm.detokenize(found.question) == "\n\nQ: How many apples has Dan?\nA:"
    assert found.ids == lm.tok_encode(whole)
    assert split(whole + "\n\n").question[:len(found.question)] == found.question  # nothing follows that delimiter
    assert split("no examples").head == [] and split("no examples").question
    cut = split(whole, n_more=512 - len(found.ids) + 7)  # room for all but 7 tokens
    assert (cut.text, cut.head, cut.question) == ("", found.head[7:], found.question)
    assert split(whole, n_more=512 - 4).head == [] and len(split(whole, n_more=512 - 4).question) == 4
    named = PykvcLM(str(model_path), n_ctx=512, **{**OUT, "delimiter": "\\n\\nQ:"})  # as a command line has it
    text = "".join(SHOTS) + "Q: The first part.\n\nHow many?"
    assert named.llm.detokenize(named._prompt(text, named.tok_encode(text), 8).question) == "\n\nQ: The first part.\n\nHow many?"
    turns = [{"role": role, "content": text} for shot in SHOTS for role, text in zip(("user", "assistant"), shot.split("\nA:"))]
    written = lm.apply_chat_template([*turns, {"role": "user", "content": "How many has Dan?"}])
    found = split(written)
    assert lm.llm.detokenize(found.question).startswith("How many has Dan?<|im_end|>") and SHOTS[3].split("\nA:")[1].strip() in found.text


def test_more_than_the_question_can_be_held_back(model_path):
    lm = PykvcLM(str(model_path), n_ctx=512, **{**SNAPKV, "hold_back": 40})
    context = of("Dan")
    got = lm.loglikelihood(asked("loglikelihood", (context, " Dan has 9.")), disable_tqdm=True)
    with pykvc.LLM(model_path, n_ctx=512, **SNAPKV) as llm:
        assert got == [pytest.approx(_expected(llm, context, " Dan has 9.", 40), abs=0.2)]


def test_mistakes_of_a_protocol(model_path, capsys):
    for how, match in ((dict(protocol="both"), "question-in or question-out"), (dict(protocol="question-out", hold_back=1), "question-in"),
                       (dict(delimiter=""), "delimiter"), (dict(batch_size="many"), "batch_size"), (dict(batch_size=0.5), "batch_size")):
        with pytest.raises(ValueError, match=match):
            PykvcLM(str(model_path), **{**OUT, **how})
    lm = PykvcLM(str(model_path), n_ctx=512, **OUT)
    for ask in (lambda: lm.generate_until(asked("generate_until", ("Q: Who?\nA:", HOW)), disable_tqdm=True),
                lambda: lm.loglikelihood(asked("loglikelihood", ("Q: Who?\nA:", " Ann")), disable_tqdm=True)):
        with pytest.raises(ValueError, match="question-out has nothing to evict"):
            ask()
    alone = PykvcLM(str(model_path), n_ctx=512, batch_size="auto", n_ubatch=64, kv_cells=256, **OUT)
    assert alone.n_parallel == 1 and "one request at a time" in capsys.readouterr().err


def test_the_harness_own_tasks_on_local_rows(tmp_path, model_path):
    """Stand-in rows with the fields of the originals; the harness' own files say how they are asked."""
    data, out = tmp_path/"data", tmp_path/"tasks"
    numbers, subjects = range(4), ("anatomy", "virology")
    of_choice = [{"question": f"What is {n} + 1?", "choices": {"label": list("ABCDE"), "text": [str(n + i) for i in range(5)]}, "answerKey": "B"} for n in numbers]
    of_subject = [{"question": f"What is {n} + 1?", "subject": subject, "choices": [str(n + i) for i in range(4)], "answer": 1}
                  for n in (*numbers, 4) for subject in subjects]
    files = {"gsm8k/test": [{"question": f"Ann has {n} apples and buys one. How many has she?", "answer": f"{n}+1={n + 1}.\n#### {n + 1}"} for n in numbers],
             "commonsense_qa/train": of_choice, "commonsense_qa/validation": of_choice, "mmlu/dev": of_subject, "mmlu/test": of_subject}
    for name, rows in files.items():
        (data/name).parent.mkdir(parents=True, exist_ok=True)
        (data/f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = CliRunner().invoke(app, ["harness", "--data-dir", str(data), "--out", str(out)])
    assert written.stdout.endswith(f"--include_path {out} --tasks gsm8k_cot,commonsense_qa,mmlu\n"), written.stderr
    nothing = CliRunner().invoke(app, ["harness", "--data-dir", str(tmp_path), "--out", str(out)])
    assert nothing.exit_code == 2 and "has rows of none" in nothing.stderr
    env = {**os.environ, "HF_HOME": str(tmp_path/"hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-I", "-m", "pykvc.lm_eval", "--model", "pykvc", "--include_path", str(out), "--limit", "3", "--num_fewshot", "3",
               "--tasks", "gsm8k_cot,commonsense_qa,mmlu_anatomy,mmlu_virology", "--batch_size", "16", "--output_path", str(tmp_path/"out"), "--log_samples",
               "--gen_kwargs", "max_gen_toks=8", "--model_args", f"model={model_path},n_ctx=1024,kv_policy=snapkv:window=8,kv_budget=0.5,protocol=question-out"]
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert ": 1 evictions in 3 requests" in done.stderr       # gsm8k_cot: three questions behind the same examples
    assert ": 5 evictions in 39 requests" in done.stderr      # three of commonsense_qa, whose examples are drawn, and two subjects
    results = json.loads(next((tmp_path/"out").rglob("results*.json")).read_text())["results"]
    assert {"exact_match,strict-match", "exact_match,flexible-extract"} <= set(results["gsm8k_cot"]) and "acc,none" in results["mmlu_virology"]


def test_rolling(full, snapkv, model_path):
    text = FACTS*2
    whole = full.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), disable_tqdm=True)[0]
    ids, first = full.tok_encode(text, add_special_tokens=False), full.prefix_token_id
    with pykvc.LLM(model_path, n_ctx=512) as llm:
        llm.prefill(tokens=[first])
        expected = 0.0
        for token in ids:
            x = llm.logits().astype(np.float64)
            expected += x[token] - x.max() - np.log(np.exp(x - x.max()).sum())
            llm.prefill(tokens=[token])
    assert whole == pytest.approx(expected, rel=0.01)  # quantized weights: a batch sums in another order
    with pytest.raises(ValueError, match="no prompt that kv_budget could evict"):
        snapkv.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    text = FACTS*6  # two windows of 256 tokens, the second as long as the first, what it has to score last
    ids = full.tok_encode(text, add_special_tokens=False)
    assert 256 < len(ids) < 512
    windows = full._loglikelihood_tokens([(None, [first], ids[:256]), (None, ids[len(ids) - 257:256], ids[256:])], disable_tqdm=True)
    bounded = PykvcLM(str(model_path), n_ctx=256)
    assert bounded.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), disable_tqdm=True)[0] == pytest.approx(sum(s for s, _ in windows), rel=0.01)


def test_contexts_are_cut_at_their_beginning(full, model_path, capsys):
    short = PykvcLM(str(model_path), n_ctx=256, max_gen_toks=4)
    long, tail = FACTS*8 + "Fay has", {"until": [], "max_gen_toks": 4}
    ids = full.tok_encode(long)
    assert short.generate_until(asked("generate_until", (long, tail)), disable_tqdm=True) == [full.llm.generate(tokens=ids[-252:], max_tokens=4).text]
    assert f"of {len(ids)} tokens is cut at its beginning to 252" in capsys.readouterr().err
    with pytest.raises(ValueError, match="give a larger n_ctx"):
        short.generate_until(asked("generate_until", ("a", {"max_gen_toks": 300})), disable_tqdm=True)


def test_chat_and_mistakes(full, model_path):
    chat = full.apply_chat_template([{"role": "user", "content": "Who has 7 apples?"}])
    assert "Who has 7 apples?" in chat and chat.rstrip().endswith("assistant") and "role" in full.chat_template(True)
    for how, match in ((dict(kv_policy="snapkv"), "evicts nothing without a budget"), (dict(hold_back=-1), "hold_back"), (dict(n_ctx=-1), "n_ctx")):
        with pytest.raises(ValueError, match=match):
            PykvcLM(str(model_path), **how)
    assert lm_eval.api.registry.get_model("pykvc") is PykvcLM


def test_repeats_of_a_request_are_other_samples(model_path):
    how = {"until": ["\n\n"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    asked = lambda: [Instance("generate_until", {}, (FACTS, dict(how)), 0) for _ in range(4)]
    first, again = (PykvcLM(str(model_path), n_ctx=512).generate_until(asked()) for _ in range(2))
    assert len(set(first)) > 1 and first == again
