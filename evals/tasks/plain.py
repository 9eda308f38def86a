"""All tasks but fidelity, which asks their questions: no import goes round in a circle."""
from types import ModuleType
from typing import Any

from . import (commonsense_qa, gsm8k, humaneval, kv_retrieval, longbench, longgenbench, longgenbench_mmlu, mmlu, niah,
               ruler,
               safety)

PLAIN: dict[str, ModuleType] = {
    "niah": niah, "gsm8k": gsm8k, "mmlu": mmlu, "commonsense_qa": commonsense_qa, "humaneval": humaneval,
    "safety": safety,
    "kv_retrieval": kv_retrieval, "longbench": longbench, "ruler": ruler, "longgenbench": longgenbench,
    "longgenbench_mmlu": longgenbench_mmlu}


def unit(module: ModuleType, item: str, tags: dict[str, Any]) -> str:
    return module.unit(item, tags) if hasattr(module, "unit") else item


def draw(module: ModuleType, item: str, tags: dict[str, Any]) -> str:
    return module.draw(item, tags) if hasattr(module, "draw") else ""
