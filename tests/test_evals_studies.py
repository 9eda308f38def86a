"""Studies: a file says what is run, the folder holds it, and the report shows it. Small data of our own, SmolLM2."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import pykvc
from pykvc import batch
from evals import ask as asking
from evals import flags, panels, report, run, settings, study, work
from evals.cases import Case, cases
from evals.cli import app
from evals.items import Item, Options
from evals.prompts import count, render
from evals.tasks import TASKS, fidelity, gsm8k
from evals.tools import attention, latency
from evals.work import Job, Plan, open_model, sweeps
from test_evals_tasks import folder  # noqa: F401  (a fixture)

SMALL = '''
title = "Small"
n = 3
[[run]]
task = "mmlu"
shots = [1, 2]
policy = ["full", "snapkv:window=8", "pyramidkv:window=8"]
budget = "60%"
protocol = ["question-out", "question-in"]
[[picture]]
x = "shots"
panel = ["budget"]
[[picture]]
name = "front"
x = "bytes_used"
marker = "type_k"
front = true
'''


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def call(*args):
    return CliRunner().invoke(app, ["study", *map(str, args)])


def answers(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out/"smollm2-135m.answers.jsonl").read_text().splitlines()]


# -- the files ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", study.names())
def test_every_study_can_be_planned(name):
    found = study.read(name)
    plans = study.plans(found, Path("out"))
    assert plans or found.blocks["bench"] or found.blocks["attention"]
    assert all(plan.n for plan in plans) and (not plans or any(case.name == "full" for plan in plans for case in plan.cases))
    known = {line for block in found.blocks["picture"] for line in (block.get("x"), block.get("y"))}
    assert known <= {*panels.NAMES, None}


def test_a_study_has_a_number_and_a_name():
    assert study.find("1") == study.find("sensitivity") == study.find("1-sensitivity") and len(study.names()) == 12
    text = CliRunner().invoke(app, ["list"]).stdout
    assert all(f"study {name}: " in text for name in study.names())


def test_the_first_study_covers_what_was_asked():
    plans = study.plans(study.read("1"), Path("out"))
    assert {plan.settings["fidelity"]["of"] for plan in plans if plan.tasks == ["fidelity"]} == {"gsm8k", "mmlu", "commonsense_qa", "safety", "humaneval"}
    plans = plans[:3]
    assert {name for plan in plans for name in plan.tasks} == {"gsm8k", "mmlu", "commonsense_qa", "safety", "humaneval"}
    for plan in plans:
        assert len({case.name for case in plan.cases}) > 6 and len({case.budget for case in plan.cases if case.budget}) == 9
        assert set(plan.protocols) == {"question-in", "question-out"}
    only = settings.Only(["gsm8k"], ["shotkv"], ["0.5"], ["question-out"])
    small, without = study.plans(study.read("1"), Path("out"), n=2, only=only)
    assert without.tasks == ["gsm8k"] and without.settings["gsm8k"] == {"shots": 0} and [case.name for case in without.cases] == ["full"]
    assert [case.label() for case in small.cases] == ["full", f"{pykvc._core.parse_spec('shotkv')}, budget 0.5"] and small.n == 2
    assert (small.tasks, small.protocols) == (["gsm8k"], ["question-out"])


def test_settings_in_place_of_the_file_s():
    found = study.plans(study.read("4"), Path("out"), only=settings.Only(settings=["questions=5"]))
    assert {plan.settings[name]["questions"] for plan in found for name in plan.tasks} == {5}
    assert len(found) == len(study.plans(study.read("4"), Path("out")))
    (plan,) = study.plans(study.read("2"), Path("out"), only=settings.Only(["fidelity"], settings=["shots=3"]))
    assert plan.settings["fidelity"]["shots"] == 3  # a list gives way, too
    for wrong, says in (("questions", "NAME=VALUE"), ("question=5", "questions"), ("depths=0", "no task of 4-long-generation"), ("questions=x", "--questions")):
        with pytest.raises(ValueError, match=says):
            study.plans(study.read("4"), Path("out"), only=settings.Only(settings=[wrong]))


def test_the_smoke_study_has_every_task_with_every_policy():
    pairs = {(name, case.name) for plan in study.plans(study.read("smoke"), Path("out")) for name in plan.tasks for case in plan.cases}
    assert pairs == {(name, policy["name"]) for name in TASKS for policy in pykvc.policies()}


def test_run_has_a_flag_for_every_setting(monkeypatch, tmp_path):
    """A setting of 0 is one, too."""
    assert sorted(flags.HELP) == settings.SETTINGS
    planned, chosen = [], {"shots": 0, "order": 0, "depths": "0,50", "unsafe_code": True}
    monkeypatch.setattr("evals.cli.run", lambda plans, *_: planned.extend(plans) or [])
    given = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    args = ["run", "--task", "gsm8k,niah,humaneval", "--policy", "snapkv:window=8,kernel=5,full", "--budget", "50%,64", *given[:-1], "-n", "3", "--plain", "-t", "1"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.stderr
    [plan] = planned
    assert plan.settings == {"gsm8k": {"shots": 0, "order": 0}, "niah": {"depths": "0,50"}, "humaneval": {"shots": 0, "unsafe_code": True}}
    assert ([case.budget for case in plan.cases], plan.n, plan.chat, plan.n_threads, plan.n_parallel) == (["0.5", "64", ""], 3, False, 1, 16)


def test_same_is_the_budget_of_the_prompt():
    found = cases(["full", "shotkv"], ["0.4", "0.25"], ["same"], ["none"], ["f16"], ["f16"])
    assert [(case.budget, case.decode_budget) for case in found] == [("", ""), ("0.4", "0.4"), ("0.25", "0.25")]


@pytest.mark.parametrize("text, says", [
    ("[[run", "TOML"), ("[[run]]\n", "task"), ("", "nothing to do"), ("[run]\ntask = 'mmlu'", "[[run]]"), ("[[run]]\ntask = 'mlu'", "mmlu"),
    ("[[run]]\ntask = 'mmlu'\npolicies = 'full'", "policies"), ("[[run]]\ntask = 'mmlu'\npolicy = []", "empty"), ("n = '3'\n[[run]]\ntask = 'mmlu'", "whole number"),
    ("[[run]]\ntask = 'mmlu'\nn = 2.5", "whole number"), ("[[run]]\ntask = 'mmlu'\nshots = 'two'", "--shots"), ("[[run]]\ntask = 'mmlu'\nlength = 3", "--length"),
    ("[[run]]\ntask = 'mmlu'\npolicy = 'snapkv'", "--budget"), ("[[run]]\ntask = 'mmlu'\npolicy = 'snapkv'\nbudget = 1.5", "--budget"),
    ("[[run]]\ntask = 'mmlu'\nprotocol = 'both'", "question-in"), ("[[run]]\ntask = 'mmlu'\ncache_type = 'q3'", "q8_0"),
    ("[[bench]]\nkv_policy = 'snapvk'", "snapkv"), ("[[bench]]\nn_prompt = -1", "n_prompt"), ("[[attention]]\nn = 2", "task"),
    ("[[picture]]\nx = 'ratio'", "nothing to do"), ("n = 0\n[[run]]\ntask = 'mmlu'", "n in"), ("n_models = '2'\n[[run]]\ntask = 'mmlu'", "n_models in"),
    ("[[run]]\ntask = 'mmlu'\nn = -1", "1 or more"), ("[[attention]]\ntask = 'mmlu'\nn = 0", "1 or more"),
    ("[[run]]\ntask = 'mmlu'\n[[picture]]\nfile = 'nonsense'", "is of model, task"), ("[[run]]\ntask = 'mmlu'\n[[picture]]\ny = 'f1'", "kl"),
    ("[[run]]\ntask = 'mmlu'\n[[picture]]\nx = ['ratio']", "x in"), ("[[run]]\ntask = 'mmlu'\n[[picture]]\nonly = {tasks = 'mmlu'}", "only in"),
    ("[[run]]\ntask = 'mmlu'\nshots = -1", "0 or more"), ("[[run]]\ntask = 'gsm8k'\nfresh = 7", "0 or 1")])
def test_a_bad_file_is_one_sentence(tmp_path, folder, text, says):  # noqa: F811
    result = call(write(tmp_path/"bad.toml", text), "--data-dir", folder, "--out", tmp_path/"out")
    assert result.exit_code == 2 and says in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (tmp_path/"out").exists() or not any((tmp_path/"out").glob("*.md"))


@pytest.mark.parametrize("args, says", [
    (["nine"], "1-sensitivity"), (["nowhere.toml"], "nowhere.toml"), (["training"], "at least 2"), (["shots", "--task", "gms8k"], "gsm8k"),
    (["shots", "--policy", "snapvk"], "snapkv"), (["shots", "--n", "0"], "--n"), (["shots", "--model", "nowhere.gguf"], "nowhere.gguf"),
    (["shots", "--data-dir", "nowhere"], "nowhere"), (["shots", "--n-parallel", "0"], "--n-parallel")])
def test_mistakes_are_one_sentence(tmp_path, args, says):
    result = call(*args, "--out", tmp_path/"out")
    assert result.exit_code == 2 and says in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr


# -- a study is run -------------------------------------------------------------------------------------------------------

def test_a_study_runs_reports_and_goes_on(tmp_path, folder, monkeypatch):  # noqa: F811
    path, out = write(tmp_path/"small.toml", SMALL), tmp_path/"out"
    said = call(path, "--data-dir", folder, "--out", out, "--threads", "2", "--dry-run")
    assert said.exit_code == 0 and "36 rows in 12 configurations" in said.stdout and "hours" in said.stdout, said.stderr
    result = call(path, "--data-dir", folder, "--out", out, "--threads", "2", "--n-parallel", "2")
    assert result.exit_code == 0, result.stderr
    rows = answers(out)
    assert len(rows) == 2*3*2*3 and {row["settings"]["shots"] for row in rows} == {1, 2}
    assert all(row["n_parallel"] == 2 for row in rows)  # pyramidkv's, too, whose layers differ
    lines = report.table(report.scored(out))
    assert {(line["settings"], line["n"]) for line in lines} == {("shots 1", 3), ("shots 2", 3)}
    assert all("difference" in line for line in lines if line["policy"] != "full")
    text = (out/"report.md").read_text()
    assert text.startswith("# Small\n") and "## mmlu, shots 1, smollm2-135m, question-in" in text and (out/"report.csv").is_file()
    assert sorted(path.name for path in out.glob("*.png")) == [f"{name}-smollm2-135m-question-{end}.png" for name in ("front", "picture1") for end in ("in", "out")]
    monkeypatch.setattr(run, "_open", lambda *_: pytest.fail("opened again"))
    assert call(path, "--data-dir", folder, "--out", out, "--threads", "2").exit_code == 0 and answers(out) == rows
    assert "nothing is left" in call(path, "--data-dir", folder, "--out", out, "--dry-run").stdout


@pytest.mark.parametrize("policies, expected", [(["snapkv"], True), (["kvzip"], False), (["adakv"], True), (["snapkv", "keydiff"], False)])
def test_who_is_asked_together(policies, expected):
    """Also of cases that come one by one: --dry-run counts so, run asks so."""
    found = [case for case in cases(policies, ["25%", "50%"], ["none"], ["none"], ["f16"], ["f16"]) if case.policy != "full"]
    assert len(found) == 2*len(policies)
    assert asking.together(found) is asking.together(case for case in found) is expected


def test_side_by_side_is_one_by_one(tmp_path, folder):  # noqa: F811
    """The same tokens, kept counts, bytes and evictions; and the answers, which are short."""
    several = [Case(), Case(pykvc._core.parse_spec("snapkv:window=8"), "0.5"), Case(pykvc._core.parse_spec("shotkv:window=8,recent=8"), "0.5"),
               Case(pykvc._core.parse_spec("h2o"), "0.5"), Case(pykvc._core.parse_spec("snapkv:window=8"), "0.3"), Case(pykvc._core.parse_spec("snapkv:window=8"), "64"),
               Case(pykvc._core.parse_spec("adakv:window=8"), "0.5"), Case(pykvc._core.parse_spec("keydiff:share=all"), "0.5")]
    found = []
    for n_parallel in (1, 3):
        plan = Plan(["mmlu"], several, ["question-in", "question-out"], tmp_path/str(n_parallel), folder, 4, n_threads=2, n_parallel=n_parallel,
                    settings={"mmlu": {"shots": 2}})
        assert run.run(plan, None) == []
        found.append({(row["item"], row["policy"], row["budget"], row["protocol"]): row for row in answers(tmp_path/str(n_parallel))})
    one, three = found
    assert one.keys() == three.keys() and len(one) == 4*8*2
    for name, row in one.items():
        for what in ("n_context", "n_prompt", "kept", "evictions", "cells_allocated", "answer", "bytes_used", "bytes_full"):
            assert row[what] == three[name][what], (name, what)


def test_policies_share_a_context(tmp_path, folder, monkeypatch):  # noqa: F811
    """Under question-out: what each has is what it has alone, bytes of its window of queries included. The examples are
    evaluated once for every policy that needs something of its own."""
    several = ["snapkv:window=8", "keydiff:share=all", "knorm", "criticalkv:window=8", "adakv:window=8", "tova", "shotkv:window=8,recent=8", "h2o",
               "kvzip:chunk=64", "kvzip:chunk=64,share=all", "kvzip:chunk=64,sinks=8"]
    evaluated, prefill = [], pykvc.LLM.prefill
    monkeypatch.setattr(pykvc.LLM, "prefill", lambda self, *args, **how: evaluated.append(self.policy.partition(":")[0]) or prefill(self, *args, **how))

    def rows_of(policies, out):
        plan = Plan(["mmlu"], cases(policies, ["1000", "0.5", "64"], ["none"], ["none"], ["f16"], ["f16"]), ["question-out"], out, folder, 1, n_threads=2,
                    settings={"mmlu": {"shots": 2}})
        assert run.run(plan, None) == []
        return {(row["item"], row["policy"], row["budget"]): row for row in answers(out)}

    together = rows_of(several, tmp_path/"together")
    assert sorted(evaluated) == sorted(["adakv", "criticalkv", "shotkv", "h2o", "kvzip", "kvzip"]) and len(together) == 3*len(several)
    alone = {}
    for i, policy in enumerate(several):
        alone |= rows_of([policy], tmp_path/str(i))
    assert together.keys() == alone.keys()
    for name, row in together.items():
        for what in ("n_context", "n_prompt", "kept", "evictions", "cells_allocated", "answer", "bytes_used", "bytes_full", "bytes_allocated"):
            assert row[what] == alone[name][what], (name, what)


@pytest.mark.parametrize("n_head, how, expected", [(4000, {}, True), (700, {}, False), (700, dict(n_parallel=1), True), (4000, dict(n_gpu_layers=99), False)])
def test_policies_share_a_context_where_that_pays(monkeypatch, n_head, how, expected):
    """Three policies, two budgets, 100 tokens an answer: two evaluations saved, or 600 tokens generated side by side."""
    monkeypatch.setattr(work, "count", lambda vocabulary, text: len(text))
    plan = Plan(["gsm8k"], cases(["snapkv", "knorm", "tova"], ["0.5", "0.25"], ["none"], ["none"], ["f16"], ["f16"]), ["question-out"], Path("out"),
                **{"n_parallel": 16, **how})
    item, prompt = Item("a", "A?", gold="", max_tokens=100), work.Prompt("x"*n_head, "A?", [], "A?")
    jobs = [Job(plan, "gsm8k", {}, case, "question-out", 0, item, prompt) for case in plan.cases]
    found = sweeps(jobs, SimpleNamespace(vocabulary=None))
    assert [len(sweep) for sweep in found] == ([6] if expected else [2, 2, 2]) and sorted(sum(found, []), key=jobs.index) == jobs


def test_budgets_of_a_policy_share_a_context(tmp_path, folder, monkeypatch):  # noqa: F811
    """Each of the two subjects' examples is evaluated once for all three budgets, by one model."""
    evaluated, opened = [], []
    evaluate, init = batch._evaluate, pykvc.LLM.__init__
    monkeypatch.setattr(batch, "_evaluate", lambda session, seq, ids, spans, first: evaluated.append(first) or evaluate(session, seq, ids, spans, first))
    monkeypatch.setattr(pykvc.LLM, "__init__", lambda self, *args, **how: opened.append(how.get("n_seq_max", 1)) or init(self, *args, **how))
    plan = Plan(["mmlu"], cases(["tova"], ["0.3", "0.5", "64"], ["none"], ["none"], ["f16"], ["f16"]), ["question-out"], tmp_path, folder, 4, n_threads=2,
                n_parallel=2, settings={"mmlu": {"shots": 2}})
    assert run.run(plan, None) == []
    contexts = {row["item"].split("/")[0] for row in answers(tmp_path)}
    assert evaluated.count(0) == len(contexts) == 2 and len(evaluated) == 2 + 4*3 and opened.count(2) == 1
    assert [line["budget"] for line in report.table(report.scored(tmp_path))] == ["0.5", "0.3", "64"]  # from the largest on


