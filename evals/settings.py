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
HELP = {
    "length": "Tokens of a context (niah, fidelity), and its answer (ruler). longbench: at most.",
    "of": "fidelity: prose, or the task whose contexts and questions are compared.",
    "reference": "fidelity: the whole cache of the same types, or of f16.",
    "depths": "niah: where needles stand, in percent: 0,50,100.",
    "needles": "niah: needles in one context.",
    "shots": "Examples before a question, of tasks that have some.",
    "exemplars": "gsm8k, longgenbench, commonsense_qa: cot, train; auto.",
    "order": "gsm8k, longgenbench: a seed for another order of the examples; 0: as they are.",
    "draw": "gsm8k, longgenbench, humaneval, safety: a seed for other examples; 0: the first.",
    "questions": "longgenbench, longgenbench_mmlu: of one generation; kv_retrieval: of one object.",
    "sets": "longbench, safety, ruler: parts of it, with commas.",
    "announce": "ruler: 0: contexts that do not tell what will be asked.",
    "pairs": "kv_retrieval: pairs of an object.",
    "tokens": "fidelity: tokens that are compared.",
    "unsafe_code": "humaneval: run code where it cannot be locked in."}

Block = dict[str, Any]


@dataclass(frozen=True)
class Only:
    """What the command line wants of a study, or of answers; empty: everything."""
    tasks: Sequence[str] = ()
    policies: Sequence[str] = ()    # names; full is always among them
    budgets: Sequence[str] = ()     # canonical
    protocols: Sequence[str] = ()
    settings: Sequence[str] = ()    # "questions=5": of its tasks, in place of the file's

    def case(self, policy: str, budget: str) -> bool:
        return ((not self.policies or policy.partition(":")[0] in self.policies)
                and (not self.budgets or budget in self.budgets))


EVERYTHING = Only()


def kind_of(setting: str) -> type:
    return type(next(module.SETTINGS[setting] for module in TASKS.values() if setting in module.SETTINGS))


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def texts(value: Any) -> list[str]:
    return [str(one) for one in listed(value)]


def sweep(block: Block, swept: Sequence[str]) -> list[Block]:
    """A block for each combination of the values that `swept` names have."""
    found = [name for name in block if name in swept]
    return [{**block, **dict(zip(found, values))}
            for values in itertools.product(*(listed(block[name]) for name in found))]
