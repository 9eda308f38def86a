"""Answers -> a table: what each policy scores, with intervals, and against the whole cache on the same items."""
from collections import Counter
from pathlib import Path
from typing import Any, Sequence

from pykvc import _core
from pykvc.table import grid, mebibytes

from . import scorers, stats
from .items import Item
from .store import Row, comma_separated, grouped, key, read, values
from .tasks import task, unit

# What full is looked for inside of
GROUP = ("model", "task", "set", "settings", "protocol", "chat", "n_ubatch", "seed", "type_k", "type_v")
CASE = ("policy", "budget", "decode_budget", "cells")


def scored(out: Path, tasks: Sequence[str] = (), rescore: bool = False) -> list[Row]:
    """The answers of a folder, with their scores; what has none, or every one with rescore, is scored now."""
    files = sorted([*out.glob("*.answers.jsonl"), *out.glob("*.answers.jsonl.xz")])
    if not files:
        raise ValueError(f"{out} holds no answers: `python -m evals run --out {out}` first")
    found = []
    for path in files:
        known = {} if rescore else {key(row): row
                                    for row in read(path.with_name(path.name.replace(".answers.", ".scores.")))}
        for row in {key(row): row for row in read(path)}.values():
            if tasks and row["task"] not in tasks:
                continue
            module = task(row["task"])
            score = known.get(key(row), {}).get("score")
            if score is None and "error" not in row:
                if "answer" not in row:
                    raise ValueError(f"{path} is an archive, without the answers: it cannot be scored again")
                score = float(module.score(Item(row["item"], "", row["gold"], tags=row["tags"]), row["answer"]))
            settings = {**module.SETTINGS, **row.get("settings", {})}
            found.append({**row, "score": score, "set": row.get("tags", {}).get(getattr(module, "SPLIT", None), ""),
                          "settings": changed(row["task"], settings), "shots": settings.get("shots")})
    if not found:
        raise ValueError(f"{out} holds no answers of {', '.join(tasks)}")
    return found


def table(rows: Sequence[Row]) -> list[Row]:
    """A line for each configuration, in the order in which they were run, but those that differ in the budget alone
    from the largest on: they are run together. n_comparisons: how many differences to full stand in its table, for
    whose number difference_corrected_low and _high are corrected."""
    configurations = grouped(rows, GROUP + CASE)
    sweeps = grouped((found[0] for found in configurations.values()), (*GROUP, "policy", "cells"))
    ordered = [row for sweep in sweeps.values() for row in sorted(sweep, key=largest_first)]
    full = {(*values(row, GROUP), row["item"]): row["score"] for row in rows
            if row["policy"] == "full" and row["score"] is not None}
    found = [(row, of := configurations[values(row, GROUP + CASE)], _paired(of, full)) for row in ordered]
    counts = Counter(", ".join(title(row)) for row, _, paired in found if paired)
    return [_line({name: row[name] for name in GROUP + CASE}, of, paired, counts[", ".join(title(row))])
            for row, of, paired in found]


def write(out: Path, rows: Sequence[Row], heading: str = "") -> str:
    """report.md and report.csv of the rows, into the folder, each published scorer in a table of its own; the text of
    the tables."""
    lines = table(scorers.each(out, rows))
    text = markdown(lines)
    (out/"report.md").write_text((f"# {heading}\n\n" if heading else "") + text, encoding="utf-8")
    (out/"report.csv").write_text(comma_separated(lines), encoding="utf-8")
    return text


def largest_first(row: Row) -> tuple:
    """Orders by budgets: ratios, then tokens."""
    amounts = [_core.parse_budget(row[name]) for name in ("budget", "decode_budget")]
    return tuple((kind == "tokens", -amount) for kind, amount in amounts)


def as_asked(row: Row) -> Row:
    """With the decode_budget that --decode-budget named: "same" is the budget."""
    return {**row, "decode_budget": "same"} if row["decode_budget"] and row["decode_budget"] == row["budget"] else row


