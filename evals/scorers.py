"""Tasks with several published ways to find an answer, as gsm8k: each of them in the report, beside the one that is the
score.

Such a task has verdicts(item, answer) -> {name: verdict}, of which one is score().
"""
from pathlib import Path
from typing import Sequence

from .items import Item
from .store import Row, key, read
from .tasks import task


def verdicts(item: Item, row: Row) -> dict[str, float]:
    """By name, of an answer; {} of a task with one scorer."""
    module = task(row["task"])
    if not hasattr(module, "verdicts"):
        return {}
    return {name: float(verdict) for name, verdict in module.verdicts(item, row["answer"]).items()}


def each(out: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows, then, for each scorer of a task with several, its rows again with that scorer's score; their settings
    end with "scorer strict". An archive has no answers, so there what the scores' file holds counts."""
    saved: dict[tuple, dict[str, float]] = {}
    for path in sorted([*out.glob("*.scores.jsonl"), *out.glob("*.scores.jsonl.xz")]):
        saved |= {key(row): row["verdicts"] for row in read(path) if "verdicts" in row}
    again: dict[str, list[Row]] = {}
    for row in rows:
        if row["score"] is None:
            continue
        if "answer" in row:
            found = verdicts(Item(row["item"], "", row["gold"], tags=row["tags"]), row)
        else:
            found = saved.get(key(row), {})
        for name, score in found.items():
            settings = ", ".join(filter(None, [row["settings"], f"scorer {name}"]))
            again.setdefault(name, []).append({**row, "settings": settings, "score": score})
    return [*rows, *(row for of_name in again.values() for row in of_name)]
