"""pykvc bench: what is measured and how it is printed, never how fast it was."""
import csv
import io
import json
import mmap
import sys

import numpy as np
import pytest
import tiny
from typer.testing import CliRunner

from pykvc import _core, bench, figures, race, report
from pykvc.cli import app
from pykvc.command import values

SNAPKV = dict(kv_policy=["snapkv:window=8"], kv_budget=[32])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny")/"llama.gguf")


@pytest.fixture(scope="module")
def model(path):
    return _core.Model(str(path))


def cases(path, **lists):
    return bench.cases(model=[path], n_threads=[1], n_batch=lists.pop("n_batch", [16]), **lists)


def rows(path, repetitions=2, **lists):
    return list(bench.run(cases(path, **lists), repetitions, "random"))


def cli(*args):
    return CliRunner().invoke(app, ["bench", *map(str, args)])


# -- cases ------------------------------------------------------------------------------------------------------------

def test_cases_are_every_combination(path):
    todo = cases(path, kv_policy=["full", "snapkv", "tova"], kv_budget=[32, "25%"], n_prompt=[64, 0], n_gen=[4, 0])
    assert len(todo) == (1 + 2*2)*3  # a budget changes nothing of full; nothing is measured of no prompt and no answer
    assert [(c.n_prompt, c.n_gen) for c in todo[:3]] == [(64, 4), (64, 0), (0, 4)]
    assert {c.kv_budget for c in todo if c.evicts} == {"32", "0.25"}


@pytest.mark.parametrize("lists, says", [
    (dict(n_prompt=["x"]), "n_prompt"), (dict(n_gen=[-1]), "n_gen"), (dict(n_threads=[0]), "n_threads"), (dict(n_ubatch=[0]), "n_ubatch"),
    (dict(n_prompt=[0], n_gen=[0]), "nothing to measure"), (dict(n_parallel=[17], n_batch=[16]), "n_parallel"), (dict(type_k=["q3"]), "q8_0"),
    (dict(flash_attn=["maybe"]), "flash_attn"), (dict(kv_policy=["snapvk"]), "snapkv"), (dict(kv_policy=["a:B"]), "not one written in Python"), (dict(kv_policy=["snapkv"]), "kv_budget"),
    (dict(kv_policy=["snapkv"], kv_budget=["150%"]), "kv_budget"), (dict(model=["nowhere.gguf"]), "nowhere.gguf")])
def test_mistakes(lists, says):
    with pytest.raises(ValueError, match=says):
        bench.cases(**lists)


def test_a_field_that_is_none_is_a_mistake():
    with pytest.raises(TypeError, match="n_ctx"):
        bench.cases(n_ctx=[512])


def test_bounded_cells(path):
    row, = rows(path, 1, n_prompt=[600], n_gen=[4], kv_policy=["snapkv:window=8"], kv_cells=["256"])
    assert row["kv_cells"] == "256" and row["kv_cells_allocated"] == 256 and row["kv_cells_used"] == row["n_short"] == 256 - 16
    assert row["n_evictions"] > 4 and row["decode_ratio_full"] > 0


# -- rows -------------------------------------------------------------------------------------------------------------

def test_row(path):
    row, = rows(path, 3, n_prompt=[100], n_gen=[4], **SNAPKV)
    assert row["kv_policy"].startswith("snapkv:window=8") and row["kv_budget"] == "32" and row["n_prompt"] == 100 and row["n_gen"] == 4
    assert row["kept"] == [32]*3 and row["n_kept"] == row["n_short"] == row["kv_cells_used"] == 32 and row["n_evictions"] == 1
    assert row["kv_bytes_used"] < row["kv_bytes_full"] <= row["kv_bytes_allocated"]
    assert row["peak_rss"] is None or row["peak_rss"] > row["kv_bytes_allocated"]
    for name in ("prefill", "decode", "full_prefill", "full_decode", "short_decode"):
        assert len(row[f"{name}_samples_ns"]) == len(row[f"{name}_samples_ts"]) == 3 and min(row[f"{name}_samples_ns"]) > 0
    assert len(row["prefill_cost_pct_samples"]) == 3*7  # calls of 16 tokens
    assert row["prefill_cost_pct_low"] <= row["prefill_cost_pct"] <= row["prefill_cost_pct_high"]
    ratios = [full/ours for ours, full in zip(row["decode_samples_ns"], row["full_decode_samples_ns"])]
    assert row["decode_ratio_full"] == sorted(ratios)[1] and row["decode_ratio_full_min"] == min(ratios)
    assert all(row[name] > 0 for name in ("evict_ms", "evict_pct", "score_ms", "decode_ratio_short", "prefill_ratio_full"))
    assert json.loads(json.dumps(row)) == row


