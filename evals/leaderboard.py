"""A line for each method, a column for each share of the cache that is removed, as kvpress ranks methods.

    python -m evals leaderboard --out out          # prints it, and writes leaderboard.md and leaderboard.csv there

A figure is the mean of the sets' means, so that every set weighs the same, whatever number of items it has. Its
interval takes the units of each set (a question, a document: tasks.unit()) as drawn for themselves, or, where a unit
stands in several sets (longbench: one document), all sets as rising and falling together. Evictions that see the
question stand in a table of their own: question-in, and policies that are told the question. The last table puts what
takes about as many bytes under one another, whatever made it small.
"""
import math
from pathlib import Path
from typing import Sequence

from pykvc import _core
from pykvc.table import grid, mebibytes

from . import stats
from .cases import Case
from .panels import label
from .report import CASE, largest_first, unit_of
from .store import Row, comma_separated, grouped

BOARD = ("model", "task", "settings", "chat", "n_ubatch", "seed")  # what has a leaderboard of its own
CONFIGURATION = ("protocol", "type_k", "type_v", *CASE)
BLIND, AWARE = "The eviction does not see the question", "The eviction sees the question"


def lines(rows: Sequence[Row]) -> list[Row]:
    """One for each configuration: score, score_low, score_high, n, n_sets, removed, bytes_used, and share_of_full, of
    the bytes that the whole cache uses in f16; None without answers of that."""
    found = []
    for of_group in grouped((row for row in rows if row["score"] is not None), BOARD).values():
        several = [_line({name: of[0][name] for name in BOARD + CONFIGURATION}, of)
                   for of in grouped(of_group, CONFIGURATION).values()]
        whole = [line["bytes_used"] for line in several if line["policy"] == "full" and _is_f16(line)]
        found += [{**line, "share_of_full": line["bytes_used"]/max(whole) if whole else None} for line in several]
    return found


def _is_f16(line: Row) -> bool:
    return line["type_k"] == line["type_v"] == "f16"


def _line(names: Row, rows: Sequence[Row]) -> Row:
    sets = grouped(rows, lambda row: row["set"])
    units = {name: [unit_of(row) for row in of_set] for name, of_set in sets.items()}
    scores = {name: stats.unit_means([row["score"] for row in of_set], units[name]) for name, of_set in sets.items()}
    n_units = len({unit for of_set in units.values() for unit in of_set})
    score, low, high = stratified(list(scores.values()), apart=n_units == sum(map(len, scores.values())))
    used = [sum(row["bytes_used"] for row in of_set)/len(of_set) for of_set in sets.values()]
    return {**names, "sees_question": sees_question(names), "removed": removed(names), "n_sets": len(sets),
            "n": len(rows), "n_units": n_units, "score": score, "score_low": low, "score_high": high,
            "bytes_used": sum(used)/len(used)}


def stratified(strata: Sequence[Sequence[float]], apart: bool = True) -> tuple[float, float, float]:
    """(mean of the strata's means, low, high), 95 %, of scores in [0, 1], one for each unit of a stratum. apart: no
    unit stands in several strata; else their errors may be the same ones, and are added.

    Each stratum has an interval, and these are put together as Zou, Huang and Zhang 2009, Computational Statistics &
    Data Analysis 53:1080, do for any linear function. A stratum in which all is right, or all wrong, or all alike, is
    not taken to be certain."""
    means = [sum(scores)/len(scores) for scores in strata]
    intervals = [_interval(scores) for scores in strata]
    mean = sum(means)/len(means)
    arms = [(one - low, high - one) for one, (low, high) in zip(means, intervals)]
    below, above = ((math.hypot(*side) if apart else sum(side))/len(means) for side in zip(*arms))
    return mean, max(0.0, mean - below), min(1.0, mean + above)


def _interval(scores: Sequence[float]) -> tuple[float, float]:
    """stats.mean_interval(); of scores that are all alike Wilson's, which is that of the widest spread with this
    mean."""
    return stats.wilson(sum(scores), len(scores)) if len(set(scores)) == 1 else stats.mean_interval(scores)


def sees_question(row: Row) -> bool:
    """Was the question there, or told, when the context was evicted?"""
    return row["policy"] != "full" and (row["protocol"] == "question-in" or Case(row["policy"]).asks)


def removed(row: Row) -> str:
    """Of the cache: "75 %"; "all but 512" of a budget in tokens."""
    if row["policy"] == "full":
        return "0 %"
    if not row["budget"]:
        return "no budget"
    kind, amount = _core.parse_budget(row["budget"])
    return f"all but {amount:g}" if kind == "tokens" else f"{round(100*(1 - amount), 4):g} %"


