"""pykvc as a model of lm-evaluation-harness: tasks of our own, without network, through its command line and its API."""
import json
import os
import subprocess
import sys

import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance

import pykvc
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


@pytest.mark.parametrize("how", [{}, SNAPKV, dict(SNAPKV, hold_back=4), dict(kv_policy="h2o", kv_budget=24),
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
