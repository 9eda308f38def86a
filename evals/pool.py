"""Answers pooled: what many small cells say together, against one policy, or another protocol, cache type or number of
examples, on the same items.

A table has a few questions in each cell, and its cells share them. So the unit is the question, or the context that
several of them share (tasks.unit()): its scores under all configurations of a line are one mean, and the interval is
over units, not answers. gsm8k's first question, asked with 1, 2 and 8 examples under six policies, is one unit of 18
answers.

Several comparisons in one table are corrected for their number (Bonferroni). Sets of examples that were drawn (gsm8k's
--order) are a second thing that answers share: stats.widening().
"""
from typing import Iterator, NamedTuple, Sequence

from pykvc.table import grid

from . import stats
from .report import GROUP, as_asked, compared, largest_first, nats, unit_of
from .store import Row, grouped, values
from .tasks import TASKS, draw

# of the tokens of fidelity: does it lose more, the longer an answer?
QUARTER = "quarter"
COLUMNS = (*GROUP, "shots", "policy", "budget", "decode_budget", "cells", QUARTER)
VALUES = ("score", "kl")                            # shares are shown in percent, nats as they are
SAME = (*GROUP, "policy", "item", QUARTER)          # of an answer and the one it is compared with, but what is named;
SAME_BUDGET = ("budget", "decode_budget", "cells")  # and these, unless that is full's


class Pair(NamedTuple):
    """An answer, and the one it is compared with."""
    score: float
    reference: float
    unit: tuple[str, str]
    draw: str                       # the set of examples before it, of those that its task draws; "" of others