def test_a_crash_side_by_side_is_found_one_by_one(tmp_path, folder, monkeypatch):  # noqa: F811
    really, bad = asking._figures, "law"

    def crash(answer, *args):
        if bad in seen[-1]:
            raise RuntimeError("out of luck")
        return really(answer, *args)
    seen = [""]
    generate = pykvc.LLM.generate
    monkeypatch.setattr(asking, "_figures", crash)
    monkeypatch.setattr(pykvc.LLM, "generate", lambda self, prompt, **how: seen.append(prompt) or generate(self, prompt, **how))
    monkeypatch.setattr(pykvc.LLM, "generate_batch", lambda *_, **__: 1/0)
    plan = Plan(["mmlu"], [Case()], ["question-out"], tmp_path, folder, 4, n_threads=2, n_parallel=2, settings={"mmlu": {"shots": 1}})
    [problem] = run.run(plan, None)
    assert "2 rows failed" in problem
    assert {row["item"]: "error" in row for row in answers(tmp_path)} == {row["item"]: "law" in row["item"] for row in answers(tmp_path)}


def test_fidelity_of_a_task_against_f16(tmp_path, folder):  # noqa: F811
    settings = {"fidelity": {"of": "mmlu", "reference": "f16", "tokens": 4}}
    several = [Case(), Case(type_k="q4_0", type_v="q4_0"), Case(pykvc._core.parse_spec("streaming_llm"), "0.3")]
    assert run.run(Plan(["fidelity"], several, ["question-out"], tmp_path, folder, 3, n_threads=2, settings=settings), None) == []
    full, q4, evicted = report.table(report.scored(tmp_path))
    assert full["kl"] < 1e-6 and q4["kl"] > 1e-4 and evicted["kl"] > 1e-4 and evicted["evictions"] == 1 and full["settings"] == "tokens 4, of mmlu, reference f16"
    for wrong, says in (({"of": "mlu"}, "mmlu"), ({"of": "fidelity"}, "mmlu"), ({"reference": "q8"}, "f16")):
        with pytest.raises(ValueError, match=says):
            run.run(Plan(["fidelity"], several, ["question-out"], tmp_path/"x", folder, 3, settings={"fidelity": wrong}), None)


