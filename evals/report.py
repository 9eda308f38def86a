"""Answers -> a table: what each policy scores, with intervals, and against the whole cache on the same items."""
from collections import Counter
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

from pykvc import _core
from pykvc.table import grid, mebibytes

from . import stats
from .items import Item
from .stats import mean
from .store import Row, files, grouped, key, read, scores_of, values, write_table
from .tasks import draw, task, unit, usual_settings, verdicts

# What full is looked for inside of
GROUP = ("model", "task", "set", "settings", "protocol", "chat", "n_ubatch", "seed", "type_k", "type_v")
CASE = ("policy", "budget", "decode_budget", "cells")
# means over answers
COSTS = ("n_prompt", "evictions", "n_predicted", "bytes_used", "bytes_full", "bytes_allocated", "prefill_ms",
         "evict_ms", "decode_ms")


def scored(out: Path, tasks: Sequence[str] = (), rescore: bool = False) -> list[Row]:
    """The answers of a folder, with their scores and verdicts; what has no score, or every one with rescore, is scored
    now."""
    found = []
    for path in files(out, "answers"):
        known = {} if rescore else read(scores_of(path))
        found += [_scored(row, known.get(key(row), {}), path) for row in read(path).values()
                  if not tasks or row["task"] in tasks]
    if not found:
        of = f" of {', '.join(tasks)}" if tasks else ""
        raise ValueError(f"{out} holds no answers{of}: `python -m evals run --out {out}` first")
    return found


def _scored(row: Row, known: Row, path: Path) -> Row:
    module, score, of_scorers = task(row["task"]), known.get("score"), known.get("verdicts", {})
    if "answer" in row:
        item = Item(row["item"], "", row["gold"], tags=row["tags"])
        score = float(module.score(item, row["answer"])) if score is None else score
        of_scorers = verdicts(row["task"], item, row["answer"])
    elif score is None and "error" not in row:
        raise ValueError(f"{path} is an archive, without the answers: it cannot be scored again")
    settings = {**usual_settings(row["task"], row.get("settings", {})), **row.get("settings", {})}
    if settings.get("exemplars") == "auto":  # what it came to, the id says
        settings["exemplars"] = draw(row["task"], row["item"], row.get("tags", {})).partition("-")[0]
    return {**row, "score": score, "verdicts": of_scorers, "settings": changed(row["task"], settings),
            "set": row.get("tags", {}).get(getattr(module, "SPLIT", None), ""), "shots": settings.get("shots")}


def by_scorer(rows: Sequence[Row]) -> list[Row]:
    """The rows, then, for each scorer of a task with several, its rows again with that scorer's score; their settings
    end with "scorer strict"."""
    done = [row for row in rows if row["score"] is not None]
    return [*rows, *({**row, "settings": listed(row["settings"], f"scorer {name}"), "score": row["verdicts"][name]}
                     for name in dict.fromkeys(name for row in done for name in row.get("verdicts", {}))
                     for row in done if name in row.get("verdicts", {}))]


def changed(name: str, settings: Row) -> str:
    """What is not the task's default, of what changes its items: "shots 4, order 1". --sets stands in the table as
    such; of --exemplars auto the default is cot."""
    usual = usual_settings(name, settings)
    cot = settings.get("exemplars") == "cot" and usual.get("exemplars") == "auto"
    return listed(*(f"{key} {value}" for key, value in settings.items() if key in usual and value != usual[key]
                    and key not in ("sets", "unsafe_code", *["exemplars"]*cot)))


def write(out: Path, rows: Sequence[Row], heading: str = "") -> str:
    """report.md and report.csv of the rows, into the folder, each published scorer in a table of its own; the text of
    the tables."""
    lines = table(by_scorer(rows))
    return write_table(out, "report", markdown(lines), lines, heading)


def table(rows: Sequence[Row]) -> list[Row]:
    """A line for each configuration, in the order in which they were run, but those that differ in the budget alone
    from the largest on: they are run together. n_comparisons: how many differences to full stand in its table, for
    whose number difference_corrected_low and _high are corrected."""
    configurations = grouped(rows, GROUP + CASE)
    sweeps = grouped((found[0] for found in configurations.values()), (*GROUP, "policy", "cells"))
    full = {(*values(row, GROUP), row["item"]): row["score"] for row in rows
            if row["policy"] == "full" and row["score"] is not None}
    found = []
    for first in (row for sweep in sweeps.values() for row in sorted(sweep, key=largest_first)):
        of = configurations[values(first, GROUP + CASE)]
        done = [row for row in of if row["score"] is not None]
        pairs = [pair_of(row, full[of_full]) for row in done
                 if row["policy"] != "full" and (of_full := (*values(row, GROUP), row["item"])) in full]
        found.append((first, of, done, pairs))
    counts = Counter(title(first) for first, *_, pairs in found if pairs)
    return [{**{name: first[name] for name in GROUP + CASE}, "shots": first.get("shots"), "n": len(done),
             "n_failed": len(of) - len(done), **(_figures(done) if done else {}),
             **(_against_full(pairs, counts[title(first)]) if pairs else {})} for first, of, done, pairs in found]