def changed(name: str, settings: Row) -> str:
    """What is not the task's default, of what changes its items: "shots 4, order 1". --sets stands in the table as
    such."""
    usual = task(name).SETTINGS
    return ", ".join(f"{key} {value}" for key, value in settings.items() if value != usual.get(key)
                     and key not in ("sets", "unsafe_code"))


def _paired(rows: Sequence[Row], full: dict[tuple, float]) -> list[tuple[Row, float]]:
    """Answers that are compared, each with the score of full on the same item."""
    return [(row, full[of]) for row in rows
            if row["score"] is not None and row["policy"] != "full"
            and (of := (*values(row, GROUP), row["item"])) in full]


def _line(names: Row, rows: list[Row], paired: list[tuple[Row, float]], n_comparisons: int) -> Row:
    done = [row for row in rows if row["score"] is not None]
    line = {**names, "shots": rows[0].get("shots"), "n": len(done), "n_failed": len(rows) - len(done)}
    if not done:
        return line
    scores = _by_unit(done, [row["score"] for row in done])
    low, high = stats.mean_interval(scores)
    line |= {"n_units": len(scores), "score": _mean(scores), "score_low": low, "score_high": high}
    if paired:
        compared = [row for row, _ in paired]
        ours = _by_unit(compared, [row["score"] for row in compared])
        theirs = _by_unit(compared, [other for _, other in paired])
        difference, low, high = stats.paired_difference(ours, theirs)
        _, lowest, highest = stats.paired_difference(ours, theirs, stats.corrected(n_comparisons))
        line |= {"n_paired": len(paired), "difference": difference, "difference_low": low, "difference_high": high,
                 "n_comparisons": n_comparisons, "difference_corrected_low": lowest,
                 "difference_corrected_high": highest, "relative": difference/_mean(theirs) if any(theirs) else None}
    n_before = [row["n_context"] if row["protocol"] == "question-out" else row["n_prompt"] for row in done]
    kept = [sum(row["kept"])/len(row["kept"]) for row in done]
    line |= {"n_prompt": _mean(row["n_prompt"] for row in done), "n_before": sum(n_before)/len(done),
             "n_kept": sum(kept)/len(done), "ratio": sum(kept)/sum(n_before) if sum(n_before) else None,
             "evictions": _mean(row["evictions"] for row in done)}
    if hasattr(task(names["task"]), "extra"):
        more = [task(names["task"]).extra(row["answer"]) for row in done]
        for name in more[0]:
            values = _by_unit(done, [of_row[name] for of_row in more])
            line |= {name: _mean(values)} | dict(zip((f"{name}_low", f"{name}_high"),
                                                     stats.figure_interval(values) or ()))
    return line | {name: _mean(row[name] for row in done)
                   for name in ("n_predicted", "bytes_used", "bytes_full", "bytes_allocated", "prefill_ms", "evict_ms",
                                "decode_ms")}


def unit_of(row: Row) -> tuple[str, str]:
    """What intervals count once: the same question under another policy, protocol, cache type or model is one unit."""
    return row["task"], unit(row["task"], row["item"], row.get("tags", {}))


def _by_unit(rows: Sequence[Row], values: Sequence[float]) -> list[float]:
    return stats.unit_means(values, [unit_of(row) for row in rows])


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values)/len(values)


# -- as text --------------------------------------------------------------------------------------------------------