def test_fidelity_compares_with_a_cache_of_the_same_ubatch_and_layers(tmp_path, folder, monkeypatch):  # noqa: F811
    opened, really = [], pykvc.LLM
    monkeypatch.setattr(fidelity, "REFERENCES", fidelity.References())
    monkeypatch.setattr(pykvc, "LLM", lambda *args, **how: opened.append(how) or really(*args, **{**how, "n_gpu_layers": 0}))
    for n_ubatch, layers in ((64, 0), (32, 0), (32, 1)):
        plan = Plan(["fidelity"], [Case()], ["question-out"], tmp_path/f"{n_ubatch}{layers}", folder, 1, n_ubatch=n_ubatch, n_threads=2, n_gpu_layers=layers,
                    settings={"fidelity": {"length": 100, "tokens": 4}})
        monkeypatch.setattr(work.Subject, "hold", lambda *_: None)
        assert run.run(plan, None) == []
        how = opened[-1]
        assert "kv_policy" not in how and (how["n_ubatch"], how["n_gpu_layers"]) == (n_ubatch, layers)  # the whole cache's


def test_fidelity_goes_on_with_the_same_answers(tmp_path, folder, monkeypatch):  # noqa: F811
    """Another process does not ask the whole cache again, unless the prompt is another."""
    def go_on(policy, shots):
        monkeypatch.setattr(fidelity, "REFERENCES", fidelity.References())
        plan = Plan(["fidelity"], cases([policy], ["0.5"], ["none"], ["none"], ["f16"], ["f16"]), ["question-out"], tmp_path, folder, 2, n_threads=2,
                    settings={"fidelity": {"of": "gsm8k", "tokens": 8, "shots": shots}})
        assert run.run(plan, None) == []
    go_on("full", 1)
    [path] = tmp_path.glob("*.references.jsonl")
    first = path.read_text().splitlines()
    assert len(first) == 2 and all(0 < len(json.loads(line)["tokens"]) <= 8 for line in first)
    generate = pykvc.LLM.generate
    monkeypatch.setattr(pykvc.LLM, "generate", lambda *_, **__: 1/0)
    go_on("streaming_llm", 1)
    assert {row["n_predicted"] for row in answers(tmp_path)} == {len(json.loads(line)["tokens"]) for line in first}
    monkeypatch.setattr(pykvc.LLM, "generate", generate)
    go_on("streaming_llm", 2)
    assert path.read_text().splitlines()[:2] == first and len(path.read_text().splitlines()) == 4