def test_full_has_no_reference(path):
    row, = rows(path, n_prompt=[40], n_gen=[2])
    assert row["kv_policy"] == "full" and row["n_kept"] == 40 and row["prefill_avg_ts"] > 0 and row["decode_avg_ts"] > 0
    assert all(row[name] is None for name in ("prefill_ratio_full", "decode_ratio_full", "decode_ratio_short", "evict_ms", "prefill_cost_pct", "n_short"))
    assert row["full_decode_samples_ns"] == []


def test_a_repetition_is_timed_apart(model_path):
    row, = rows(model_path, 2, n_prompt=[100], n_gen=[4], kv_policy=["kvzip:window=16,chunk=64"], kv_budget=[60])
    assert len(set(row["kept"])) > 1 and row["n_kept"] == row["n_short"] == 60 and row["n_evictions"] == 1  # share=layers
    assert row["probe_ms"] > 0 and row["probe_pct"] > 0 and row["decode_ratio_short"] > 0


@pytest.mark.parametrize("policy, more, says", [
    ("finch", {}, "told a question"), ("kvzip", {"n_parallel": [2]}, "n_parallel 1"), ("kvzip", {"kv_cells": ["256"]}, "without kv_cells")])
def test_what_cannot_be_asked_is_refused(policy, more, says):
    with pytest.raises(ValueError, match=says):
        bench.cases(kv_policy=[policy], kv_budget=["25%"], **more)


def test_rows_have_the_same_fields(path):
    some = rows(path, 1, kv_policy=["full", "snapkv:window=8", "h2o"], kv_budget=[32], n_prompt=[0, 60], n_gen=[0, 2])
    assert len(some) == 3*3 and len({tuple(row) for row in some}) == 1


def test_depth_is_part_of_the_prompt(path):
    row, = rows(path, n_depth=[50], n_prompt=[30], n_gen=[2], kv_policy=["snapkv:window=8"], kv_budget=["50%"])
    assert row["n_kept"] == 40 and len(row["prefill_cost_pct_samples"]) == 2*2  # the depth's calls are not in it
    assert row["prefill_avg_ts"] == pytest.approx(np.mean([30e9/ns for ns in row["prefill_samples_ns"]]))


def test_parallel_sequences(path):
    row, = rows(path, n_parallel=[3], n_prompt=[40], n_gen=[2], **SNAPKV)
    assert row["n_evictions"] == 3 and row["decode_samples_ts"] == [3*2e9/ns for ns in row["decode_samples_ns"]]


@pytest.mark.parametrize("policy, n_evictions", [("snapkv:window=8", 1), ("h2o", 3)])  # h2o cannot remove a tail: filled again
def test_decode_does_not_drift(path, model, policy, n_evictions):
    case, = cases(path, n_depth=[60], n_prompt=[0], n_gen=[5], kv_policy=[policy], kv_budget=[32])
    runs = race.Race(model, case, np.arange(60, dtype=np.int32), lambda n: None)
    runs.warm_up()
    for r in range(3):
        if not runs.rewind():
            runs.prefill(r)
            runs.evict()
        runs.decode(r)
        assert {name: cache.ctx.pos_max() + 1 for name, cache in runs.caches.items()} == {"ours": 66, "full": 66, "short": 38}
    assert len(runs.evict_ms) == n_evictions


