"""Answers pooled, and in a report: a question is counted once, and comparisons are counted, too."""
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from evals import panels, pool, report, stats
from evals.tools import attention_report
from evals.cli import app
from test_evals import row

# -- pooled, and in a report -------------------------------------------------------------------------------------------

def asked(question: int, shots: int, policy: str, score: float, budget: str = "100") -> dict:
    return {**row(question, policy, score, "" if policy == "full" else budget), "task": "gsm8k",
            "item": f"q{question}/{shots}-cot", "settings": f"shots {shots}"}


def test_a_question_is_counted_once_whatever_is_asked_around_it():
    """Another number of shots, protocol, cache type or model: the same answers once more, and the same interval."""
    rng = np.random.default_rng(3)
    once = [asked(q, 8, policy, float(rng.integers(2))) for q in range(12) for policy in ("full", "snapkv", "h2o")]
    more = [{**one, **other} for one in once for other in (
        {"item": one["item"].replace("8-", "1-"), "settings": "shots 1"}, {"protocol": "question-in"},
        {"type_k": "q8_0"}, {"model": "n"})]
    (alone,), (together,) = pool.pool(once, ["task"]), pool.pool(once + more, ["task"])
    assert (alone["n_units"], alone["n_answers"], together["n_units"], together["n_answers"]) == (12, 24, 12, 120)
    for name in ("score", "reference", "difference", "difference_low", "difference_high"):
        assert together[name] == pytest.approx(alone[name])


def test_another_column_can_be_compared():
    """A protocol, cache types, numbers of examples: of answers that are else the same."""
    rows = [{**asked(q, shots, policy, float(q < n)), "protocol": protocol, "shots": shots}
            for shots, protocol, policy, n in ((8, "question-out", "full", 9), (8, "question-out", "snapkv", 6), (8, "question-in", "snapkv", 3),
                                               (0, "question-out", "full", 2)) for q in range(12)]
    (line,) = pool.pool(rows, ["protocol"], "protocol=question-in")  # full has no answer question-in
    assert (line["protocol"], line["n_answers"], line["score"], line["reference"]) == ("question-out", 12, 0.5, 0.25)
    out = [row for row in rows if row["protocol"] == "question-out"]
    (line,) = pool.pool(out, ["settings", "policy"], "shots=0")
    assert (line["settings"], line["policy"], line["n_units"], line["difference"]) == ("shots 8", "full", 12, pytest.approx(7/12))
    quantized = [{**row, "type_k": "q8_0", "type_v": "q8_0", "score": 0.0} for row in out if row["policy"] == "full"]
    lines = pool.pool([*out, *quantized], ["policy", "settings"], "policy=full,budget=none,type_k=q8_0,type_v=q8_0")
    assert [(line["policy"], line["settings"], line["reference"]) for line in lines] == [("snapkv", "shots 8", 0)]
    for wrong in ("colour=red", "task=gsm8k", "protocol=question-in,shots"):
        with pytest.raises(ValueError, match="COLUMN=VALUE|no answer of"):
            pool.pool(rows, ["policy"], wrong)


def test_the_table_counts_a_text_once(tmp_path):
    """Three needles in each of four texts, found or not together: four units."""
    scores = {"full": (1, 1, 1, 1), "snapkv": (1, 0, 0, 0)}
    rows = [{**row(0, policy, score, "100"*(policy != "full")), "item": f"text/8000/{i}/needle-{j}@{10*j}"}
            for j in range(3) for policy in scores for i, score in enumerate(scores[policy])]
    full, snapkv = report.table(rows)
    assert (snapkv["n"], snapkv["n_units"], snapkv["n_paired"]) == (12, 4, 12)
    assert (full["score_low"], full["score_high"]) == stats.wilson(4, 4)
    assert (snapkv["score_low"], snapkv["score_high"]) == stats.wilson(1, 4)
    found = snapkv["difference"], snapkv["difference_low"], snapkv["difference_high"]
    assert found == stats.paired_difference([1, 0, 0, 0], [1]*4)
    text = report.markdown([full, snapkv])
    assert "| n | units | score |" in text and "| 12 | 4 | 25.0 % |" in text
    assert "units" not in report.markdown(report.table([row(i, "full", 1) for i in range(3)]))  # where it is n


def divergence(policy: str, values: list[float], budget: str = "100") -> list[dict]:
    return [{**row(i, policy, 0.5, "" if policy == "full" else budget), "task": "fidelity",
             "item": f"gsm8k:q{i}/8-cot/64", "answer": json.dumps({"kl": [kl], "same": [1]})}
            for i, kl in enumerate(values)]


