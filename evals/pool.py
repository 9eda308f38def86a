"""Answers pooled: what many small cells say together, against one policy, or another protocol, cache type or number of
examples, on the same items.

A table has a few questions in each cell, and its cells share them. So the unit is the question, or the context that
several of them share (tasks.unit()): its scores under all configurations of a line are one mean, and the interval is
over units, not answers. gsm8k's first question, asked with 1, 2 and 8 examples under six policies, is one unit of 18
answers.

Several comparisons in one table are corrected for their number (Bonferroni). Sets of examples that were drawn (gsm8k's
--order) are a second thing that answers share: stats.widening().
"""
from typing import Sequence

from pykvc.table import grid

from .report import (GROUP, Pair, as_asked, compared, difference, interval, largest_first, nats, pair_of, percent,
                     unit_of)
from .settings import EVERYTHING, Only
from .stats import mean
from .store import Row, grouped, values
from .tasks import TASKS

# of the tokens of fidelity: does it lose more, the longer an answer?
QUARTER = "quarter"
COLUMNS = (*GROUP, "shots", "policy", "budget", "decode_budget", "cells", QUARTER)
VALUES = {"score": percent, "kl": nats}             # what a figure is, and how it is shown
# what an answer and the one it is compared with have in common, but what is named; budgets, unless that is full's
NOTHING = "none"  # against: means alone, with their intervals
IN_COMMON, BUDGETS = (*GROUP, "policy", "item", QUARTER), ("budget", "decode_budget", "cells")


def pool(rows: Sequence[Row], by: Sequence[str], against: str = "full", value: str = "score",
         n_comparisons: int | None = None, only: Only = EVERYTHING) -> list[Row]:
    """A line for each value of the columns `by`, in the order of the answers, budgets from the largest on:
    report.difference(), n_answers, n_models and n_tasks. n_comparisons: by default those of the lines. Policies are
    named without parameters, a decode_budget that is the budget is "same". value: "score", or a further figure of a
    task, "kl" of fidelity, for those that have it. against: a policy's name, or "protocol=question-in", "shots=0",
    "type_k=q8_0,type_v=q8_0": answers that have these, and are else the same; "none": 0, so that a difference is the
    mean. only: what is pooled, whatever that is compared with.
    ValueError: an unknown column or value, no answer of `against`, or several of them to compare with."""
    for name in by:
        if name not in COLUMNS:
            raise ValueError(f"--by takes {', '.join(COLUMNS)}, not {name!r}")
    if value not in VALUES:
        raise ValueError(f"--value is {' or '.join(VALUES)}, not {value!r}")
    alone = against == NOTHING
    if alone and value == "score":
        raise ValueError("--against none is for --value kl: `report` has the scores with their intervals")
    if QUARTER in by and value == "score":
        raise ValueError("--by quarter is for --value kl: a score is of a whole answer")
    rows = [{**row, "policy": row["policy"].partition(":")[0], QUARTER: ""} for row in rows if row["score"] is not None]
    if value != "score":
        rows = [one for row in rows for one in _figures(row, value, QUARTER in by)]
    wanted, reference = ({}, {}) if alone else (named(against), _reference(rows, named(against), against))
    groups: dict[tuple, list[Pair]] = {}
    for row in sorted(rows, key=largest_first):  # so are lines and columns
        other = 0.0 if alone else reference.get(_same(row, wanted))
        itself = not alone and (_has(row, wanted) or "policy" in wanted and row["policy"] == "full")
        if other is not None and not itself and only.answer(row):
            groups.setdefault(values(as_asked(row), by), []).append(pair_of(row, other))
    # a KL is not compared with 0
    compare = [pairs for pairs in groups.values()
               if value == "score" or alone or any(pair.reference for pair in pairs)]
    n = n_comparisons or sum(difference(pairs, 1, value)["difference_low"] is not None for pairs in compare)
    return [{**dict(zip(by, names)), "n_answers": len(pairs), **difference(pairs, n, value),
             "n_models": len({pair.model for pair in pairs}), "n_tasks": len({pair.unit[0] for pair in pairs})}
            for names, pairs in groups.items()]


def _figures(row: Row, value: str, by_quarter: bool) -> list[Row]:
    """The answer with that figure as its score, whole or in quarters; none of a task without figures."""
    module = TASKS[row["task"]]
    if not hasattr(module, "extra"):
        return []
    parts = module.parts(row["answer"], 4) if by_quarter else [row["answer"]]
    return [{**row, QUARTER: str(k)*by_quarter, "score": module.extra(part)[value]} for k, part in enumerate(parts, 1)]