def _figures(rows: Sequence[Row]) -> Row:
    """Of the answers of a configuration."""
    scores = by_unit(rows, [row["score"] for row in rows])
    n_before = mean(row["n_context"] if row["protocol"] == "question-out" else row["n_prompt"] for row in rows)
    n_kept = mean(mean(row["kept"]) for row in rows)
    line = {"n_units": len(scores), "score": mean(scores), **_ends("score", stats.mean_interval(scores)),
            "n_before": n_before, "n_kept": n_kept, "ratio": n_kept/n_before if n_before else None,
            **{name: mean(row[name] for row in rows) for name in COSTS}}
    if extra := getattr(task(rows[0]["task"]), "extra", None):
        more = [extra(row["answer"]) for row in rows]
        for name in more[0]:
            figures = by_unit(rows, [of_row[name] for of_row in more])
            line |= {name: mean(figures), **_ends(name, stats.figure_interval(figures))}
    return line


def _against_full(pairs: "Sequence[Pair]", n_comparisons: int) -> Row:
    """Only the answers that are compared."""
    line = difference(pairs, n_comparisons)
    reference = line.pop("reference")
    return {"n_paired": len(pairs), **{name.replace("corrected", "difference_corrected"): value
                                       for name, value in line.items() if name not in ("n_units", "score")},
            "relative": line["difference"]/reference if reference else None}


# -- answers that are compared --------------------------------------------------------------------------------------

class Pair(NamedTuple):
    """An answer, and the one it is compared with."""
    score: float
    reference: float
    unit: tuple[str, str]
    model: str
    draw: str                       # the set of examples before it, of those that its task draws; "" of others


def pair_of(row: Row, reference: float) -> Pair:
    drawn = draw(row["task"], row["item"], row.get("tags", {}))
    return Pair(row["score"], reference, unit_of(row), row["model"], drawn)


def difference(pairs: Sequence[Pair], n_comparisons: int, value: str = "score") -> Row:
    """n_units; score and reference, means over units of a unit's mean; difference, theirs; its interval,
    difference_low and difference_high; and that corrected for n_comparisons, corrected_low and corrected_high. Ends are
    None where nothing can be said of a figure. value: "score", in [0, 1], or a figure of 0 or more."""
    units = [pair.unit for pair in pairs]
    ours, references = (stats.unit_means(of, units) for of in list(zip(*pairs))[:2])
    line: Row = {"n_units": len(ours), "score": mean(ours), "reference": mean(references),
                 "n_comparisons": n_comparisons}
    for name, level in (("difference", stats.LEVEL), ("corrected", stats.corrected(n_comparisons))):
        interval = stats.paired_difference if value == "score" else stats.figure_difference
        middle, *ends = interval(ours, references, level)
        if None not in ends:
            differences = [pair.score - pair.reference for pair in pairs]
            ends = stats.widen(middle, *ends, stats.widening(differences, units, _draws(pairs), level))
        if value == "score":
            ends = max(-1.0, ends[0]), min(1.0, ends[1])
        elif None not in ends and not any(references):  # a figure itself
            ends = max(0.0, ends[0]), ends[1]
        line |= {"difference": middle, **_ends(name, ends)}
    return line


