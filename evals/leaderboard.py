"""A line for each method, a column for each share of the cache that is removed, as kvpress ranks methods.

    python -m evals leaderboard --out out          # prints it, and writes leaderboard.md and leaderboard.csv there

A figure is the mean of the sets' means, so that every set weighs the same, whatever number of items it has. Its
interval takes the units of each set (a question, a document: tasks.unit()) as drawn for themselves, or, where a unit
stands in several sets (longbench: one document), all sets as rising and falling together. Evictions that see the
question stand in a table of their own: question-in, and policies that are told the question. The last table puts what
takes about as many bytes under one another, whatever made it small.
"""
import math
import statistics
from pathlib import Path
from typing import Any, Callable, Sequence

from pykvc import _core
from pykvc.table import grid, mebibytes

from . import stats
from .cases import Case
from .panels import file_of, label, picture, use_matplotlib
from .report import CASE, by_unit, largest_first, listed, types, unit_of, unusual, with_interval
from .stats import mean
from .store import Row, grouped, write_table

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
        whole = max((line["bytes_used"] for line in several if _full(line) and not types(line)), default=None)
        found += [{**line, "share_of_full": whole and line["bytes_used"]/whole} for line in several]
    return found


def _full(line: Row) -> bool:
    return line["policy"] == "full"


def _line(names: Row, rows: Sequence[Row]) -> Row:
    sets = list(grouped(rows, ("set",)).values())
    scores = [by_unit(of_set, [row["score"] for row in of_set]) for of_set in sets]
    n_units = len({unit_of(row) for row in rows})
    score, low, high = stratified(scores, apart=n_units == sum(map(len, scores)))
    return {**names, "sees_question": sees_question(names), "removed": removed(names), "n_sets": len(sets),
            "n": len(rows), "n_units": n_units, "score": score, "score_low": low, "score_high": high,
            "bytes_used": mean(mean(row["bytes_used"] for row in of_set) for of_set in sets)}


def stratified(strata: Sequence[Sequence[float]], apart: bool = True) -> tuple[float, float, float]:
    """(mean of the strata's means, low, high), 95 %, of scores in [0, 1], one for each unit of a stratum. apart: no
    unit stands in several strata; else their errors may be the same ones, and are added.

    One Wilson interval, of as many units of 0 and 1 as would vary like this mean (the effective sample size of Franco
    et al. 2019, PMC6690503), with Student's quantile: variances of few units each are guesses, worth the degrees of
    freedom of Satterthwaite 1946, Biometrics Bulletin 2:110. The score of a single unit varies as one drawn from all
    strata would. Where each stratum is all alike nothing shows how scores vary: Wilson's of all units. One stratum:
    stats.mean_interval()."""
    middle, n_units = mean(map(mean, strata)), (sum if apart else max)(map(len, strata))
    if len(strata) == 1:
        return middle, *stats.mean_interval(strata[0])
    squares = [statistics.variance(of)/len(of) if len(of) > 1 else middle*(1 - middle) for of in strata]
    freedom = [(len(of) if len(of) > 1 else max(2, n_units)) - 1 for of in strata]
    total = sum(squares) if apart else sum(map(math.sqrt, squares))**2
    if total < stats.EQUAL:
        return middle, *stats.wilson(middle*n_units, n_units)
    free = total**2/sum(one**2/n for one, n in zip(squares, freedom)) if apart else min(freedom)
    n = middle*(1 - middle)*len(strata)**2/total
    return middle, *stats.wilson(middle*n, n, stats.student(free))


def sees_question(row: Row) -> bool:
    """Was the question there, or told, when the context was evicted?"""
    return not _full(row) and (row["protocol"] == "question-in" or Case(row["policy"]).asks)


def removed(row: Row) -> str:
    """Of the cache: "75 %"; "all but 512" of a budget in tokens."""
    kind, amount = _core.parse_budget(row["budget"])
    if kind == "none":
        return "0 %" if _full(row) else "no budget"
    return f"all but {amount:g}" if kind == "tokens" else f"{round(100*(1 - amount), 4):g} %"


def write(out: Path, rows: Sequence[Row], title: str = "") -> str:
    """leaderboard.md and leaderboard.csv of the rows, into the folder; the text of the former."""
    found = lines(rows)
    return write_table(out, "leaderboard", markdown(found), found, title)


