"""The tasks, one a file or folder: load(options), score(item, answer), and SETTINGS with their defaults.

A task may also say what its picture lays out (ACROSS) and what its table keeps apart (SPLIT), both of an item's tags;
put its questions itself (ask, as evals/ask.py); give the report more columns (extra); say which items intervals count
as one (unit), and which set of examples, of several that were drawn, stands before an item (draw); and have several
published scorers (verdicts).
"""
from typing import Any, Sequence

from . import fidelity
from .registry import TASKS, draw, task, unit, verdicts

__all__ = ["TASKS", "draw", "settings_of", "task", "unit", "verdicts"]
TASKS["fidelity"] = fidelity


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
