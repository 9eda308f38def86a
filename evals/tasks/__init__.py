"""The tasks, one a file or folder: load(options), score(item, answer), and SETTINGS with their defaults.

A task may also say what its picture lays out (ACROSS) and what its table keeps apart (SPLIT), both of an item's tags;
put its questions itself (ask, as evals/ask.py); give the report more columns (extra); say which items intervals count
as one (unit), and which set of examples, of several that were drawn, stands before an item (draw); and have several
published scorers (verdicts).
"""
from typing import Any, Sequence

from . import fidelity
from .registry import TASKS, draw, task, unit, verdicts

__all__ = ["TASKS", "draw", "settings_of", "task", "unit", "usual_settings", "verdicts"]
TASKS["fidelity"] = fidelity
SWITCHES = ("announce", "fresh")
MAY_BE_0 = (*SWITCHES, "shots")  # whatever the default; else what is 0 by default


def usual_settings(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """A task's settings with their defaults. fidelity has those of the task that it asks, too, which says how long a
    context is."""
    own, of = task(name).SETTINGS, given.get("of")
    if name != "fidelity" or of not in TASKS:
        return own
    return {**{key: value for key, value in own.items() if key != "length"}, **TASKS[of].SETTINGS}


def settings_of(names: Sequence[str], given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was given, for each task what it has a setting for. ValueError if no task has one, or it is of another kind
    or out of its range."""
    usual = {t: usual_settings(t, given) for t in names}
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if not any(name in known for known in usual.values()):
            others = (t for t, module in TASKS.items() if name in module.SETTINGS and t not in names)
            of = f" --of {given['of']}" if "fidelity" in names and "of" in given else ""
            raise ValueError(f"{flag} is a setting of {', '.join(others)}, not of {', '.join(names)}{of}")
        for default in (known[name] for known in usual.values() if name in known):
            if isinstance(default, (bool, int)) and type(value) is not type(default):
                kind = "true or false" if isinstance(default, bool) else "a whole number"
                raise ValueError(f"{flag} is {kind}, not {value!r}")
            if name in SWITCHES and value not in (0, 1):
                raise ValueError(f"{flag} is 0 or 1, not {value}")
            if type(default) is int and value < (least := int(default > 0 and name not in MAY_BE_0)):
                raise ValueError(f"{flag} is {least} or more, not {value}")
    return {t: {name: value for name, value in given.items() if name in known} for t, known in usual.items()}