COLUMNS = (
    ("policy", lambda x: f"`{x['policy']}`"), ("budget", lambda x: x["budget"]),
    ("decode", lambda x: x["decode_budget"]), ("cells", lambda x: x["cells"]),
    ("K/V", lambda x: "" if x["type_k"] == x["type_v"] == "f16" else f"{x['type_k']}/{x['type_v']}"),
    ("n", lambda x: str(x["n"])), ("units", lambda x: "" if x.get("n_units", x["n"]) == x["n"] else str(x["n_units"])),
    ("failed", lambda x: str(x["n_failed"] or "")),
    ("score", lambda x: _percent(x, "score")), ("95 %", lambda x: _interval(x, "score")),
    ("vs full", lambda x: _percent(x, "difference", "+")), ("95 % of it", lambda x: _interval(x, "difference", "+")),
    ("corrected", lambda x: _interval(x, "difference_corrected", "+") if x.get("n_comparisons", 0) > 1 else ""),
    ("relative", lambda x: _percent(x, "relative", "+")), ("KL", lambda x: f"{x['kl']:.4f}" if "kl" in x else ""),
    ("95 % of KL", lambda x: f"{x['kl_low']:.4f} to {nats(x['kl_high'], 4)}" if "kl_low" in x else ""),
    ("tokens", lambda x: _whole(x, "n_before")), ("kept", lambda x: _whole(x, "n_kept")),
    ("ratio", lambda x: _percent(x, "ratio")), ("evictions", lambda x: _whole(x, "evictions")),
    ("KV used", lambda x: mebibytes(x["bytes_used"]) if "bytes_used" in x else ""),
    ("of", lambda x: mebibytes(x["bytes_full"]) if "bytes_full" in x else ""),
    ("allocated", lambda x: mebibytes(x["bytes_allocated"]) if "bytes_allocated" in x else ""))
# where a line of the table has something to say
OPTIONAL = ("decode", "cells", "K/V", "units", "failed", "corrected", "KL", "95 % of KL")


def title(line: Row) -> list[str]:
    """What stands in one table and in one picture: all of GROUP but the cache types, where it is not the default."""
    more = ["plain"*(not line["chat"]), f"n_ubatch {line['n_ubatch']}"*(line["n_ubatch"] != 512),
            f"seed {line['seed']}"*bool(line["seed"])]
    return [part for part in (line["task"], line["set"], line["settings"], line["model"], line["protocol"], *more)
            if part]


def markdown(lines: Sequence[Row]) -> str:
    """A table for each model, task and protocol."""
    parts = grouped(lines, lambda line: ", ".join(title(line)))
    return "\n".join(f"## {name}\n\n{_table(of_name)}\n" for name, of_name in parts.items())


def _table(lines: Sequence[Row]) -> str:
    cells = {name: [show(line) for line in lines] for name, show in COLUMNS}
    shown = [name for name in cells if name not in OPTIONAL or any(cells[name])]
    n = max(line.get("n_comparisons", 0) for line in lines)
    return grid([shown, *zip(*(cells[name] for name in shown))], 2) + compared(n)


def compared(n: int) -> str:
    """A sentence below n comparisons, two or more: how many they are, and what was corrected for that."""
    return "" if n < 2 else (f"\n\n{n} comparisons at 95 % each: if nothing differed, about {n/20:.1f} of them would "
                             f"exclude 0 by chance. Corrected: at {100*stats.corrected(n):.4g} % each, so that all of "
                             "them together hold at 95 % (Bonferroni).")


def nats(number: float, digits: int, sign: str = "") -> str:
    """More than 10 nats either way is no limit at all: the upper ends of few, skewed figures."""
    return f"{number:{sign}.{digits}f}" if abs(number) < 10 else "over 10" if number > 0 else "below -10"


def _percent(line: Row, name: str, sign: str = "") -> str:
    return "" if line.get(name) is None else f"{100*line[name]:{sign}.1f} %"


def _interval(line: Row, name: str, sign: str = "") -> str:
    if f"{name}_low" not in line:
        return ""
    return f"{100*line[name + '_low']:{sign}.1f} to {100*line[name + '_high']:{sign}.1f}"


def _whole(line: Row, name: str) -> str:
    if line.get(name) is None:
        return ""
    return f"{line[name]:.0f}" if line[name] >= 10 or line[name] == int(line[name]) else f"{line[name]:.1f}"