def test_text(path, model_path, model):
    with pytest.raises(ValueError, match="--random"):
        list(bench.run(cases(path, n_prompt=[40]), 1))
    smollm2 = _core.Model(str(model_path), vocab_only=True)
    tokens = bench.evaluated(smollm2, 3000, "prose", None)
    assert len(tokens) == 3000 and len(set(tokens.tolist())) > 80
    assert np.array_equal(tokens[:500], bench.evaluated(smollm2, 500, "prose", None))
    assert smollm2.detokenize(bench.evaluated(smollm2, 3, "a.txt", "The cat sat on the mat.")) == b"The cat sat"
    with pytest.raises(ValueError, match="a.txt has 2 tokens and 9"):
        bench.evaluated(smollm2, 9, "a.txt", "The cat")


def test_models_that_cannot_be_measured_are_refused(tmp_path):
    mamba = tiny.write(tmp_path/"mamba.gguf", "mamba")
    for lists in (dict(), SNAPKV):
        with pytest.raises(ValueError):
            rows(mamba, n_prompt=[40], n_gen=[2], **lists)


# -- how it is measured -----------------------------------------------------------------------------------------------

def test_caches_take_turns():
    calls, ticks = [], []

    class Fake:
        seqs = range(2)

        def __init__(self, name):
            self.ctx, self.name = self, name

        def decode(self, tokens, seq):
            calls.append((self.name, seq, tokens.tolist()))

    took = race.fill([Fake("a"), Fake("b")], np.arange(5), 2, ticks.append)
    assert [name for name, _, _ in calls] == list("abbaab" "baabba") and [len(ns) for ns in took] == [6, 6]
    assert [tokens for name, seq, tokens in calls if name == "a" and seq == 1] == [[0, 1], [2, 3], [4]] and sum(ticks) == 2*2*5


def test_median_interval():
    assert figures.median_interval([]) == (None, None) and figures.median_interval([3, 1, 2]) == (1, 3)
    rng = np.random.default_rng(0)
    for n in (7, 25, 70):
        holds = [low <= 1 <= high for low, high in (figures.median_interval(sample) for sample in rng.lognormal(0, 1, (4000, n)).tolist())]
        assert 0.94 < np.mean(holds) < 0.995


def test_peak_rss():
    if not figures.reset_peak_rss():
        pytest.skip("/proc/self/clear_refs cannot be written here")
    before = figures.peak_rss()
    with mmap.mmap(-1, 64 << 20) as memory:  # given back to the system at once, whatever allocates beside it
        memory[::4096] = b"1"*(len(memory)//4096)
    assert figures.peak_rss() > before + (60 << 20)
    assert figures.reset_peak_rss() and figures.peak_rss() < before + (32 << 20)


# -- the command ------------------------------------------------------------------------------------------------------

COMMAND = ("-p", "64,32", "-n", 3, "-r", 2, "-b", 16, "-t", 1, "--random", "--kv-policy", "full,snapkv:window=8,kernel=3", "--kv-budget", 32)


def test_formats(path):
    out = {name: cli("-m", path, *COMMAND, "-o", name) for name in report.FORMATS}
    assert all(result.exit_code == 0 and not result.stderr for result in out.values()), out
    listed = json.loads(out["json"].stdout)
    lines = [json.loads(line) for line in out["jsonl"].stdout.splitlines()]
    table = list(csv.DictReader(io.StringIO(out["csv"].stdout)))
    same = [(policy, str(n)) for policy in ("full", "snapkv:window=8,kernel=3,pool=avg") for n in (64, 32)]
    for some in (listed, lines, table):
        assert [(row["kv_policy"], str(row["n_prompt"])) for row in some] == same
    assert list(lines[0]) == list(listed[0]) and list(table[0]) == [name for name, value in listed[0].items() if not isinstance(value, list)]
    assert table[0]["kv_budget"] == "" and table[2]["kv_budget"] == "32"

    head, rule, *body = out["md"].stdout.splitlines()
    assert len(body) == 4 and len({len(line.split("|")) for line in (head, rule, *body)}) == 1
    assert "pp64+tg3" in body[0] and "snapkv:window=8" in body[2] and "type_k" not in head


def test_a_terminal_is_told_what_the_columns_are(path, capsys, monkeypatch):
    todo = cases(path, n_prompt=[32], n_gen=[2], kv_policy=["streaming_llm"], kv_budget=["16"])
    for told in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda told=told: told)
        report.markdown(todo, bench.run(todo, 1, "random"))
        assert (report.LEGEND in capsys.readouterr().out) is told