def write(out: Path, rows: Sequence[Row], title: str = "") -> str:
    """leaderboard.md and leaderboard.csv of the rows, into the folder; the text of the former."""
    found = lines(rows)
    text = (f"# {title}\n\n" if title else "") + markdown(found)
    (out/"leaderboard.md").write_text(text, encoding="utf-8")
    (out/"leaderboard.csv").write_text(comma_separated(found), encoding="utf-8")
    return text


# -- as text -----------------------------------------------------------------------------------------------------------

def markdown(found: Sequence[Row]) -> str:
    """Tables of each model, task and settings."""
    return "\n".join(_group(of_group) for of_group in grouped(found, BOARD).values())


def _group(found: list[Row]) -> str:
    n_sets, n = max(line["n_sets"] for line in found), max(line["n"] for line in found)
    n_units = max(line["n_units"] for line in found)
    units = f" of {n_units} units"*(n_units != n)
    text = [f"## {_title(found[0])}", f"Means over {n_sets} sets, {n} items{units}, in percent, with 95 % intervals. "
                                      "Columns: the share of the cache that is removed. Intervals are not corrected "
                                      f"for how many there are: {len(found)}. To compare two methods, `pool "
                                      "--against` has paired differences, corrected."]
    # full of question-in evicts nothing, too: it is full of question-out once more
    blind = [line for line in found if not line["sees_question"] and line["protocol"] != "question-in"]
    aware = [line for line in found if line["sees_question"]]
    for name, wanted in ((BLIND, blind), (AWARE, aware)):
        if wanted:
            text += [f"### {name}", _shares(wanted, n_sets, n)]
    if weighed := [line for line in blind if line["share_of_full"] is not None]:
        text += ["### At equal bytes", "Columns: bytes in use after the answer, about this share of what the whole "
                                       "cache uses in f16. The eviction does not see the question.",
                 _bytes(weighed, n_sets, n)]
    return "\n\n".join(text) + "\n"


def _title(line: Row) -> str:
    more = ["plain"*(not line["chat"]), f"n_ubatch {line['n_ubatch']}"*(line["n_ubatch"] != 512),
            f"seed {line['seed']}"*bool(line["seed"])]
    return ", ".join(filter(None, (line["task"], line["settings"], line["model"], *more)))


def _shares(found: list[Row], n_sets: int, n: int) -> str:
    """The whole cache first, then the best."""
    largest = sorted(found, key=lambda line: (not _full(line), largest_first(line)))
    columns = dict.fromkeys(line["removed"] for line in largest)
    methods = sorted(_by_method(found).items(), key=lambda pair: (not _full(pair[1][0]), -_mean_score(pair[1])))
    table = []
    for name, of_method in methods:
        cells = {line["removed"]: _cell(line, n_sets, n) for line in of_method}
        table.append([name, *(cells.get(column, "") for column in columns)])
    return grid([["method", *columns], *table], 1)


def _bytes(found: list[Row], n_sets: int, n: int) -> str:
    """Every configuration under that halving of the whole cache (100, 50, 25 % ...) which it is nearest to; of a method
    with several of them there, the nearest."""
    halvings = {id(line): -math.log2(line["share_of_full"]) for line in found}
    columns = sorted({max(0, round(halving)) for halving in halvings.values()})
    table = []
    for name, of_method in sorted(_by_method(found).items(), key=lambda pair: not _full(pair[1][0])):
        cells = {}
        for line in sorted(of_method, key=lambda line: -abs(halvings[id(line)] - round(halvings[id(line)]))):
            text = f"{_cell(line, n_sets, n)} at {mebibytes(line['bytes_used'])}"
            cells[max(0, round(halvings[id(line)]))] = text  # the nearest comes last
        table.append([name, *(cells.get(column, "") for column in columns)])
    return grid([["method", *(f"{100/2**column:.3g} %" for column in columns)], *table], 1)


def _full(line: Row) -> bool:
    return line["policy"] == "full"


def _mean_score(found: Sequence[Row]) -> float:
    return sum(line["score"] for line in found)/len(found)


def _by_method(found: Sequence[Row]) -> dict[str, list[Row]]:
    return grouped(found, lambda line: f"`{label({**line, 'budget': ''})}`"
                   + ", question-in"*(line["protocol"] == "question-in"))


def _cell(line: Row, n_sets: int, n: int) -> str:
    """A mean over fewer sets would not compare, and is not shown; one of fewer items says so."""
    if line["n_sets"] < n_sets:
        return f"{line['n_sets']} of {n_sets} sets"
    text = f"{100*line['score']:.1f} ({100*line['score_low']:.1f} to {100*line['score_high']:.1f})"
    return text + f", n {line['n']}"*(line["n"] < n)