@pytest.mark.parametrize("protocol", ["question-out", "question-in"])
def test_fidelity_of_a_shared_context_is_that_of_each_alone(folder, protocol, monkeypatch):  # noqa: F811
    """What it is compared with, too: `alone` asks the whole cache again, one context for each."""
    subject, case = open_model(None), Case(pykvc._core.parse_spec("snapkv:window=8"), "0.5")
    settings = {**TASKS["fidelity"].SETTINGS, "of": "mmlu", "tokens": 4, "shots": 2}
    items = TASKS["fidelity"].load(Options(lambda text: count(subject.vocabulary, text), folder, None, 0, True, settings))
    asked = [(item, render(item, subject.vocabulary, True), case) for item in items]
    group = [one for one in asked if one[1].head == asked[0][1].head]
    with pykvc.LLM(n_ctx=1024, n_threads=2, **case.settings()) as llm:
        def ask(part):
            monkeypatch.setattr(fidelity, "REFERENCES", fidelity.References())
            return [figures for _, figures in fidelity.ask(llm, part, protocol, dict(n_threads=2))]
        together, *alone = (ask(part) for part in (group, *([one] for one in group)))
    names = ("n_context", "n_prompt", "kept", "evictions", "bytes_used", "answer")
    assert [[row[name] for name in names] for row in together] == [[row[name] for name in names] for (row,) in alone]
    assert len(group) > 1 and all(row["evictions"] == 1 for row in together)