def _draws(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """Of each, the set of examples; the unit itself where the task has fewer than two of them here."""
    of_task: dict[str, set[str]] = {}
    for pair in pairs:
        of_task.setdefault(pair.unit[0], set()).update({pair.draw} - {""})
    return [(pair.unit[0], pair.draw) if pair.draw and len(of_task[pair.unit[0]]) > 1 else pair.unit for pair in pairs]


def unit_of(row: Row) -> tuple[str, str]:
    """What intervals count once: the same question under another policy, protocol, cache type or model is one unit."""
    return row["task"], unit(row["task"], row["item"], row.get("tags", {}))


def by_unit(rows: Sequence[Row], figures: Sequence[float]) -> list[float]:
    return stats.unit_means(figures, [unit_of(row) for row in rows])


def _ends(name: str, interval: Sequence[Any] | None) -> Row:
    return dict(zip((f"{name}_low", f"{name}_high"), interval or ()))


def largest_first(row: Row) -> tuple:
    """Orders by budgets: ratios, then tokens."""
    amounts = [_core.parse_budget(row[name]) for name in ("budget", "decode_budget")]
    return tuple((kind == "tokens", -amount) for kind, amount in amounts)


def as_asked(row: Row) -> Row:
    """With the decode_budget that --decode-budget named: "same" is the budget."""
    return {**row, "decode_budget": "same"} if row["decode_budget"] and row["decode_budget"] == row["budget"] else row


# -- as text --------------------------------------------------------------------------------------------------------

def percent(share: float | None, sign: str = "", unit: str = "") -> str:
    return "" if share is None else f"{100*share:{sign}.1f}{unit}"


def nats(number: float, digits: int = 3, sign: str = "") -> str:
    """More than 10 nats either way is no limit at all: the upper ends of few, skewed figures."""
    return f"{number:{sign}.{digits}f}" if abs(number) < 10 else "over 10" if number > 0 else "below -10"


def interval(line: Row, name: str, sign: str = "", show: Callable[..., str] = percent) -> str:
    """"" of a line without one, n/a where nothing can be said."""
    if f"{name}_low" not in line:
        return ""
    ends = line[f"{name}_low"], line[f"{name}_high"]
    return "n/a" if None in ends else " to ".join(show(end, sign=sign) for end in ends)


def with_interval(line: Row, name: str = "score") -> str:
    return f"{percent(line[name])} ({interval(line, name)})"


def types(row: Row) -> str:
    """K/V, of cache types that are not the default."""
    return "" if row["type_k"] == row["type_v"] == "f16" else f"{row['type_k']}/{row['type_v']}"


def _if_there(name: str, show: Callable[..., str] = str, **how: str) -> Callable[[Row], str]:
    return lambda line: "" if line.get(name) is None else show(line[name], **how)


def _whole(n: float) -> str:
    return f"{n:.0f}" if n >= 10 or n == int(n) else f"{n:.1f}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "policy": _if_there("policy", "`{}`".format), "budget": _if_there("budget"), "decode": _if_there("decode_budget"),
    "cells": _if_there("cells"), "K/V": types, "n": _if_there("n"),
    "units": lambda line: "" if line.get("n_units", line["n"]) == line["n"] else str(line["n_units"]),
    "failed": lambda line: str(line["n_failed"] or ""), "score": _if_there("score", percent, unit=" %"),
    "95 %": lambda line: interval(line, "score"), "vs full": _if_there("difference", percent, sign="+", unit=" %"),
    "95 % of it": lambda line: interval(line, "difference", "+"),
    "corrected": lambda line: interval(line, "difference_corrected", "+") if line.get("n_comparisons", 0) > 1 else "",
    "relative": _if_there("relative", percent, sign="+", unit=" %"), "KL": _if_there("kl", "{:.4f}".format),
    "95 % of KL": lambda line: interval(line, "kl", show=lambda end, sign: nats(end, 4)),
    "tokens": _if_there("n_before", _whole), "kept": _if_there("n_kept", _whole),
    "ratio": _if_there("ratio", percent, unit=" %"), "evictions": _if_there("evictions", _whole),
    "KV used": _if_there("bytes_used", mebibytes), "of": _if_there("bytes_full", mebibytes),
    "allocated": _if_there("bytes_allocated", mebibytes)}
# where a line of the table has something to say
OPTIONAL = ("decode", "cells", "K/V", "units", "failed", "corrected", "KL", "95 % of KL")


def markdown(lines: Sequence[Row]) -> str:
    """A table for each model, task and protocol."""
    return "\n".join(f"## {name}\n\n{_table(of_name)}\n" for name, of_name in grouped(lines, title).items())


def _table(lines: Sequence[Row]) -> str:
    cells = {name: [show(line) for line in lines] for name, show in COLUMNS.items()}
    shown = [name for name in cells if name not in OPTIONAL or any(cells[name])]
    return grid([shown, *zip(*(cells[name] for name in shown))], 2) + compared(lines)


def title(line: Row) -> str:
    """What stands in one table and in one picture: all of GROUP but the cache types, where it is not the default."""
    return listed(line["task"], line["set"], line["settings"], line["model"], line["protocol"], unusual(line))


def unusual(line: Row) -> str:
    """How it was asked, where that is not the default."""
    return listed("plain"*(not line["chat"]), f"n_ubatch {line['n_ubatch']}"*(line["n_ubatch"] != 512),
                  f"seed {line['seed']}"*bool(line["seed"]))


def listed(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def compared(lines: Sequence[Row], tested: bool = True) -> str:
    """A sentence below two comparisons or more: how many they are, and what was corrected for that. tested: with 0."""
    n = max((line.get("n_comparisons", 0) for line in lines), default=0)
    chance = f"{n} comparisons at 95 % each: if nothing differed, about {n/20:.1f} of them would exclude 0 by chance. "
    return "" if n < 2 else (f"\n\n{chance*tested}Corrected: {n} intervals at {100*stats.corrected(n):.4g} % each, so "
                             "that all of them together hold at 95 % (Bonferroni).")