def pool(rows: Sequence[Row], by: Sequence[str], against: str = "full", value: str = "score",
         n_comparisons: int | None = None) -> list[Row]:
    """A line for each value of the columns `by`, in the order of the answers, budgets from the largest on. score and
    reference are means over units of a unit's mean, difference is theirs, with its interval: difference_low and
    difference_high, both None where nothing can be said of a figure (few units, or equal values). corrected_low and
    corrected_high are corrected for n_comparisons, by default those of the lines. Policies are named without
    parameters, a decode_budget that is the budget is "same". value: "score", or a further figure of a task, "kl" of
    fidelity, for those that have it. against: a policy's name, or "protocol=question-in", "shots=0",
    "type_k=q8_0,type_v=q8_0": answers that have these, and are else the same.
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
        rows = [{**row, QUARTER: quarter, "score": figures[value]} for row in rows
                if hasattr(TASKS[row["task"]], "extra")
                for quarter, figures in _figures_of(row, QUARTER in by)]
    wanted = named(against)
    reference = _reference([row for row in rows if _has(row, wanted)], wanted, against)
    groups: dict[tuple, list[Pair]] = {}
    for row in sorted(rows, key=largest_first):  # so are lines and columns
        other = reference.get(_same(row, wanted))
        if other is not None and not _has(row, wanted) and not ("policy" in wanted and row["policy"] == "full"):
            examples = draw(row["task"], row["item"], row.get("tags", {}))
            groups.setdefault(values(as_asked(row), by), []).append(Pair(row["score"], other, unit_of(row), examples))
    compare = [pairs for pairs in groups.values() if value == "score" or any(pair.reference for pair in pairs)]
    # a KL is not compared with 0
    n = n_comparisons or sum(_difference(pairs, value)[1] is not None for pairs in compare)
    return [_line(dict(zip(by, names)), pairs, value, n) for names, pairs in groups.items()]


def _figures_of(row: Row, by_quarter: bool) -> Iterator[tuple[str, dict[str, float]]]:
    module = TASKS[row["task"]]
    if not by_quarter:
        yield "", module.extra(row["answer"])
        return
    for k, part in enumerate(module.parts(row["answer"], 4), 1):
        yield str(k), module.extra(part)


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
    names = SAME if wanted.get("policy") == "full" else SAME + SAME_BUDGET
    different = {*wanted, *(("settings", "item") if _by_unit(wanted) else ())}
    return (unit_of(row), *values(row, [name for name in names if name not in different]))


def _reference(rows: Sequence[Row], wanted: dict[str, str], against: str) -> dict[tuple, float]:
    found = grouped(rows, lambda row: _same(row, wanted))
    if not found:
        raise ValueError(f"there is no answer of {against} to compare with")
    if not _by_unit(wanted) and any(len(of) > 1 for of in found.values()):
        raise ValueError(f"there are answers of {against} with several parameters to compare with: pool the folder of "
                         "one study, or some of its --task")
    return {same: sum(row["score"] for row in of)/len(of) for same, of in found.items()}


def _line(names: Row, pairs: list[Pair], value: str, n_comparisons: int) -> Row:
    scores, references = _unit_means(pairs)
    difference, low, high = _difference(pairs, value)
    _, lowest, highest = _difference(pairs, value, stats.corrected(n_comparisons))
    return {**names, "n_units": len(scores), "n_answers": len(pairs), "score": sum(scores)/len(scores),
            "reference": sum(references)/len(references), "difference": difference, "difference_low": low,
            "difference_high": high, "n_comparisons": n_comparisons, "corrected_low": lowest, "corrected_high": highest}


def _unit_means(pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
    """Of the answers, and of those they are compared with."""
    units = [pair.unit for pair in pairs]
    ours, references = [pair.score for pair in pairs], [pair.reference for pair in pairs]
    return stats.unit_means(ours, units), stats.unit_means(references, units)


def _difference(pairs: Sequence[Pair], value: str,
                level: float = stats.LEVEL) -> tuple[float, float | None, float | None]:
    """(difference, low, high)"""
    interval = stats.paired_difference if value == "score" else stats.figure_difference
    difference, low, high = interval(*_unit_means(pairs), level)
    if low is None or high is None:
        return difference, None, None
    times = stats.widening([pair.score - pair.reference for pair in pairs], [pair.unit for pair in pairs],
                           _draws(pairs), level)
    low, high = stats.widen(difference, low, high, times)
    return (difference, max(-1.0, low), min(1.0, high)) if value == "score" else (difference, low, high)


def _draws(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """Of each, the set of examples; the unit itself where the task has fewer than two of them here."""
    of_task: dict[str, set[str]] = {}
    for pair in pairs:
        of_task.setdefault(pair.unit[0], set()).update({pair.draw} - {""})
    return [(pair.unit[0], pair.draw) if pair.draw and len(of_task[pair.unit[0]]) > 1 else pair.unit for pair in pairs]


def markdown(lines: Sequence[Row], by: Sequence[str], against: str, across: str = "", value: str = "score") -> str:
    """A line for each group; with `across`, one of `by`, a column for each of its values: score and, in brackets, the
    difference's interval, with a star where the corrected one excludes 0, too. Below it, how many comparisons that
    are."""
    if across and across not in by:
        raise ValueError(f"--across is one of --by, {', '.join(by)}, not {across!r}")
    n = max((line["n_comparisons"] for line in lines), default=0)
    if not across:
        header = [*by, "units", "answers", value, against, "difference", "95 %", *["corrected"]*(n > 1)]
        figures = ([*_names(line, by), str(line["n_units"]), str(line["n_answers"]), _figure(line["score"], value),
                    _figure(line["reference"], value), _figure(line["difference"], value, "+"), _interval(line, value),
                    *[_interval(line, value, "corrected")]*(n > 1)] for line in lines)
        return grid([header, *figures], len(by)) + compared(n)
    rest, columns = [name for name in by if name != across], list(dict.fromkeys(str(line[across]) for line in lines))
    table = []
    for names, of in grouped(lines, lambda line: tuple(_names(line, rest))).items():
        cells = {str(line[across]): f"{_figure(line['score'], value)} ({_interval(line, value)})"
                                    + "*"*(n > 0 and excludes_0(line)) for line in of}
        # several where a column has other items, or --against is evicted, too
        references = dict.fromkeys(_figure(line["reference"], value) for line in of)
        table.append([*names, " / ".join(references), *(cells.get(column, "") for column in columns)])
    star = (" " if n > 1 else "\n\n")*(n > 0) + "Star: the corrected interval excludes 0."*(n > 0)
    return grid([[*rest, against, *columns], *table], len(rest)) + compared(n) + star


def excludes_0(line: Row, name: str = "corrected") -> bool:
    return line[f"{name}_low"] is not None and not line[f"{name}_low"] <= 0 <= line[f"{name}_high"]


def _names(line: Row, by: Sequence[str]) -> list[str]:
    return [f"`{line[name]}`" if name == "policy" else str(line[name]) for name in by]


def _figure(number: float, value: str, sign: str = "") -> str:
    return f"{100*number:{sign}.1f}" if value == "score" else nats(number, 3, sign)


def _interval(line: Row, value: str, name: str = "difference") -> str:
    if line[f"{name}_low"] is None:
        return "n/a"
    return f"{_figure(line[f'{name}_low'], value, '+')} to {_figure(line[f'{name}_high'], value, '+')}"