def test_fidelity_of_an_answer_whose_tokens_are_evicted(tmp_path, folder):  # noqa: F811
    """Each with its own budgets, of one evaluated context; without a decode budget the answer stays whole."""
    both = cases(["streaming_llm:interval=4"], ["0.5", "0.3"], ["same", "none"], ["none"], ["f16"], ["f16"])
    settings = {"fidelity": {"length": 100, "tokens": 40}}
    for k, several in enumerate((both, *([case] for case in both))):
        assert run.run(Plan(["fidelity"], several, ["question-out"], tmp_path/str(k > 0), folder, 2, n_threads=2, settings=settings), None) == []
    together, alone = ({(row["item"], row["budget"], row["decode_budget"]): row for row in answers(tmp_path/name)} for name in ("False", "True"))
    assert together.keys() == alone.keys() and len(alone) == 8
    for name, row in together.items():
        for what in ("kept", "evictions", "bytes_used", "answer"):
            assert row[what] == alone[name][what], (name, what)
        frozen = together[name[0], name[1], ""]
        assert row is frozen or (row["evictions"] > frozen["evictions"] == 1 and row["bytes_used"] < frozen["bytes_used"])


def test_the_order_of_examples(folder):  # noqa: F811
    def shots(**more):
        from evals.items import Options
        return gsm8k.load(Options(len, folder, 1, settings={**gsm8k.SETTINGS, **more}))[0]
    given, other = shots(), shots(order=1)
    assert sorted(given.shots) == sorted(other.shots) and list(given.shots) != list(other.shots) and given.id != other.id
    assert shots(order=1).shots == other.shots != shots(order=2).shots


