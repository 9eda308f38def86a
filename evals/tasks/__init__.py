"""The tasks, one a file: load(options), score(item, answer), and SETTINGS with their defaults."""
from types import ModuleType

from . import niah

TASKS: dict[str, ModuleType] = {"niah": niah}


def task(name: str) -> ModuleType:
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: valid are {', '.join(TASKS)}")
    return TASKS[name]
