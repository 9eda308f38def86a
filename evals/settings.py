"""Settings of tasks in a block of a study: a value, or a list of which each is run."""
import itertools
from typing import Any, Sequence

from .tasks import TASKS

SETTINGS = sorted({name for module in TASKS.values() for name in module.SETTINGS})

Block = dict[str, Any]


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def texts(value: Any) -> list[str]:
    return [str(one) for one in listed(value)]


def sweep(block: Block, swept: Sequence[str]) -> list[Block]:
    """A block for each combination of the values that `swept` names have."""
    found = [name for name in block if name in swept]
    return [{**block, **dict(zip(found, values))}
            for values in itertools.product(*(listed(block[name]) for name in found))]
