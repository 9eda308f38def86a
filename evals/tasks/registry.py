"""All tasks by name, and what can be said of their answers. fidelity, which asks the others' questions, is added by the
package: so no import goes round in a circle."""
import re
from types import ModuleType
from typing import Any

from ..items import Item
from . import (commonsense_qa, gsm8k, humaneval, kv_retrieval, longbench, longgenbench, longgenbench_mmlu, mmlu, niah,
               ruler, safety)

TASKS: dict[str, ModuleType] = {
    "niah": niah, "gsm8k": gsm8k, "mmlu": mmlu, "commonsense_qa": commonsense_qa, "humaneval": humaneval,
    "safety": safety, "kv_retrieval": kv_retrieval, "longbench": longbench, "ruler": ruler,
    "longgenbench": longgenbench, "longgenbench_mmlu": longgenbench_mmlu}
EXAMPLES = re.compile(r"/\d+-([^/]*)$")  # the end of an id where a task has examples: /8-cot-order1, /8-shots


def task(name: str) -> ModuleType:
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: valid are {', '.join(TASKS)}")
    return TASKS[name]


def unit(name: str, item: str, tags: dict[str, Any]) -> str:
    """What intervals count once, of an item's id and tags: its question, whatever examples stand before it, or the
    context that it shares with others. ValueError: unknown task.

    gsm8k-test-0/1-cot and gsm8k-test-0/8-cot are one unit. A task says so by a function unit(item, tags); without it an
    item is its own unit. Old answers are read, too, so the function goes by what ids have always held, and by tags only
    where they are there."""
    module = task(name)
    return module.unit(item, tags) if hasattr(module, "unit") else EXAMPLES.sub("", item)


def draw(name: str, item: str, tags: dict[str, Any]) -> str:
    """The drawn set of examples that an item follows, whatever their number: "cot-order1" of gsm8k-test-0/8-cot-order1.
    "" where a task draws none: of its examples there is one set, or each item has its own. ValueError: unknown task."""
    module = task(name)
    found = EXAMPLES.search(item) if {"draw", "order"} & set(module.SETTINGS) else None
    return found[1] if found else module.draw(item, tags) if hasattr(module, "draw") else ""


def verdicts(name: str, item: Item, answer: str) -> dict[str, float]:
    """Of each published scorer, where a task has several; one of them is its score."""
    found = getattr(task(name), "verdicts", lambda item, answer: {})(item, answer)
    return {scorer: float(verdict) for scorer, verdict in found.items()}