def test_table_has_no_columns_of_what_is_not_measured(path):
    head = cli("-m", path, "-p", 0, "-n", 2, "-d", 20, "-r", 1, "--random", "-ctk", "q8_0").stdout.splitlines()[0]
    assert "type_k" in head and "decode t/s" in head and not any(word in head for word in ("prefill", "evict", "full", "short"))


def test_environment_is_not_read(path, monkeypatch):  # or a row would not be what its parameters say
    monkeypatch.setenv("LLAMA_ARG_KV_POLICY", "streaming_llm")
    monkeypatch.setenv("LLAMA_ARG_KV_BUDGET", "8")
    assert json.loads(cli("-m", path, "-p", 32, "-n", 0, "-r", 1, "--random", "-o", "json").stdout)[0]["n_kept"] == 32


@pytest.mark.parametrize("args, says", [
    (["-o", "xml"], "md, csv, json, jsonl"), (["-r", 0], "repetitions"), (["-p", "12,x"], "n_prompt"), (["-p", ""], "n_prompt"),
    (["--random", "-f", "text"], "not both"), (["-f", "nowhere.txt"], "nowhere.txt"), (["--kv-policy", "snapkv"], "--kv-budget"),
    (["--kv-policy", "h2o", "--kv-budget", 40, "-ctv", "q8_0", "--random", "-n", 2], "quantized V"),
    (["--kv-policy", "full,snapkv:windows=3", "--kv-budget", 9], "window"), (["-fa", "perhaps"], "flash_attn")])
@pytest.mark.parametrize("output", ["md", "json"])
def test_mistakes_are_one_sentence(path, output, args, says):
    result = cli("-m", path, "-t", 1, "-o", output, *args)
    assert result.exit_code == 2 and not result.stdout
    assert says in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_rows_before_a_mistake_can_be_read(path):
    result = cli("-m", path, "-p", 40, "-n", 2, "-r", 1, "--random", "-o", "json", "-ctv", "q8_0", "--kv-policy", "full,h2o", "--kv-budget", 20)
    assert result.exit_code == 2 and [row["kv_policy"] for row in json.loads(result.stdout)] == ["full"]


def test_a_comma_separates_policies():
    assert values(["snapkv:window=32,kernel=5,tova", "pyramidkv:beta=3,full"]) == ["snapkv:window=32,kernel=5", "tova", "pyramidkv:beta=3", "full"]


def test_progress_only_on_a_terminal(path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    todo = cases(path, n_prompt=[40], n_gen=[2], kv_policy=["full", "snapkv:window=8"], kv_budget=[32])
    for stderr, draws in ((io.StringIO(), False), (Terminal(), True)):
        out = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setattr(sys, "stdout", out)
        report.json_lines(todo, report.watched(todo, 1, "random", None))
        assert ("row 2 of 2" in stderr.getvalue()) == draws == bool(stderr.getvalue()) and "row 3" not in stderr.getvalue()
        assert len([json.loads(line) for line in out.getvalue().splitlines()]) == 2  # the bar leaves stdout alone


def test_work_is_what_is_ticked(path):
    for lists in (dict(n_prompt=[40]), dict(n_prompt=[0], n_depth=[40])):
        for case in cases(path, n_gen=[2], n_parallel=[2], kv_policy=["full", "snapkv:window=8"], kv_budget=[32], **lists):
            ticks = []
            list(bench.run([case], 3, "random", tick=ticks.append))
            assert abs(sum(ticks) - bench.work(case, 3)) <= 2*(32 + 16)  # short is filled once, and full has one call more
