"""All tasks but fidelity, which asks their questions: no import goes round in a circle."""
import re
from types import ModuleType
from typing import Any

from . import (commonsense_qa, gsm8k, humaneval, kv_retrieval, longbench, longgenbench, longgenbench_mmlu, mmlu, niah,
               ruler, safety)

PLAIN: dict[str, ModuleType] = {
    "niah": niah, "gsm8k": gsm8k, "mmlu": mmlu, "commonsense_qa": commonsense_qa, "humaneval": humaneval,
    "safety": safety,
    "kv_retrieval": kv_retrieval, "longbench": longbench, "ruler": ruler, "longgenbench": longgenbench,
    "longgenbench_mmlu": longgenbench_mmlu}


EXAMPLES = re.compile(r"/\d+-([^/]*)$")  # the end of an id where a task has examples: /8-cot-order1, /8-shots


def unit(module: ModuleType, item: str, tags: dict[str, Any]) -> str:
    """What a task says by unit(item, tags); else the item, whatever examples stand before it."""
    return module.unit(item, tags) if hasattr(module, "unit") else EXAMPLES.sub("", item)


def draw(module: ModuleType, item: str, tags: dict[str, Any]) -> str:
    """Which examples a task that draws them has put before an item, whatever their number: "cot-order1"."""
    found = EXAMPLES.search(item) if {"draw", "order"} & set(module.SETTINGS) else None
    return found[1] if found else module.draw(item, tags) if hasattr(module, "draw") else ""