# -- latency, attention ---------------------------------------------------------------------------------------------------

def test_latency(tmp_path, monkeypatch):
    path = write(tmp_path/"fast.toml", '[[bench]]\nn_prompt = 64\nn_gen = 4\nrepetitions = 1\nkv_policy = ["full", "snapkv:window=8"]\nkv_budget = "50%"\n')
    result = call(path, "--out", tmp_path/"out", "--threads", "2")
    assert result.exit_code == 0, result.stderr
    rows = latency.rows(tmp_path/"out")
    assert len(rows) == 2 and (tmp_path/"out"/"latency.md").read_text().count("\n|") == 4 and list((tmp_path/"out").glob("latency-*.png"))
    monkeypatch.setattr(latency.bench, "run", lambda *_: pytest.fail("measured again"))
    assert call(path, "--out", tmp_path/"out", "--threads", "2").exit_code == 0 and latency.rows(tmp_path/"out") == rows


def test_a_row_of_bench_that_fails_is_said(tmp_path, monkeypatch):
    path = write(tmp_path/"fast.toml", '[[bench]]\nn_prompt = [64, 96]\nn_gen = 4\nrepetitions = 1\n')
    really = latency.bench.run

    def fails(cases, repetitions):
        if cases[0].n_prompt == 64:
            raise RuntimeError("out of luck")
        return really(cases, repetitions)
    monkeypatch.setattr(latency.bench, "run", fails)
    result = call(path, "--out", tmp_path/"out", "--threads", "2")
    assert result.exit_code == 1 and "out of luck" in result.stderr
    assert [row["n_prompt"] for row in latency.rows(tmp_path/"out")] == [96] and (tmp_path/"out"/"latency.md").is_file()


