"""The whole cache beside lm-evaluation-harness and what is published."""
import json

import pytest
from typer.testing import CliRunner

from evals import baselines, stats
from evals.cli import app
from test_evals import row


def answers(tmp_path, *found: dict) -> None:
    saved = [{**one, "answer": "x", "gold": "x", "settings": {}} for one in found]
    for name in ("answers", "scores"):
        (tmp_path/f"m.{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in saved))


def harness(tmp_path, **results) -> None:
    """As --output_path has it."""
    (tmp_path/"lm"/"m").mkdir(parents=True, exist_ok=True)
    (tmp_path/"lm"/"m"/"results_2026.json").write_text(json.dumps({
        "config": {"model_args": {"model": "/models/qwen2.5-1.5b.gguf"}}, "n-shot": dict.fromkeys(results, 5),
        "results": {task: {metric: value} for task, (metric, value, _) in results.items()},
        "n-samples": {task: {"original": 100, "effective": n} for task, (*_, n) in results.items()}}))


def test_scores_stand_beside_each_other(tmp_path):
    usual = {"model": "qwen2.5-1.5b"}
    asked = [{**row(i, policy, score, "100"*(policy != "full")), **usual, "task": task, "item": f"q{i}/8-cot" if task == "gsm8k" else f"HumanEval/{i}"}
             for task in ("gsm8k", "humaneval") for i in range(8) for policy, score in (("full", i < 6), ("snapkv", 0))]
    answers(tmp_path, *asked)
    harness(tmp_path, gsm8k_cot=("exact_match,flexible-extract", 0.5, 40))
    done = CliRunner().invoke(app, ["baselines", "--out", str(tmp_path), "--lm-eval", str(tmp_path/"lm")])
    assert done.exit_code == 0, done.stderr
    (low, high), (theirs_low, theirs_high) = ([100*x for x in stats.wilson(*of)] for of in ((6, 8), (20, 40)))
    assert f"| 8 | 75.0 ({low:.1f} to {high:.1f}) | 50.0 ({theirs_low:.1f} to {theirs_high:.1f}), 5 shots | 40 |" in done.stdout
    assert "| 70.7 |" in done.stdout and "Star" not in done.stdout and "arXiv 2409.12186" in done.stdout


def test_a_published_score_outside_the_interval_has_a_star(tmp_path):
    answers(tmp_path, *({**row(i, "full", 0), "model": "qwen2.5-1.5b", "task": "humaneval", "item": f"HumanEval/{i}"} for i in range(20)))
    text = CliRunner().invoke(app, ["baselines", "--out", str(tmp_path)]).stdout
    assert "| 70.7* |" in text and "does not hold it" in text


def test_subjects_are_put_together(tmp_path):
    asked = [{**row(i, "full", 1), "model": "qwen2.5-1.5b", "task": "mmlu", "item": f"anatomy/{i}/5", "tags": {"subject": "anatomy"}} for i in range(4)]
    harness(tmp_path, mmlu_anatomy=("acc,none", 0.5, 4), mmlu_virology=("acc,none", 0.25, 12))
    (line,) = baselines.lines(asked, tmp_path/"lm")
    assert (line["theirs"], line["theirs_n"], line["theirs_shots"], line["n_units"]) == (5/16, 16, 5, 1)


@pytest.mark.parametrize("without", ["model", "n-samples"])
def test_results_that_say_too_little_are_one_sentence(tmp_path, without):
    answers(tmp_path, row(0, "full", 1))
    harness(tmp_path, gsm8k_cot=("exact_match,flexible-extract", 0.5, 40))
    path = tmp_path/"lm"/"m"/"results_2026.json"
    path.write_text(path.read_text().replace(f'"{without}"', '"other"'))
    done = CliRunner().invoke(app, ["baselines", "--out", str(tmp_path), "--lm-eval", str(tmp_path/"lm")])
    assert done.exit_code == 2 and f"not of pykvc.lm_eval: KeyError('{without}')" in done.stderr


@pytest.mark.parametrize("args, says", [(["--lm-eval", "nowhere"], "holds no results"), ([], "no answer of the whole f16 cache")])
def test_a_mistake_is_one_sentence(tmp_path, args, says):
    answers(tmp_path, *(row(i, "full" if args else "snapkv", 1, "" if args else "100") for i in range(2)))
    done = CliRunner().invoke(app, ["baselines", "--out", str(tmp_path), *args])
    assert done.exit_code == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1