def named(against: str) -> dict[str, str]:
    """{"policy": "snapkv"} of a name; the columns and values of "protocol=question-in,budget=none"."""
    parts = [part.partition("=") for part in against.split(",")]
    if not all(equals for _, equals, _ in parts):
        return {"policy": against}
    for name, *_ in parts:
        if name not in COLUMNS or name in (QUARTER, "task"):
            raise ValueError(f"--against is a policy, or COLUMN=VALUE of {', '.join(COLUMNS[:-1])}, not {against!r}")
    return {name: "" if value == "none" else value for name, _, value in parts}


def _has(row: Row, wanted: dict[str, str]) -> bool:
    return all(str(row[name]) == value for name, value in wanted.items())


def _by_unit(wanted: dict[str, str]) -> bool:
    """Do other settings make other items of the same questions?"""
    return not {"settings", "shots"}.isdisjoint(wanted)


def _same(row: Row, wanted: dict[str, str]) -> tuple:
    """What an answer and the one it is compared with have in common."""
    names = IN_COMMON if wanted.get("policy") == "full" else IN_COMMON + BUDGETS
    different = {*wanted, *(("settings", "item") if _by_unit(wanted) else ())}
    return (unit_of(row), *values(row, [name for name in names if name not in different]))


def _reference(rows: Sequence[Row], wanted: dict[str, str], against: str) -> dict[tuple, float]:
    found = grouped((row for row in rows if _has(row, wanted)), lambda row: _same(row, wanted))
    if not found:
        raise ValueError(f"there is no answer of {against} to compare with")
    if not _by_unit(wanted) and any(len(of) > 1 for of in found.values()):
        raise ValueError(f"there are answers of {against} with several parameters to compare with: pool the folder of "
                         "one study, or some of its --task")
    return {same: mean(row["score"] for row in of) for same, of in found.items()}


def markdown(lines: Sequence[Row], by: Sequence[str], against: str, across: str = "", value: str = "score") -> str:
    """A line for each group; with `across`, one of `by`, a column for each of its values: score and, in brackets, the
    difference's interval, with a star where the corrected one excludes 0, too. Below it, how many comparisons that
    are, and which models or tasks a line mixes."""
    if across and across not in by:
        raise ValueError(f"--across is one of --by, {', '.join(by)}, not {across!r}")
    if not lines:
        raise ValueError(f"there is no answer to compare with {against}: see --task, --policy, --budget and --protocol")
    tested = value == "score" or any(line["reference"] for line in lines)  # a KL is above 0 in any case
    show, text = VALUES[value], compared(lines, tested)
    several = [name for name in ("model", "task") if any(line[f"n_{name}s"] > 1 for line in lines)]
    mix = f"\n\nSome lines mix {'s and '.join(several)}s: --by {','.join(several)} keeps them apart."*bool(several)
    rest = [name for name in by if name != across]

    def names(line: Row) -> tuple[str, ...]:
        return tuple(f"`{line[name]}`" if name == "policy" else str(line[name]) for name in rest)

    def range_of(line: Row, name: str = "difference") -> str:
        return interval(line, name, "+", show)
    if not across:
        corrected = ["corrected"]*bool(text)
        return grid([[*by, "units", "answers", value, against, "difference", "95 %", *corrected], *(
            [*names(line), str(line["n_units"]), str(line["n_answers"]), show(line["score"]), show(line["reference"]),
             show(line["difference"], sign="+"), range_of(line), *(range_of(line, name) for name in corrected)]
            for line in lines)], len(by)) + text + mix
    columns, table = list(dict.fromkeys(str(line[across]) for line in lines)), []
    for of_group, of in grouped(lines, names).items():
        cells = {str(line[across]): f"{show(line['score'])} ({range_of(line)})"
                                    + "*"*(tested and line["n_comparisons"] > 0 and excludes_0(line)) for line in of}
        # several where a column has other items, or --against is evicted, too
        references = dict.fromkeys(show(line["reference"]) for line in of)
        table.append([*of_group, " / ".join(references), *(cells.get(column, "") for column in columns)])
    if tested and any(line["n_comparisons"] for line in lines):
        text += (" " if text else "\n\n") + "Star: the corrected interval excludes 0."
    return grid([[*rest, against, *columns], *table], len(rest)) + text + mix


def excludes_0(line: Row) -> bool:
    """The corrected interval."""
    return line["corrected_low"] is not None and not line["corrected_low"] <= 0 <= line["corrected_high"]
