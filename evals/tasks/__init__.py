"""The tasks, one a file: load(options), score(item, answer), and SETTINGS with their defaults.

A task may also say what its picture lays out (ACROSS) and what its table keeps apart (SPLIT), both of an item's tags; put its questions
itself (ask, as evals/ask.py); and give the report more columns (extra).
"""
from types import ModuleType

from . import commonsense_qa, fidelity, gsm8k, humaneval, kv_retrieval, longbench, longgenbench, mmlu, niah, safety

TASKS: dict[str, ModuleType] = {
    "niah": niah, "gsm8k": gsm8k, "mmlu": mmlu, "commonsense_qa": commonsense_qa, "humaneval": humaneval, "safety": safety,
    "kv_retrieval": kv_retrieval, "longbench": longbench, "longgenbench": longgenbench, "fidelity": fidelity}


def task(name: str) -> ModuleType:
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: valid are {', '.join(TASKS)}")
    return TASKS[name]
