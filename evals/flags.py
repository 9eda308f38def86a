"""Flags that several commands have, and what is checked of them at the door: ValueError names what is valid."""
import inspect
import sys
from pathlib import Path
from typing import Annotated, Any, Callable, Optional

import typer

from pykvc import _core, options
from pykvc.command import values
from pykvc.flags import flag

from .cases import protocols
from .settings import LISTS, Only
from .tasks import TASKS, task

Models = Annotated[Optional[list[str]], flag(
    "-m", "--model", help="GGUF files, known names or user/repo[:quant]. Default: SmolLM2-135M.")]
DataDir = Annotated[Optional[Path], flag("--data-dir", help="Folder with TASK/*.jsonl[.gz]. Default: Hugging Face.")]
Plain = Annotated[bool, flag("--plain", help="Ask without the model's chat template.")]
Answers = Annotated[Path, flag("--out", "-o", help="Folder of the answers.")]
OnlyTasks = Annotated[Optional[list[str]], flag("--task", help="Only these.")]
OUT = Path("evals-out")


def how(
    threads: Annotated[Optional[int], flag("--threads", "-t", help="CPU threads; default: all.")] = None,
    n_gpu_layers: Annotated[int, flag("--n-gpu-layers", "-ngl", help="Layers on the GPU.")] = 0,
    n_parallel: Annotated[int, flag("--n-parallel", "-np", "--parallel",
                                    help="Questions asked at once, where the policy permits it.")] = 16,
    any_commit: Annotated[bool, flag("--any-commit", help="Go on with answers that another commit gave.")] = False,
) -> dict[str, Any]:
    return dict(n_threads=threads, n_gpu_layers=n_gpu_layers, n_parallel=positive("--n-parallel", n_parallel),
                any_commit=any_commit)


def only(
    tasks: OnlyTasks = None,
    policy: Annotated[Optional[list[str]], flag("--policy", "--kv-policy", help="Only these, by name.")] = None,
    budget: Annotated[Optional[list[str]], flag("--budget", "--kv-budget", help="Only these.")] = None,
    protocol: Annotated[Optional[list[str]], flag("--protocol", help="Only these.")] = None,
) -> Only:
    return Only(values(tasks), [policy_name(spec) for spec in values(policy)],
                      [options.budget("--budget", value) for value in values(budget)], protocols(values(protocol)))


def flags_of(table: dict[str, tuple[str, str]], kind: Callable[[str], Any],
             default: Callable[[str], Any]) -> Callable[..., dict[str, Any]]:
    """For takes(): a parameter for each name of a table, with its flags and their help; given back are those that were
    given or have a default."""
    def given(**found: Any) -> dict[str, Any]:
        return {name: value for name, value in found.items() if value is not None and value is not False}
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default(name),
                                    annotation=Annotated[kind(name), flag(*names.split(), help=text)])
                  for name, (names, text) in table.items()]
    setattr(given, "__signature__", inspect.Signature(parameters))  # noqa: B010
    return given


HELP = {  # of settings of tasks
    "length": "Tokens of a context (niah, fidelity), and its answer (ruler). longbench: at most.",
    "of": "fidelity: prose, or the task whose contexts and questions are compared.",
    "reference": "fidelity: the whole cache of the same types, or of f16.",
    "depths": "niah: where needles stand, in percent: 0,50,100.",
    "needles": "niah: needles in one context.",
    "shots": "Examples before a question, of tasks that have some.",
    "exemplars": "gsm8k, longgenbench, commonsense_qa: cot, train; auto.",
    "order": "gsm8k, longgenbench: a seed for another order of the examples; 0: as they are.",
    "draw": "gsm8k, longgenbench, humaneval, safety: a seed for other examples; 0: the first.",
    "fresh": "Tasks with --draw: 1: each draw has questions of its own.",
    "questions": "longgenbench, longgenbench_mmlu: of one generation; kv_retrieval: of one object.",
    "sets": "longbench, safety, ruler: parts of it, with commas.",
    "announce": "ruler: 0: contexts that do not tell what will be asked.",
    "pairs": "kv_retrieval: pairs of an object.",
    "tokens": "fidelity: tokens that are compared.",
    "unsafe_code": "humaneval: run code where it cannot be locked in."}
LIST_FLAGS = {
    "policy": ("--policy --kv-policy", "NAME[:key=value,...]; full is what the others are compared with."),
    "budget": ("--budget --kv-budget", "Cells a layer keeps of the prompt: 512, 25% or 0.25; none."),
    "decode_budget": ("--decode-budget --kv-decode-budget", "The same of the generated tokens; same: as the budget."),
    "cells": ("--cells --kv-cells", "Cells allocated: evict whenever they are full; none: once, at the end."),
    "protocol": ("--protocol", "question-out (query-agnostic), question-in (query-aware)."),
    "type_k": ("--type-k -ctk --cache-type-k", "Cache types of K."),
    "type_v": ("--type-v -ctv --cache-type-v", "Cache types of V.")}
lists = flags_of(LIST_FLAGS, lambda name: list[str], lambda name: [LISTS[name]])
KINDS = {name: type(usual) for module in TASKS.values() for name, usual in module.SETTINGS.items()}
settings = flags_of({name: (f"--{name.replace('_', '-')}", text) for name, text in HELP.items()},
                    lambda name: bool if KINDS[name] is bool else Optional[KINDS[name]],
                    lambda name: False if KINDS[name] is bool else None)


def positive(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ValueError(f"{name} is 1 or more, not {value}")
    return value


def existing(name: str, path: Path | None) -> Path | None:
    if path is not None and not path.is_dir():
        raise ValueError(f"{name} {path} is no folder")
    return path


def policy_name(spec: str) -> str:
    """Of a policy, without parameters."""
    return _core.parse_spec(spec).partition(":")[0]


def known_tasks(given: list[str] | None) -> list[str]:
    return [name for name in values(given) if task(name)]


def end(problems: list[str]) -> None:
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise typer.Exit(1)