def draw(out: Path, found: Sequence[Row]) -> list[Path]:
    """PNG files, one for each leaderboard: scores against bytes, a line for each method in f16 and one for the whole
    cache in all types; those over all items whose eviction does not see the question."""
    use_matplotlib()
    paths = []
    for names, of in grouped(found, BOARD).items():
        n = max(line["n"] for line in of)
        shown = [line for line in of if line["n"] == n and line["protocol"] != "question-in"
                 and not line["sees_question"] and (_full(line) or not types(line))]
        whole = sorted(filter(_full, shown), key=lambda line: -line["bytes_used"])
        of_whole = listed(*(types(line) or "f16" for line in whole))
        path = file_of(out, "leaderboard", *map(str, names[:3]))
        if picture(path, f"{listed(*map(str, names[:3]))}; full is {of_whole}", {"x": "bytes_used"}, shown):
            paths.append(path)
    return paths


# -- as text -----------------------------------------------------------------------------------------------------------

def markdown(found: Sequence[Row]) -> str:
    """Tables of each model, task and settings."""
    return "\n".join(_group(of_group) for of_group in grouped(found, BOARD).values())


def _group(found: list[Row]) -> str:
    n_sets, n, n_units = (max(line[name] for line in found) for name in ("n_sets", "n", "n_units"))
    first, units = found[0], f" of {n_units} units"*(n_units != n)
    text = [f"## {listed(first['task'], first['settings'], first['model'], unusual(first))}",
            f"Means over {n_sets} sets, {n} items{units}, in percent, with 95 % intervals. Columns: the share of the "
            f"cache that is removed. Intervals are not corrected for how many there are: {len(found)}. To compare two "
            "methods, `pool --against` has paired differences, corrected."]

    def cell(line: Row) -> str:
        """A mean over fewer sets would not compare, and is not shown; one of fewer items says so."""
        if line["n_sets"] < n_sets:
            return f"{line['n_sets']} of {n_sets} sets"
        return with_interval(line) + f", n {line['n']}"*(line["n"] < n)

    # full of question-in evicts nothing, too: it is full of question-out once more
    blind = [line for line in found if not line["sees_question"] and line["protocol"] != "question-in"]
    for name, wanted in ((BLIND, blind), (AWARE, [line for line in found if line["sees_question"]])):
        if wanted:
            text += [f"### {name}", _shares(wanted, cell)]
    if weighed := [line for line in blind if line["share_of_full"] is not None]:
        text += ["### At equal bytes", "Columns: bytes in use after the answer, about this share of what the whole "
                                       "cache uses in f16. The eviction does not see the question.",
                 _bytes(weighed, cell)]
    return "\n\n".join(text) + "\n"


def _shares(found: list[Row], cell: Callable[[Row], str]) -> str:
    """The whole cache first, then the best."""
    columns = [line["removed"] for line in sorted(found, key=lambda line: (not _full(line), largest_first(line)))]
    best = sorted(grouped(found, _method).values(), key=lambda of: (not _full(of[0]), -mean(x["score"] for x in of)))
    return _grid(found, [_method(of[0]) for of in best], dict(zip(columns, columns)), lambda x: x["removed"], cell)


def _bytes(found: list[Row], cell: Callable[[Row], str]) -> str:
    """Every configuration under that halving of the whole cache (100, 50, 25 % ...) which it is nearest to; of a method
    with several of them there, the nearest."""
    halvings = {id(line): -math.log2(line["share_of_full"]) for line in found}
    columns = {id(line): max(0, round(halvings[id(line)])) for line in found}
    nearest_last = sorted(found, key=lambda x: -abs(halvings[id(x)] - round(halvings[id(x)])))
    return _grid(nearest_last, [_method(line) for line in sorted(found, key=lambda line: not _full(line))],
                 {column: f"{100/2**column:.3g} %" for column in sorted(columns.values())},
                 lambda line: columns[id(line)], lambda line: f"{cell(line)} at {mebibytes(line['bytes_used'])}")


def _method(line: Row) -> str:
    return f"`{label({**line, 'budget': ''})}`" + ", question-in"*(line["protocol"] == "question-in")


def _grid(found: Sequence[Row], methods: Sequence[str], columns: dict[Any, str], column: Callable[[Row], Any],
          cell: Callable[[Row], str]) -> str:
    """columns: what column() says of a line, and its heading. Of several lines in one cell the last counts."""
    cells = {(_method(line), column(line)): cell(line) for line in found}
    return grid([["method", *columns.values()],
                 *([name, *(cells.get((name, one), "") for one in columns)] for name in dict.fromkeys(methods))], 1)