def test_an_item_whose_attention_fails_is_said(tmp_path, folder, monkeypatch):  # noqa: F811
    path = write(tmp_path/"look.toml", '[[attention]]\ntask = "mmlu"\nn = 2\npolicy = "snapkv:window=8"\nbudget = "60%"\n')
    really = attention.look

    def look(probe, *how):
        if probe.item.id.startswith("law"):
            raise RuntimeError("out of luck")
        figures, arrays = really(probe, *how)
        return {**figures, "evictions": {name: 0 for name in figures["evictions"]}}, arrays
    monkeypatch.setattr(attention, "look", look)
    result = call(path, "--data-dir", folder, "--out", tmp_path/"out", "--threads", "2")
    assert result.exit_code == 1 and "out of luck" in result.stderr and "evicted nothing of" in result.stderr
    assert (tmp_path/"out"/"attention.md").is_file()


def test_attention_patterns(tmp_path, folder, monkeypatch):  # noqa: F811
    path = write(tmp_path/"look.toml", "".join(
        f'[[attention]]\n{task}\nn = 1\npolicy = ["snapkv:window=8", "shotkv:window=8,recent=8"]\nbudget = "60%"\n'
        for task in ('task = "mmlu"\nshots = 2', 'task = "humaneval"')))
    out = tmp_path/"out"
    result = call(path, "--data-dir", folder, "--out", out, "--threads", "2")
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in (out/"smollm2-135m.attention.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["mmlu", "humaneval"]
    for row in rows:
        assert sum(row["mass"].values()) == pytest.approx(1, abs=1e-3) == sum(row["mass_bare"].values()) and 0 < row["entropy"] < 1
        assert [end for _, _, end in row["parts"]][-1] == row["n_tokens"] and row["parts"][0][1] == 0
        assert all(a[2] == b[1] for a, b in zip(row["parts"], row["parts"][1:]))
        for name, kept in row["kept"].items():
            assert kept["question"] == 1 and min(kept.values()) < 1, name
        arrays = np.load(out/row["arrays"])
        heat = arrays["heat"].astype(np.float32)
        assert heat.shape[1] == row["n_tokens"] and heat.sum(axis=1) == pytest.approx(1, abs=5e-2)
        assert all((line[min(len(line), (i + 1)*row["step"]):] == 0).all() for i, line in enumerate(heat))  # causal
    assert "shots" in dict.fromkeys(name for name, _, _ in rows[0]["parts"]) and "context" in dict.fromkeys(name for name, _, _ in rows[1]["parts"])
    assert len(list(out.glob("*.png"))) == 1 + 2*2 and "| smollm2-135m | mmlu" in (out/"attention.md").read_text() and (out/"attention.csv").is_file()
    monkeypatch.setattr(attention, "look", lambda *_: pytest.fail("looked again"))
    assert call(path, "--data-dir", folder, "--out", out, "--threads", "2").exit_code == 0


def test_figures_of_distributions():
    even, one = np.full((1, 8), 1/8), np.eye(8)[:1]
    assert attention.entropy(even) == pytest.approx(1) and attention.entropy(one) == pytest.approx(0, abs=1e-6)
    assert attention.share_of_tokens(even) == 1 and attention.share_of_tokens(one) == 1/8
    assert attention.cumulative(even) == pytest.approx(np.linspace(0, 1, attention.N_GRID + 1)) and attention.cumulative(one)[attention.N_GRID//8:] == pytest.approx(1)


def test_the_front_is_what_nothing_beats():
    assert panels.front([(1, 0.2), (2, 0.1), (2, 0.5), (3, 0.5), (4, 0.9)]) == [(1, 0.2), (2, 0.5), (4, 0.9)]
    assert panels.front([(1, 0.9), (2, 1.0), (3, 0.1)], less=True) == [(1, 0.9), (3, 0.1)]
