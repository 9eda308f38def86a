"""What a run is asked for: flags of `run`, keys of a study's [[run]]. A value, or a list of which each is run."""
import itertools
from dataclasses import dataclass
from typing import Any, Sequence

from .tasks import TASKS

# what is combined, with what is asked for by default
LISTS = {"policy": "full", "budget": "none", "decode_budget": "none", "cells": "none", "protocol": "question-out",
         "type_k": "f16", "type_v": "f16"}
SINGLE = {"n": int, "seed": int, "n_ctx": int, "n_ubatch": int, "plain": bool}
SETTINGS = sorted({name for module in TASKS.values() for name in module.SETTINGS})
Block = dict[str, Any]


@dataclass(frozen=True)
class Only:
    """What the command line wants of a study, or of answers; empty: everything."""
    tasks: Sequence[str] = ()
    policies: Sequence[str] = ()    # names; of a study full is always among them
    budgets: Sequence[str] = ()     # canonical
    protocols: Sequence[str] = ()
    settings: Sequence[str] = ()    # "questions=5": of its tasks, in place of the file's

    def case(self, policy: str, budget: str) -> bool:
        return ((not self.policies or policy.partition(":")[0] in self.policies)
                and (not self.budgets or budget in self.budgets))

    def answer(self, row: Block) -> bool:
        """full, which has no budget, if it is named."""
        named = row["policy"] == "full" and "full" in self.policies
        return (named or self.case(row["policy"], row["budget"])) and (
            not self.protocols or row["protocol"] in self.protocols)


EVERYTHING = Only()


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def texts(value: Any) -> list[str]:
    return [str(one) for one in listed(value)]


def sweep(block: Block, swept: Sequence[str]) -> list[Block]:
    """A block for each combination of the values that `swept` names have."""
    found = [name for name in block if name in swept]
    return [{**block, **dict(zip(found, values))}
            for values in itertools.product(*(listed(block[name]) for name in found))]
