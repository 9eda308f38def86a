"""The whole cache's scores beside those that others have: `python -m evals baselines --out OUT --lm-eval FOLDER`.

A policy is compared with the whole cache, so a wrong prompt or scorer in that is wrong in everything. Beside each
task's score stand lm-evaluation-harness' on the same model (FOLDER: its --output_path) and a published one
(evals/published.json). A gap that the interval does not hold has to be explained first.
"""
import json
from pathlib import Path
from typing import Any, Sequence

from pykvc.table import grid

from . import stats
from .report import by_unit, listed, percent, types, with_interval
from .stats import mean
from .store import Row, grouped

# Of the harness: task, or the beginning of its name; metric
THEIRS = {"gsm8k": ("gsm8k_cot", "exact_match,flexible-extract"), "mmlu": ("mmlu_", "acc,none"),
          "commonsense_qa": ("commonsense_qa", "acc,none")}
PUBLISHED = json.loads((Path(__file__).parent/"published.json").read_text(encoding="utf-8"))


def lines(rows: Sequence[Row], harness: Path | None) -> list[Row]:
    """One for each model, task, set and settings of the whole f16 cache: score, score_low, score_high, n of ours;
    theirs, theirs_low, theirs_high, theirs_n, theirs_shots where the harness has answers; published, source.
    ValueError: there is none, or a file is none of the harness'."""
    whole = [row for row in rows if row["policy"] == "full" and row["score"] is not None
             and row["protocol"] == "question-out" and not types(row)]
    if not whole:
        raise ValueError("there is no answer of the whole f16 cache, question-out: run --policy full first")
    runs = _runs(harness) if harness else []
    found = []
    for (model, task, set_, settings, chat), of in grouped(whole, ("model", "task", "set", "settings", "chat")).items():
        scores = by_unit(of, [row["score"] for row in of])
        low, high = stats.mean_interval(scores)
        published: Row = next((one for one in PUBLISHED if (one["model"], one["task"]) == (model, task)), {})
        found.append({"model": model, "task": listed(task, set_), "settings": listed(settings, "plain"*(not chat)),
                      "n": len(of), "n_units": len(scores), "score": mean(scores), "score_low": low, "score_high": high,
                      **_theirs(runs, model, task), "published": published.get("score"),
                      "source": f"{published['how']}: {published['source']}" if published else ""})
    return found


def _runs(folder: Path) -> list[dict[str, Any]]:
    """The harness' results of whole caches."""
    files = sorted(folder.rglob("results*.json"))
    if not files:
        raise ValueError(f"{folder} holds no results*.json: give the --output_path of python -m pykvc.lm_eval")
    try:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        whole = [run for run in found if run["config"]["model_args"].get("kv_policy", "full") == "full"]
        return [{"model": Path(run["config"]["model_args"]["model"]).stem,
                 **{name: run[name] for name in ("n-samples", "n-shot", "results")}} for run in whole]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} has results that are not of pykvc.lm_eval: {error!r}") from None


def _theirs(runs: Sequence[dict[str, Any]], model: str, task: str) -> Row:
    """Of the last run that has the task; parts (mmlu's subjects) by their number of items, which Wilson's interval
    takes as drawn."""
    name, metric = THEIRS.get(task, ("", ""))
    for run in reversed(runs) if name else ():
        parts = [part for part in run["n-samples"] if part.startswith(name) and metric in run["results"][part]]
        if run["model"] == model and parts:
            counts = [run["n-samples"][part]["effective"] for part in parts]
            right = sum(run["results"][part][metric]*n for part, n in zip(parts, counts))
            low, high = stats.wilson(right, sum(counts))
            return {"theirs": right/sum(counts), "theirs_low": low, "theirs_high": high, "theirs_n": sum(counts),
                    "theirs_shots": run["n-shot"][parts[0]]}
    return {}


def markdown(found: Sequence[Row]) -> str:
    table = [["model", "task", "settings", "n", "whole cache", "lm-evaluation-harness", "n", "published"]]
    for line in found:
        theirs = f"{with_interval(line, 'theirs')}, {line['theirs_shots']} shots" if "theirs" in line else ""
        table.append([line["model"], line["task"], line["settings"], str(line["n"]), with_interval(line), theirs,
                      str(line.get("theirs_n", "")), percent(line["published"]) + "*"*_outside(line)])
    sources = dict.fromkeys(line["source"] for line in found if line["source"])
    star = ["Star: the interval of the whole cache does not hold it."]*any(map(_outside, found))
    return "\n\n".join([grid(table, 3), "In percent, with 95 % intervals.", *star,
                        *(f"Published: {source}." for source in sources)])


def _outside(line: Row) -> bool:
    return line["published"] is not None and not line["score_low"] <= line["published"] <= line["score_high"]
