"""Answers pooled: what many small cells say together, against one policy on the same items.

A table has a few questions in each cell, and its cells share them. So the unit is the question, or the context that
several of them share (tasks.unit()): its scores under all configurations of a line are one mean, and the interval is
over units, not answers. gsm8k's first question, asked with 1, 2 and 8 examples under six policies, is one unit of 18
answers.
"""
from collections import defaultdict
from typing import Callable, Iterator, Sequence

from pykvc.table import grid

from . import stats
from .report import GROUP, as_asked, largest_first, unit_of
from .store import Row
from .tasks import TASKS

QUARTER = "quarter"                                             # of the tokens of fidelity: does it lose more, the longer an answer is?
COLUMNS = (*GROUP, "shots", "policy", "budget", "decode_budget", "cells", QUARTER)
VALUES = ("score", "kl")                                        # shares are shown in percent, nats as they are
SAME = (*GROUP, "item", QUARTER)                                        # of an answer and the one it is compared with,
SAME_BUDGET = ("budget", "decode_budget", "cells")              # and these, unless that is full's


def pool(rows: Sequence[Row], by: Sequence[str], against: str = "full", value: str = "score") -> list[Row]:
    """A line for each value of the columns `by`, in the order of the answers, budgets from the largest on. score and
    reference are means over units of a unit's mean, difference is theirs, with its interval: difference_low and
    difference_high, both None where nothing can be said of a figure (one unit, or equal values). Policies are named
    without parameters, a decode_budget that is the budget is "same". value: "score", or a further figure of a task,
    "kl" of fidelity, for those that have it.
    ValueError: an unknown column or value, no answer of `against`, or several of them to compare with."""
    for name in by:
        if name not in COLUMNS:
            raise ValueError(f"--by takes {', '.join(COLUMNS)}, not {name!r}")
    if value not in VALUES:
        raise ValueError(f"--value is {' or '.join(VALUES)}, not {value!r}")
    if QUARTER in by and value == "score":
        raise ValueError("--by quarter is for --value kl: a score is of a whole answer")
    rows = [{**row, "policy": row["policy"].partition(":")[0], QUARTER: ""} for row in rows if row["score"] is not None]
    if value != "score":
        rows = [{**row, QUARTER: quarter, "score": figures[value]} for row in rows if hasattr(TASKS[row["task"]], "extra")
                for quarter, figures in _figures_of(row, QUARTER in by)]
    reference = _reference([row for row in rows if row["policy"] == against], against)
    groups: dict[tuple, dict[tuple, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=largest_first):  # so are lines and columns
        other = reference.get(_same(row, against))
        if row["policy"] not in (against, "full") and other is not None:
            groups[tuple(as_asked(row)[name] for name in by)][unit_of(row)].append((row["score"], other))
    difference = stats.paired_difference if value == "score" else stats.figure_difference
    return [_line(dict(zip(by, values)), list(units.values()), difference) for values, units in groups.items()]


def _figures_of(row: Row, by_quarter: bool) -> Iterator[tuple[str, dict[str, float]]]:
    module = TASKS[row["task"]]
    if not by_quarter:
        yield "", module.extra(row["answer"])
        return
    for k, part in enumerate(module.parts(row["answer"], 4), 1):
        yield str(k), module.extra(part)


def _same(row: Row, against: str) -> tuple:
    return tuple(row[name] for name in (SAME if against == "full" else SAME + SAME_BUDGET))


def _reference(rows: Sequence[Row], against: str) -> dict[tuple, float]:
    found: dict[tuple, float] = {}
    for row in rows:
        if _same(row, against) in found:
            raise ValueError(f"there are answers of {against} with several parameters to compare with: pool the folder of one study, or some of its --task")
        found[_same(row, against)] = row["score"]
    if not found:
        raise ValueError(f"there is no answer of {against} to compare with")
    return found


def _line(names: Row, units: list[list[tuple[float, float]]], interval: Callable) -> Row:
    """units: of each, (score, reference) of every answer."""
    ours, theirs = ([sum(pair[i] for pair in of_unit)/len(of_unit) for of_unit in units] for i in (0, 1))
    difference, low, high = interval(ours, theirs)
    return {**names, "n_units": len(units), "n_answers": sum(map(len, units)), "score": sum(ours)/len(ours),
            "reference": sum(theirs)/len(theirs), "difference": difference,
            "difference_low": low, "difference_high": high}


def markdown(lines: Sequence[Row], by: Sequence[str], against: str, across: str = "", value: str = "score") -> str:
    """A line for each group; with `across`, one of `by`, a column for each of its values: score and, in brackets, the
    difference's interval. Below it, how many comparisons that are."""
    if across and across not in by:
        raise ValueError(f"--across is one of --by, {', '.join(by)}, not {across!r}")
    if not across:
        header = [*by, "units", "answers", value, against, "difference", "95 %"]
        figures = ([*_names(line, by), str(line["n_units"]), str(line["n_answers"]), _figure(line["score"], value),
                    _figure(line["reference"], value), _figure(line["difference"], value, "+"), _interval(line, value)]
                   for line in lines)
        return grid([header, *figures], len(by)) + comparisons(lines)
    rest, columns = [name for name in by if name != across], list(dict.fromkeys(str(line[across]) for line in lines))
    cells: dict[tuple, dict[str, str]] = defaultdict(dict)
    for line in lines:
        cells[tuple(_names(line, rest))][str(line[across])] = f"{_figure(line['score'], value)} ({_interval(line, value)})"
    references: dict[tuple, dict[str, None]] = defaultdict(dict)  # several where a column has other items, or --against is evicted, too
    for line in lines:
        references[tuple(_names(line, rest))][_figure(line["reference"], value)] = None
    return grid([[*rest, against, *columns],
                 *([*names, " / ".join(references[names]), *(of.get(column, "") for column in columns)]
                   for names, of in cells.items())], len(rest)) + comparisons(lines)


def comparisons(lines: Sequence[Row]) -> str:
    """A sentence for a table of several intervals: how many of them chance alone would put beside 0. "" of fewer."""
    n = sum(line["difference_low"] is not None for line in lines)
    return "" if n < 2 else (f"\n\n{n} comparisons at 95 % each: if nothing differed, about {n/20:.1f} of them would "
                             "exclude 0 by chance.")


def _names(line: Row, by: Sequence[str]) -> list[str]:
    return [f"`{line[name]}`" if name == "policy" else str(line[name]) for name in by]


def _figure(number: float, value: str, sign: str = "") -> str:
    return f"{100*number:{sign}.1f}" if value == "score" else f"{number:{sign}.3f}"


def _interval(line: Row, value: str) -> str:
    if line["difference_low"] is None:
        return "n/a"
    return f"{_figure(line['difference_low'], value, '+')} to {_figure(line['difference_high'], value, '+')}"
