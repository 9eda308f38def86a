"""The evals: asking, saving, resuming, scoring, reporting. Items of a few hundred tokens on SmolLM2."""
import itertools
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import pykvc
import tiny
from evals import ask as asking
from evals import panels, pool, report, run, stats, store, work
from evals.cases import Case, cases
from evals.cli import app
from evals.items import Item, Options
from evals.prompts import render
from evals.settings import Only
from evals.tasks import TASKS, niah
from evals.tools import archive
from evals.work import Plan, open_model
from pykvc.prose import prose

ROOT = Path(__file__).parent.parent
SNAPKV = "snapkv:window=8"
SMALL = {"niah": {"length": 120, "depths": "0,50,100", "needles": 2}}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data folder of our own."""
    folder = tmp_path_factory.mktemp("data")/"niah"
    (folder/"haystack").mkdir(parents=True)
    for i in range(2):
        (folder/"haystack"/f"text{i}.txt").write_text(prose(120, seed=i))
    needles = [{"id": f"needle-{city}", "needle": f"One of the special magic numbers for {city} is: {number}.",
                "question": f"What is the special magic number for {city} mentioned in the provided text?", "answer": str(number)}
               for city, number in (("Porto", 6879487), ("Riga", 1770315), ("Minsk", 8192109))]
    (folder/"needles.jsonl").write_text("".join(json.dumps(needle) + "\n" for needle in needles))
    return folder.parent


@pytest.fixture(scope="module")
def subject():
    return open_model(None)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(niah, "MAX_TOKENS", 8)


def words(text: str) -> int:
    return len(text.split())


def plan(out: Path, data: Path, *specs: Case, protocols=("question-out",), n=2, **more) -> Plan:
    return Plan(["niah"], specs or [Case()], protocols, out, data, n, n_threads=2, settings=SMALL, **more)


def answers(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out/"smollm2-135m.answers.jsonl").read_text().splitlines()]


# -- niah ---------------------------------------------------------------------------------------------------------------

def needle_items(data: Path, **settings) -> list[Item]:
    return niah.load(Options(words, data, settings={**niah.SETTINGS, **settings}))


def test_every_needle_is_at_every_depth_once_a_text(data):
    items = needle_items(data, length=400)
    assert len(items) == 2*10*3 == len({item.id for item in items})
    for text in ("text0", "text1"):
        asked = [(item.tags["needle"], item.tags["depth"]) for item in items if item.tags["text"] == text]
        assert len(asked) == len(set(asked)) == 30
    assert len({item.context for item in items}) == 20  # three questions each


def test_a_needle_stands_whole_near_its_depth_between_sentences(data):
    for item in needle_items(data, length=400):
        needle = f"One of the special magic numbers for {item.tags['needle'].removeprefix('needle-')} is: {item.gold}."
        assert item.context.count(needle) == 1 and 350 < words(item.context) <= 400
        at = item.context.index(needle)
        assert abs(at/len(item.context) - item.tags["depth"]/100) < 0.12
        assert item.context[:at].rstrip()[-1:] in ("", ".") and item.context[at + len(needle)] in " \n"


def test_the_number_is_found_whatever_is_around_it(data):
    item = needle_items(data, length=400)[0]
    assert niah.score(item, f"It is {item.gold}, of course.") and niah.score(item, f"{int(item.gold):,}")
    assert not niah.score(item, "") and not niah.score(item, item.gold[:-1])


# -- one state, many questions ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", [
    Case(), Case(SNAPKV, "0.5"), Case("h2o", "64"), Case("keydiff", "100"), Case("shotkv:window=8", "0.5"), Case("kvzip", "128"), Case("finch", "128"),
    Case("streaming_llm", "64", decode_budget="4"), Case(SNAPKV, "64", cells="256"), Case("keydiff", "", cells="256")], ids=lambda case: case.label())
def test_a_later_question_is_answered_as_if_asked_alone(subject, data, case):
    items = niah.load(Options(words, data, settings={**niah.SETTINGS, "length": 120}))[:2]
    asked = [(replace(item, max_tokens=6), render(item, subject.vocabulary, True), case) for item in items]
    together = [list(of) for _, of in itertools.groupby(asked, key=lambda one: asking.shared(*one, "question-out"))]
    assert len(together) == (2 if case.name == "finch" else 1)
    with pykvc.LLM(subject.path, n_ctx=512, n_ubatch=128, n_threads=2, **case.settings()) as llm:
        shared = [row for group in together for _, row in asking.ask(llm, group, "question-out")]
        alone = [row for _, row in asking.ask(llm, asked[1:], "question-out")][0]
    assert all(row["evictions"] > 0 for row in shared) == (case.name != "full")
    same = ("answer", "n_context", "n_prompt", "kept", "evictions", "bytes_used", "bytes_full", "stop_reason")
    assert {name: shared[1][name] for name in same} == {name: alone[name] for name in same}
    if case.budget.isdigit():
        assert sum(alone["kept"])/len(alone["kept"]) == int(case.budget)


@pytest.mark.parametrize("protocol", ["question-out", "question-in"])
@pytest.mark.parametrize("policy", [policy["name"] for policy in pykvc.policies() if policy["name"] != "full"])
def test_a_later_budget_is_as_if_it_were_the_only_one(subject, data, policy, protocol):
    """One evaluated context for all of them, whatever the policy."""
    small = {"finch": ":recent=8", "kvzip": ":recent=8", "expected_attention": ":recent=8"}.get(policy, "")
    small = small or ":window=8" * ("window=" in pykvc._core.parse_spec(policy))
    several = cases([policy + small], ["0.6", "100", "0.4"], ["none"], ["none"], ["f16"], ["f16"])
    item = niah.load(Options(words, data, settings={**niah.SETTINGS, "length": 120}))[0]
    asked = [(replace(item, max_tokens=6), render(item, subject.vocabulary, True), case) for case in several]
    how = dict(n_ctx=512, n_ubatch=128 if policy != "kvzip" else 256, n_threads=2)
    evaluated, prefill = [], pykvc.LLM.prefill
    with pykvc.LLM(subject.path, **how, **several[0].settings()) as llm, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pykvc.LLM, "prefill", lambda self, text, **more: evaluated.append(text) or prefill(self, text, **more))
        together = [row for _, row in asking.ask(llm, asked, protocol)]
    assert evaluated == [asked[0][1].head]
    same = ("answer", "n_context", "n_prompt", "kept", "evictions", "bytes_used", "bytes_full", "stop_reason")
    for one, row in zip(asked, together):
        with pykvc.LLM(subject.path, **how, **one[2].settings()) as llm:
            [(_, alone)] = asking.ask(llm, [one], protocol)
        assert {name: row[name] for name in same} == {name: alone[name] for name in same}
    assert len({tuple(row["kept"]) for row in together}) == 3 and all(row["evictions"] for row in together)


def test_question_in_evicts_behind_the_question(subject, data):
    item = needle_items(data, length=250)[0]
    prompt, case = render(item, subject.vocabulary, True), Case(SNAPKV, "64")
    with pykvc.LLM(subject.path, n_ctx=1024, n_threads=2, **case.settings()) as llm:
        [(_, row)] = asking.ask(llm, [(item, prompt, case)], "question-in")
        assert row["kept"] == [64]*len(row["kept"]) and row["evictions"] == 1 and row["n_context"] == 0
        assert row["n_prompt"] == len(llm.tokenize(prompt.head)) + len(llm.tokenize(prompt.tail, add_special=False)) and row["bytes_used"] < row["bytes_full"] <= row["bytes_allocated"]


def test_the_template_is_around_context_and_question(subject, data):
    item = needle_items(data, length=250)[0]
    prompt = render(item, subject.vocabulary, True)
    assert prompt.head.endswith(item.context) and prompt.tail.startswith(item.question) and prompt.head != item.context
    assert "".join(prompt.head[a:b] for a, b in prompt.spans) == item.context
    with_cue = replace(item, question="Q: where?\nA:", cue="A:")  # the assistant is made to begin with it
    tail = render(with_cue, subject.vocabulary, True).tail
    assert tail.startswith("Q: where?<") and tail.endswith("A:") and "A:" not in tail[:-2]
    assert render(with_cue, subject.vocabulary, False).tail == "Q: where?\nA:"
    plain = render(item, subject.vocabulary, False)
    assert (plain.head, plain.tail) == (item.context, item.question)


# -- the loop -----------------------------------------------------------------------------------------------------------

def test_a_run_saves_scores_and_repeats_nothing(tmp_path, data, monkeypatch):
    both = plan(tmp_path, data, Case(), Case(SNAPKV, "0.25"), protocols=("question-in", "question-out"))
    assert run.run(both, None) == []
    rows = answers(tmp_path)
    assert len(rows) == 2*2*2 == len({store.key(row) for row in rows})
    for row in rows:
        assert row["model"] == "smollm2-135m" and row["commit"] and len(row["model_sha256"]) == 64 and row["gold"] not in ("", None)
        n_before = row["n_prompt"] if row["protocol"] == "question-in" else row["n_context"]
        kept = n_before if row["policy"] == "full" else int(0.25*n_before + 0.5)
        assert row["kept"] == [kept]*30 and row["evictions"] == (row["policy"] != "full")
    assert len(store.read(tmp_path/"smollm2-135m.scores.jsonl")) == len(rows)
    monkeypatch.setattr(run, "ask", lambda *_: pytest.fail("asked again"))
    assert run.run(both, None) == [] and answers(tmp_path) == rows


def test_another_prompt_is_asked_again(tmp_path, data, monkeypatch):
    assert run.run(plan(tmp_path, data), None) == []
    really = work.render
    monkeypatch.setattr(work, "render", lambda *args: replace(prompt := really(*args), tail=prompt.tail + " Well,"))
    assert run.run(plan(tmp_path, data), None) == []
    first, second = answers(tmp_path)[:2], answers(tmp_path)[2:]
    assert len(second) == 2 and {row["prompt"] for row in first}.isdisjoint(row["prompt"] for row in second)
    scores = [json.loads(line) for line in (tmp_path/"smollm2-135m.scores.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in scores] == [row["prompt"] for row in first + second]
    assert report.table(report.scored(tmp_path))[0]["n"] == 2  # the later answers


@pytest.mark.parametrize("change", [dict(stop=["\n"]), dict(max_tokens=3), dict(gold="1234567")])
def test_other_ends_are_asked_again_and_other_right_answers_scored_again(tmp_path, data, monkeypatch, change):
    assert run.run(plan(tmp_path, data), None) == []
    first, really = answers(tmp_path), niah.load
    monkeypatch.setattr(niah, "load", lambda options: [replace(item, **change) for item in really(options)])
    monkeypatch.setattr(niah, "score", lambda item, answer: item.gold == "1234567")
    if again := "gold" in change:
        monkeypatch.setattr(run, "ask", lambda *_: pytest.fail("asked again"))
    assert run.run(plan(tmp_path, data), None) == []
    assert [row["rest"] == old["rest"] for row, old in zip(answers(tmp_path)[2:], first, strict=True)] == [again]*2
    assert {row["score"] for row in report.scored(tmp_path)} == {float(again)}
    assert not again or [row["answer"] for row in answers(tmp_path)] == [row["answer"] for row in first]*2
    n_lines = len(answers(tmp_path))
    assert run.run(plan(tmp_path, data), None) == [] and len(answers(tmp_path)) == n_lines


def test_older_answers_are_not_asked_again(tmp_path, data, monkeypatch):
    assert run.run(plan(tmp_path, data), None) == []
    old = [{name: value for name, value in row.items() if name != "rest"} for row in answers(tmp_path)]
    (tmp_path/"smollm2-135m.answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    monkeypatch.setattr(run, "ask", lambda *_: pytest.fail("asked again"))
    assert run.run(plan(tmp_path, data), None) == [] and answers(tmp_path) == old


def test_an_archive_has_the_figures_without_the_texts(tmp_path, data):
    assert run.run(plan(tmp_path/"out", data, Case(), Case(SNAPKV, "0.5")), None) == []
    result = CliRunner().invoke(app, ["archive", str(tmp_path/"kept"), "--out", str(tmp_path/"out")])
    assert result.exit_code == 0, result.stderr
    assert report.table(report.scored(tmp_path/"kept")) == report.table(report.scored(tmp_path/"out"))
    for path in (tmp_path/"kept").iterdir():
        text = lzma.decompress(path.read_bytes())
        assert b'"answer"' not in text and b'"gold"' not in text
        (tmp_path/"again").mkdir(exist_ok=True)
        (tmp_path/"again"/path.stem).write_bytes(text)
        (tmp_path/"both").mkdir(exist_ok=True)
        (tmp_path/"both"/path.name).write_bytes(path.read_bytes())
        (tmp_path/"both"/path.stem).write_bytes(text)
    assert len(report.scored(tmp_path/"both")) == 4  # each answer once
    (tmp_path/"file").write_text("")
    result = CliRunner().invoke(app, ["archive", str(tmp_path/"file"), "--out", str(tmp_path/"out")])
    assert result.exit_code == 2 and f"cannot write to {tmp_path/'file'}" in result.stderr
    (tmp_path/"both"/"report.md").mkdir()
    result = CliRunner().invoke(app, ["report", "--no-pictures", "--out", str(tmp_path/"both")])
    assert result.exit_code == 2 and "report.md: Is a directory" in result.stderr
    with pytest.raises(ValueError, match="archive"):
        report.scored(tmp_path/"kept", rescore=True)
    assert run.run(plan(tmp_path/"again", data, Case(), Case(SNAPKV, "0.5")), None) == []  # nothing is asked again
    assert len(answers(tmp_path/"again")) == 4
    (tmp_path/"out"/"smollm2-135m.scores.jsonl").unlink()
    with pytest.raises(ValueError, match="4 answers without a score"):
        archive.pack(tmp_path/"out", tmp_path/"kept")


def test_a_crash_is_a_row_and_loses_no_other(tmp_path, data, monkeypatch):
    really, calls = asking._figures, []

    def once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return really(*args)
    monkeypatch.setattr(asking, "_figures", once)
    [problem] = run.run(plan(tmp_path, data, n=4), None)
    assert "1 rows failed" in problem and "out of luck" in problem
    good = answers(tmp_path)[0]
    assert good["engine"].startswith(f"{pykvc.__version__}-") and good["processor"] and (good["n_threads"], good["n_gpu_layers"]) == (2, 0)
    assert ["error" in row for row in answers(tmp_path)] == [False, True, False, False]
    assert run.run(plan(tmp_path, data, n=4), None) == []  # the failed one is asked again
    assert len(answers(tmp_path)) == 5 and report.table(report.scored(tmp_path))[0]["n"] == 4


def test_a_killed_run_goes_on(tmp_path, data):
    out, path = tmp_path/"out", tmp_path/"out"/"smollm2-135m.answers.jsonl"
    command = [sys.executable, "-m", "evals", "run", "--task", "niah", "--length", "120", "--depths", "0,50,100", "--needles", "2", "--data-dir", data,
               "--policy", f"full,{SNAPKV}", "--budget", "0.5", "--threads", "2", "--n", "4", "--out", out]
    first = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL)
    while first.poll() is None and not (path.is_file() and path.read_bytes().count(b"\n") >= 2):
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    before = path.read_bytes()
    before = before[:before.rindex(b"\n") + 1]
    path.write_bytes(before + b'{"task": "niah", "it')  # torn
    second = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert path.read_bytes().startswith(before)
    rows = answers(out)
    assert len(rows) == 8 == len({store.key(row) for row in rows}) == len(store.read(out/"smollm2-135m.scores.jsonl"))
    assert f"niah, length 120, depths 0,50,100, needles 2, question-out: {pykvc._core.parse_spec(SNAPKV)}, budget 0.5: 4 answers, 4 evictions" in second.stdout


def test_a_policy_that_evicts_nothing_is_a_failure(tmp_path, data, monkeypatch):
    monkeypatch.setattr(pykvc.context.Context, "compress", lambda self, *_: False)
    [problem] = run.run(plan(tmp_path, data, Case(SNAPKV, "0.25")), None)
    assert "nothing was evicted" in problem
    monkeypatch.undo()
    assert run.run(plan(tmp_path/"large", data, Case(SNAPKV, "1000")), None) == []  # nothing to evict


# -- files --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, flag", [("model_sha256", True), ("commit", False)])
def test_foreign_answers_are_not_touched(tmp_path, data, name, flag):
    assert run.run(plan(tmp_path, data), None) == []
    path = tmp_path/"smollm2-135m.answers.jsonl"
    foreign = "".join(json.dumps({**row, name: "0"*64}) + "\n" for row in answers(tmp_path)) + '{"torn'
    path.write_text(foreign)
    with pytest.raises(ValueError, match=name):
        run.run(plan(tmp_path, data, any_commit=flag), None)
    assert path.read_text() == foreign
    if name == "commit":
        assert run.run(plan(tmp_path, data, any_commit=True), None) == []


def test_a_damaged_line_and_a_second_writer_are_refused(tmp_path):
    path = tmp_path/"a.jsonl"
    path.write_text('{"a": 1}\n{"b": 2}\n')
    with pytest.raises(ValueError, match="line 1 .* is no row"):
        store.Rows(path)
    with store.Rows(tmp_path/"b.jsonl"), pytest.raises(ValueError, match="another run"):
        store.Rows(tmp_path/"b.jsonl")


# -- mistakes -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, says", [
    (["--task", "nih"], "niah"),
    (["--task", "niah", "--policy", "snapvk"], "snapkv"),
    (["--task", "niah", "--policy", "snapkv"], "--budget"),
    (["--task", "niah", "--policy", "snapkv", "--budget", "1.5"], "--budget"),
    (["--task", "niah", "--policy", "snapkv", "--budget", "8"], "--kv-budget 8"),
    (["--task", "niah", "--policy", "finch:window=4", "--budget", "128"], "query has 16 tokens"),
    (["--task", "niah", "--protocol", "both"], "question-in"),
    (["--task", "niah", "--type-k", "q3"], "q8_0"),
    (["--task", "niah", "--model", "nowhere.gguf"], "nowhere.gguf"),
    (["--task", "niah", "--data-dir", "nowhere"], "nowhere"),
    (["--task", "niah", "--length", "100000"], "100000"),
    (["--task", "niah", "--depths", "0,150"], "--depths"),
    (["--task", "niah", "--needles", "9"], "needles"),
    (["--task", "niah", "--n", "0"], "--n"),
    (["--task", "niah", "--n-ctx", "256"], "--n-ctx"),
])
def test_mistakes_are_one_sentence(tmp_path, data, args, says):
    given = [] if "--data-dir" in args else ["--data-dir", str(data)]
    given += [] if "--length" in args else ["--length", "300"]
    result = CliRunner().invoke(app, ["run", "--out", str(tmp_path/"out"), *given, *args])
    assert result.exit_code == 2 and says in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (tmp_path/"out"/"smollm2-135m.answers.jsonl").is_file() or not answers(tmp_path/"out")


def test_every_model_is_checked_before_the_first_answers(tmp_path, data, model_path):
    result = CliRunner().invoke(app, ["run", "--task", "niah", "--length", "300", "--data-dir", str(data), "--out", str(tmp_path/"out"),
                                      "--model", str(model_path), "--model", str(tiny.write(tmp_path/"tiny.gguf"))])
    assert result.exit_code == 2 and "no tokenizer" in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not any(path.stat().st_size for path in (tmp_path/"out").glob("*.jsonl"))


@pytest.mark.parametrize("row", [{"id": "a", "needle": 1, "question": "b", "answer": "c"}, {"id": "a", "needle": ["b"], "question": {}, "answer": 2}])
def test_rows_of_the_wrong_kind(tmp_path, data, row):
    shutil.copytree(data, tmp_path/"data")
    (tmp_path/"data"/"niah"/"needles.jsonl").write_text(f"{json.dumps(row)}\n"*4)
    with pytest.raises(ValueError, match="the rows of niah in .*data are not as its data set has them"):
        run.run(plan(tmp_path/"out", tmp_path/"data"), None)


@pytest.mark.parametrize("policy, budget, n, expected", [
    ("tova:interval=32", "64", 96, False), ("tova:interval=32", "64", 97, True), ("shotkv:recent=32,interval=32", "50%", 128, False),
    ("shotkv:recent=32,interval=32", "50%", 129, True), ("h2o:recent=0.5,interval=8", "50%", 17, True), ("full", "", 999, False)])
def test_evictions_of_generated_tokens_are_expected(policy, budget, n, expected):
    row = {"policy": policy, "protocol": "question-out", "budget": "", "cells": "", "decode_budget": budget, "n_context": 50, "n_prompt": 60, "n_predicted": n}
    assert run._should_evict(row) is expected


def test_a_context_that_the_model_was_not_trained_for(tmp_path, data, monkeypatch):
    monkeypatch.setattr(niah, "load", lambda options: [Item("long", "Why?", "because", context=prose(900))])
    with pytest.raises(ValueError, match="trained for 8192"):
        run.run(plan(tmp_path, data), None)


@pytest.mark.parametrize("name, text, says", [
    ("needles.jsonl", '{"id": "a"}\n', "needle, question, answer"), ("needles.jsonl", "{", "cannot be read"), ("needles.jsonl", "", "is empty"),
    ("needles.jsonl", None, "needles.jsonl")])
def test_data_of_another_schema(tmp_path, name, text, says):
    (tmp_path/"niah"/"haystack").mkdir(parents=True)
    (tmp_path/"niah"/"haystack"/"text.txt").write_text(prose(9))
    if text is not None:
        (tmp_path/"niah"/name).write_text(text)
    with pytest.raises(ValueError, match=says):
        needle_items(tmp_path)


def test_full_is_one_case():
    found = cases(["full", "snapkv", "h2o"], ["0.5", "64"], ["none"], ["none", "256"], ["f16"], ["f16", "q8_0"])
    assert len(found) == len(set(found)) == 2*(1 + 2*2*2)
    assert {case.budget for case in found if case.name == "full"} == {""}


# -- figures ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_right, n, low, high", [(0, 10, 0.0, 0.2775), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (10, 10, 0.7225, 1.0)])
def test_wilson(n_right, n, low, high):  # 81/263 and 15/148: Newcombe 1998, Statistics in Medicine 17:857, table I
    assert stats.wilson(n_right, n) == pytest.approx((low, high), abs=1e-4)


def scores_of(a: int, b: int, c: int, d: int) -> tuple[list[int], list[int]]:
    return [1]*(a + b) + [0]*(c + d), [1]*a + [0]*b + [1]*c + [0]*d


def test_paired_difference_is_that_of_the_pairs():
    ours, full = scores_of(36, 12, 2, 0)
    difference, low, high = stats.paired_difference(ours, full)
    assert (difference, low, high) == pytest.approx((0.2, 0.0569, 0.3404), abs=1e-4)  # Newcombe 1998, 17:2635, table II, method 10
    assert stats.paired_difference(full, ours) == pytest.approx((-difference, -high, -low))
    assert stats.paired_difference([1]*20, [1]*20)[0] == 0 < stats.paired_difference([1]*20, [1]*20)[2]  # equal, not certain


def row(item: int, policy: str, score: float, budget: str = "", **more) -> dict:
    """Each item has a context of its own."""
    return {"model": "m", "task": "niah", "set": "", "settings": "", "protocol": "question-out", "chat": True, "n_ubatch": 512, "seed": 0, "type_k": "f16", "type_v": "f16",
            "policy": policy, "budget": budget, "decode_budget": "", "cells": "", "item": f"text/1000/{item}/needle-1@50", "score": score, "n_context": 1000, "n_prompt": 1020,
            "n_predicted": 8, "kept": [100, 300] if budget else [1000]*2, "evictions": bool(budget), "bytes_used": 2**20, "bytes_full": 2**22,
            "bytes_allocated": 2**23, "prefill_ms": 1.0, "evict_ms": 1.0, "decode_ms": 1.0, "tags": {"depth": 50.0*(item % 3)}, **more}


def test_the_table_compares_the_same_items(tmp_path):
    rows = [row(i, "full", i < 8) for i in range(10)] + [row(i, "snapkv", i < 2, "200") for i in range(2, 10)] + [row(0, "h2o", None, "200", error="x")]
    full, snapkv, h2o = report.table(rows)
    assert full["score"] == 0.8 and "difference" not in full and full["n_kept"] == 1000
    assert (snapkv["n"], snapkv["n_paired"], snapkv["score"], snapkv["difference"]) == (8, 8, 0, -0.75)
    assert snapkv["relative"] == -1 and snapkv["n_kept"] == 200 and snapkv["ratio"] == 0.2
    assert (snapkv["score_low"], snapkv["score_high"]) == stats.wilson(0, 8)
    assert (h2o["n"], h2o["n_failed"]) == (0, 1)
    text = report.markdown([full, snapkv, h2o])
    assert "## niah, m, question-out" in text and "| `snapkv` | 200 |" in text and "-75.0 %" in text and " 200 |" in text
    assert store.write_table(tmp_path, "t", text, [full, snapkv, h2o], "A title") == text
    assert (tmp_path/"t.md").read_text() == f"# A title\n\n{text}" and len((tmp_path/"t.csv").read_text().splitlines()) == 4


def test_the_table_has_the_interval_of_a_divergence():
    """stats.figure_interval(), over items; a single one has none."""
    def of(policy, values):
        return [{**row(i, policy, 0.5, "200"), "task": "fidelity", "answer": json.dumps({"kl": [kl], "same": [1]})} for i, kl in enumerate(values)]
    several, one, near_zero = report.table([*of("snapkv", (0.1, 0.2, 0.3, 0.2)), *of("h2o", [0.1]), *of("tova", (0.0, 0.0, 0.3, 0.1))])
    low, high = stats.figure_interval([0.1, 0.2, 0.3, 0.2])
    assert [several[name] for name in ("kl", "kl_low", "kl_high")] == pytest.approx([0.2, low, high]) and 0 < near_zero["kl_low"] < 0.1
    assert "kl_low" not in one and f"| 0.2000 | {low:.4f} to {high:.4f} |" in report.markdown([several, one])
    assert "to over 10 |" in report.markdown([near_zero])


def test_pooled_answers_are_counted_by_unit():
    rows = [row(i, "full", 1) for i in range(4)] + [row(i, policy, score, budget) for i in range(4)
            for policy, budget, score in [("snapkv:window=8", "200", i < 2), ("snapkv:window=8", "100", 0), ("h2o", "100", 1), ("tova", "100", None)]]
    (line,) = pool.pool(rows, ["task"])
    assert (line["n_units"], line["n_answers"], line["score"], line["reference"]) == pytest.approx((4, 12, 0.5, 1))  # units: 2/3 2/3 1/3 1/3
    assert line["difference_high"] == pytest.approx(-0.5 + 3.182*np.std([2/3, 2/3, 1/3, 1/3], ddof=1)/2, rel=3e-3)  # over 4 units, not 12 answers
    by_policy = pool.pool(rows, ["policy", "budget"])
    assert [(line["policy"], line["budget"], line["score"]) for line in by_policy] == [("snapkv", "200", 0.5), ("snapkv", "100", 0), ("h2o", "100", 1)]
    assert "| `snapkv` | 100.0 | 50.0 (-" in pool.markdown(by_policy, ["policy", "budget"], "full", across="budget")
    (against,) = pool.pool(rows, ["policy"], against="snapkv")
    assert (against["policy"], against["n_answers"], against["difference"]) == ("h2o", 4, 1)  # at the same budget; full is not compared
    figures = [{**row(i, policy, 0.5, budget), "task": "fidelity", "answer": json.dumps({"kl": [kl, 3*kl], "same": [0, 1]})}
               for i in range(4) for policy, budget, kl in (("full", "", 0.0), ("h2o", "100", 0.1*(i + 1)))]
    (nats,) = pool.pool([*rows, *figures], ["policy"], value="kl")  # of fidelity alone
    assert (nats["n_units"], nats["score"], nats["reference"]) == pytest.approx((4, 0.5, 0))
    assert "| `h2o` | 4 | 4 | 0.500 | 0.000 | +0.500 | +0." in pool.markdown([nats], ["policy"], "full", value="kl")
    lines = pool.pool([{**one, "answer": json.dumps({"kl": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8], "same": [1]*8})} if one["policy"] == "h2o" else
                       {**one, "answer": json.dumps({"kl": [0.0]*8, "same": [1]*8})} for one in figures], ["policy", "quarter"], value="kl")
    assert [(line["quarter"], round(line["difference"], 6)) for line in lines] == [("1", 0.05), ("2", 0.25), ("3", 0.45), ("4", 0.7)]
    with pytest.raises(ValueError, match="--value kl"):
        pool.pool(figures, ["quarter"])
    (alone,) = pool.pool([one for one in figures if one["policy"] == "h2o"], ["policy"], against="none", value="kl")
    assert {**alone, "n_comparisons": 0} == {**nats, "n_comparisons": 0} and alone["corrected_low"] > 0
    with pytest.raises(ValueError, match="for --value kl"):
        pool.pool(rows, ["policy"], against="none")
    two = pool.pool([*rows, *(row(i, "h2o", 1, "200") for i in range(4))], ["policy", "budget"], against="snapkv")
    assert "| `h2o` | 50.0 / 0.0 | 100.0 (" in pool.markdown(two, ["policy", "budget"], "snapkv", across="budget")
    evicted = [{**row(i, "tova", 0, budget), "decode_budget": decode} for i in range(4) for budget, decode in (("200", "200"), ("100", "100"), ("100", "64"))]
    assert [(line["decode_budget"], line["n_answers"]) for line in pool.pool([*rows[:4], *evicted], ["decode_budget"])] == [("same", 8), ("64", 4)]
    with pytest.raises(ValueError, match="no answer of keydiff"):
        pool.pool(rows, ["task"], against="keydiff")
    (both,) = pool.pool([*rows, *({**one, "task": "kv_retrieval", "model": "n"} for one in rows)], ["policy"], only=Only(policies=["h2o"]))
    assert (both["n_models"], both["n_tasks"]) == (2, 2)
    assert pool.markdown([both], ["policy"], "full").endswith("\n\nSome lines mix models and tasks: --by model,task keeps them apart.")
    with pytest.raises(ValueError, match="snapkv with several parameters"):
        pool.pool([*rows, row(0, "snapkv:window=16", 1, "100")], ["task"], against="snapkv")


def test_full_is_pooled_only_where_it_is_named():
    """Else it comes in as what is compared with."""
    rows = [row(i, policy, score, budget, protocol=protocol) for i in range(4) for policy, budget, score in (("full", "", 1), ("snapkv", "100", 0))
            for protocol in ("question-out", "question-in")]
    def lines(against: str, **only) -> list[tuple]:
        return [(line["policy"], line["n_answers"]) for line in pool.pool(rows, ["policy"], against, only=Only(**only))]
    assert lines("full", policies=["snapkv"], budgets=["100"], protocols=["question-out"]) == [("snapkv", 4)]
    assert lines("protocol=question-in", policies=["snapkv"]) == lines("protocol=question-in", budgets=["100"]) == [("snapkv", 4)]
    assert lines("protocol=question-in", policies=["full"], budgets=["100"]) == [("full", 4)]
    assert len(lines("protocol=question-in")) == 2


def test_a_divergence_is_never_below_0_and_tested_against_none():
    """Widened for sets of examples that differ much, its lower end would be."""
    rows = [{**row(i, "snapkv", 0.5, "100"), "task": "fidelity", "item": f"gsm8k:q{i}/8-train-draw{i % 3}/64",
             "answer": json.dumps({"kl": [(0.001, 0.01, 1.0)[i % 3]*(1 + 0.1*i)], "same": [1]})} for i in range(12)]
    lines = pool.pool([{**one, "set": name} for one in rows for name in "ab"], ["set"], "none", "kl")
    assert [line["difference_low"] for line in lines] == [0, 0] and lines[0]["difference"] > 0.3
    for text in (pool.markdown(lines, ["set"], "none", value="kl"), pool.markdown(lines, ["set"], "none", "set", "kl")):
        assert "2 intervals at 97.5 %" in text and "by chance" not in text and "tar" not in text


def test_a_task_inside_fidelity_has_its_settings():
    usual = {**row(0, "full", 1), "task": "fidelity", "item": "gsm8k:q0/8-cot/64", "answer": json.dumps({"kl": [0.0], "same": [1]}), "gold": ""}
    def one(item: str, **settings) -> tuple:
        found = report._scored({**usual, "item": item, "settings": {"of": "gsm8k", **settings}}, {}, Path("x"))
        return found["shots"], found["settings"]
    assert one("gsm8k:q0/8-cot/64") == one("gsm8k:q0/8-cot/64", shots=8, length=2000, exemplars="cot") == (8, "of gsm8k")
    assert one("gsm8k:q0/2-train/64", shots=2) == one("gsm8k:q0/2-train/64", shots=2, exemplars="train") == (2, "of gsm8k, shots 2, exemplars train")


@pytest.mark.parametrize("args, says", [
    (["--by", "colour"], "--by takes model, task"), (["--value", "f1"], "--value is score or kl"), (["--across", "policy"], "--across is one of --by"), (["--against", "snap"], "unknown"),
    (["--budget", "x"], "--budget"), (["--protocol", "both"], "question-in or question-out"), (["--task", "chess"], "chess"),
    (["--against", "h2o"], "no answer of h2o"), (["--policy", "tova"], "no answer to compare with full")])
def test_a_mistake_of_pool_is_one_sentence(tmp_path, args, says):
    (tmp_path/"m.answers.jsonl").write_text("".join(json.dumps({**row(i, "full", 1), "answer": "x", "gold": "x", "settings": {}}) + "\n" for i in range(2)))
    result = CliRunner().invoke(app, ["pool", "--out", str(tmp_path), *args])
    assert result.exit_code == 2 and says in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_folder_without_answers_and_a_task_without_items_say_so(tmp_path, data, monkeypatch):
    (tmp_path/"m.answers.jsonl").write_text("")
    result = CliRunner().invoke(app, ["report", "--out", str(tmp_path)])
    assert result.exit_code == 2 and f"holds no answers: `python -m evals run --out {tmp_path}` first" in result.stderr
    monkeypatch.setattr(niah, "load", lambda options: [])
    with pytest.raises(ValueError, match="niah has no item to ask"):
        run.run(plan(tmp_path/"out", data), None)


def test_report_writes_tables_and_pictures(tmp_path, data):
    assert run.run(plan(tmp_path, data, Case(), Case(SNAPKV, "0.5")), None) == []
    result = CliRunner().invoke(app, ["report", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    assert (tmp_path/"report.md").read_text().strip() == result.stdout.strip() and (tmp_path/"report.csv").is_file()
    assert (tmp_path/"niah-length_120-depths_0,50,100-needles_2-smollm2-135m-question-out.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path/"smollm2-135m.scores.jsonl").unlink()  # scores come from the answers
    assert CliRunner().invoke(app, ["report", "--out", str(tmp_path), "--no-pictures"]).stdout == result.stdout


def test_a_label_says_what_differs():
    assert panels.label(row(0, pykvc._core.parse_spec("snapkv:window=8"), 1.0, "0.5", cells="256")) == "snapkv:window=8 0.5 256 cells"
    assert panels.label(row(0, pykvc._core.parse_spec("snapkv"), 1.0, "64", type_k="q8_0")) == "snapkv 64 q8_0/f16"


def test_list_names_every_task():
    text = CliRunner().invoke(app, ["list"]).stdout
    assert all(f"{name}: " in text for name in TASKS)


@pytest.mark.parametrize("spec, expected", [("snapkv", True), ("snapkv:share=layers", True), ("keydiff", True), ("pyramidkv", True), ("adakv", True),
                                            ("snapkv:share=layer", True), ("snapkv:share=all", True), ("kvzip", False)])
def test_several_sequences_hold_layers_and_heads_that_differ(spec, expected):
    assert asking.side_by_side(Case(pykvc._core.parse_spec(spec), "0.5")) == expected
    assert not asking.side_by_side(Case(pykvc._core.parse_spec(spec), "0.5", cells="256"))
