"""The tasks, one a file or folder: load(options), score(item, answer), and SETTINGS with their defaults.

A task may also say what its picture lays out (ACROSS) and what its table keeps apart (SPLIT), both of an item's tags;
put its questions itself (ask, as evals/ask.py); give the report more columns (extra); say which items intervals count
as one (unit), and which set of examples, of several that were drawn, stands before an item (draw); and have several
published scorers (verdicts).
"""
from types import ModuleType
from typing import Any, Sequence

from ..items import Item
from . import fidelity, plain

TASKS: dict[str, ModuleType] = {**plain.PLAIN, "fidelity": fidelity}


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
    return plain.unit(task(name), item, tags)


def draw(name: str, item: str, tags: dict[str, Any]) -> str:
    """The drawn set of examples that an item follows, whatever their number: "cot-order1" of gsm8k-test-0/8-cot-order1.
    "" where a task draws none: of its examples there is one set, or each item has its own. ValueError: unknown task."""
    return plain.draw(task(name), item, tags)


def verdicts(name: str, item: Item, answer: str) -> dict[str, float]:
    """Of each published scorer, where a task has several; one of them is its score."""
    found = getattr(task(name), "verdicts", lambda item, answer: {})(item, answer)
    return {scorer: float(verdict) for scorer, verdict in found.items()}


def settings_of(names: Sequence[str], given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was given, for each task what it has a setting for. ValueError if no task has one, or it is of another
    kind."""
    usual = {t: task(t).SETTINGS for t in names}
    if "fidelity" in usual and given.get("of") in TASKS:  # it asks that task's questions
        usual["fidelity"] = {**TASKS[given["of"]].SETTINGS, **usual["fidelity"]}
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if not any(name in known for known in usual.values()):
            others = (t for t, module in TASKS.items() if name in module.SETTINGS)
            raise ValueError(f"{flag} is a setting of {', '.join(others)}, not of {', '.join(names)}")
        for default in (known[name] for known in usual.values() if name in known):
            if isinstance(default, (bool, int)) and type(value) is not type(default):
                kind = "true or false" if isinstance(default, bool) else "a whole number"
                raise ValueError(f"{flag} is {kind}, not {value!r}")
    return {t: {name: value for name, value in given.items() if name in known} for t, known in usual.items()}