def test_equal_figures_have_no_interval(tmp_path):
    rows = [*divergence("full", [0]*4), *divergence("h2o", [0.2]*4), *divergence("tova", [0.1, 0.2, 0.3, 0.2]),
            *divergence("h2o", [0.1, 0.2, 0.2, 0.1], "50")]
    lines = pool.pool(rows, ["policy", "budget"], value="kl")
    text = pool.markdown(lines, ["policy", "budget"], "full", value="kl")
    assert "| `h2o` | 100 | 4 | 4 | 0.200 | 0.000 | +0.200 | n/a |" in text
    assert "comparison" not in text and "corrected" not in text  # of a KL with 0
    across = pool.markdown(lines, ["policy", "budget"], "full", "budget", "kl")
    assert "| 0.200 (n/a) |" in across and "*" not in across
    table = report.table(rows)
    assert ["kl_low" in line for line in table] == [False, False, True, True]
    [path] = panels.draw(tmp_path, [{"x": "n_kept", "y": "kl"}], table)  # a point without an interval beside others
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_table_of_many_comparisons_says_so(tmp_path):
    lines = [asked(q, 8, policy, float((q + i) % 2), budget) for q in range(6) for i, (policy, budget) in enumerate(
        [("full", ""), *((policy, budget) for policy in ("snapkv", "h2o") for budget in ("50", "100"))])]
    saved = [{**line, "answer": "x", "gold": "x", "settings": {"shots": 8}} for line in lines]
    (tmp_path/"m.answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in saved))
    said = [CliRunner().invoke(app, ["pool", "--out", str(tmp_path), *args]).stdout for args in (
        ["--by", "policy,budget"], ["--by", "policy,budget", "--across", "budget"], ["--by", "policy"],
        ["--by", "task"])]
    sentence = "4 comparisons at 95 % each: if nothing differed, about 0.2 of them would exclude 0 by chance."
    assert sentence in said[0] and sentence in said[1] and "Corrected: 4 intervals at 98.75 % each" in said[0]
    assert "| corrected |" in said[0] and "Star: the corrected interval excludes 0." in said[1]
    assert "2 comparisons" in said[2] and "comparison" not in said[3] and "units" in said[3]


def test_the_table_corrects_for_its_own_comparisons():
    """Four differences in one table, one in another."""
    budgets = ("50", "100", "150", "200")
    rows = [{**row(i, policy, float(i % 3 == 0 and policy == "full"), budget), "protocol": protocol}
            for i in range(12) for protocol, of in (("question-out", budgets), ("question-in", budgets[:1]))
            for policy, budget in (("full", ""), *(("snapkv", budget) for budget in of))]
    lines = {(line["protocol"], line["budget"]): line for line in report.table(rows)}
    for (protocol, _), line in lines.items():
        if line["policy"] == "full":
            assert "difference_corrected_low" not in line
            continue
        n = 4 if protocol == "question-out" else 1
        found = line["difference_corrected_low"], line["difference_corrected_high"]
        ours, full = [0.0]*12, [float(i % 3 == 0) for i in range(12)]
        assert line["n_comparisons"] == n and found == stats.paired_difference(ours, full, 1 - 0.05/n)[1:]
    text = report.markdown(list(lines.values()))
    out, _, inside = text.partition("question-in")
    assert "| corrected |" in out and "4 comparisons at 95 % each" in out and "at 98.75 % each" in out
    assert "corrected" not in inside and "comparison" not in inside


def test_more_comparisons_can_be_said_to_have_been_made(tmp_path):
    lines = [{**asked(q, 8, policy, float(q % 2), "50"*(policy != "full")), "answer": "x", "gold": "x",
              "settings": {"shots": 8}} for q in range(6) for policy in ("full", "snapkv", "h2o")]
    (tmp_path/"m.answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call = ["pool", "--out", str(tmp_path), "--by", "policy", "--comparisons"]
    assert "100 comparisons at 95 % each" in CliRunner().invoke(app, [*call, "100"]).stdout
    wrong = CliRunner().invoke(app, [*call, "0"])
    assert wrong.exit_code == 2 and "--comparisons is 1 or more, not 0" in wrong.stderr


def test_attention_counts_a_text_once():
    def looked_at(task: str, item: str, value: float) -> dict:
        return {"model": "m", "task": task, "settings": {}, "item": item, "tags": {}, "n_tokens": 9,
                "mass": {"question": value}, "mass_bare": {"question": value},
                **dict.fromkeys(("sinks", "entropy", "entropy_bare", "tokens_90", "tokens_90_bare"), value),
                "kept": {"snapkv 0.25": {"question": 1.0 + 1e-7}}}
    shared, apart = attention_report.lines([
        looked_at("niah", "text/1500/0/needle-1@0", 0.2), looked_at("niah", "text/1500/0/needle-2@50", 0.4),
        looked_at("gsm8k", "q0/8-cot", 0.2), looked_at("gsm8k", "q1/8-cot", 0.4)])
    assert (shared["n"], shared["sinks_low"], shared["sinks_high"]) == (2, None, None)
    assert shared["sinks"] == pytest.approx(0.3) == apart["sinks"]
    assert (apart["sinks_low"], apart["sinks_high"]) == pytest.approx(stats.mean_interval([0.2, 0.4]))
    assert apart["kept snapkv 0.25 question_low"] == pytest.approx(stats.wilson(2, 2)[0])  # all in both is not certain
