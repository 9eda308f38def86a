"""What a run was asked for, and what of it is not answered yet."""
import functools
import hashlib
import platform
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Sequence

from pykvc import __version__, _core, models, options, weights

from .ask import Asked
from .cases import Case
from .items import Item, Options
from .prompts import Prompt, count, render
from .store import Row, key
from .tasks import task

N_SPARE = 16  # cells of n_ctx for BOS, and tokens that differ where texts are joined


@dataclass(frozen=True)
class Plan:
    """What `run` was asked for."""
    tasks: Sequence[str]
    cases: Sequence[Case]
    protocols: Sequence[str]
    out: Path
    data_dir: Path | None = None
    n: int | None = None
    seed: int = 0
    n_ctx: int = 0                # 0: what the task needs
    n_ubatch: int = 512
    n_threads: int | None = None
    n_gpu_layers: int = 0
    n_parallel: int = 1           # questions asked at once
    chat: bool = True
    any_commit: bool = False
    settings: dict[str, dict[str, Any]] | None = None  # of tasks: {"niah": {"length": 4000}}


@dataclass(frozen=True)
class Work:
    """The questions of one task for one configuration and protocol."""
    plan: Plan
    task: str
    settings: Row                 # of the task, all of them
    case: Case
    protocol: str
    n_ctx: int
    asked: Asked
    todo: Asked                   # what is not answered yet


@dataclass
class Subject:
    """The model under test."""
    path: Path
    sha256: str
    vocabulary: "_core.Model"
    weights: "_core.Model | None" = None

    def hold(self, n_gpu_layers: int) -> None:
        """Loads the weights once for all contexts that are still to come."""
        self.weights = weights.load(self.path, n_gpu_layers)

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def n_ctx_train(self) -> int:
        meta = self.vocabulary.meta
        return int(meta[f"{meta['general.architecture']}.context_length"])


def open_model(model: str | None) -> Subject:
    path = models.resolve(model)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    return Subject(path, digest.hexdigest(), _core.Model(str(path), vocab_only=True))


def commit() -> str:
    """Of this checkout; "+" where tracked files differ from it."""
    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent.parent), *args], capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def engine() -> str:
    """Version and library that answer, whatever the checkout says: pykvc's, and the beginning of libllama's sha256."""
    library = next(Path(_core.__file__).parent.rglob("libllama.*"), Path(_core.__file__))
    return f"{__version__}-{hashlib.sha256(library.read_bytes()).hexdigest()[:12]}"


@functools.cache
def processor() -> str:
    try:
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def all_works(plans: Sequence[Plan], subject: Subject, rows: dict[tuple, Row]) -> list[Work]:
    """Of all plans, without what one before asks already. rows: those there are, by key."""
    works: dict[tuple, Work] = {}
    for plan in plans:
        for name in plan.tasks:
            for work in _works(plan, subject, name, rows):
                works.setdefault(tuple(key(key_row(plan, name, item, work.protocol, work.case))
                                       for item, _ in work.asked), work)
    return list(works.values())


def sweeps(works: Sequence[Work]) -> list[list[Work]]:
    """Works that differ in their budgets alone, so that one model holds them, one evaluated context begins them, and a
    sequence that is done makes room for the next budget's question. With question-out they may differ in their shares,
    too; those that others can be variants of come first. With kv_cells the budget counts while a context is evaluated,
    so every budget has contexts of its own."""
    found: dict[tuple, list[Work]] = {}
    for work in works:
        case, budgets = work.case, (bool(work.case.budget), bool(work.case.decode_budget))
        if not case.cells:
            case = replace(case, budget="", decode_budget="" if case.budget else case.decode_budget)
        if not case.cells and work.case.budget and work.protocol == "question-out":
            case = replace(case, policy=options.unshared(case.policy))
        found.setdefault((id(work.plan), work.task, work.protocol, budgets, case), []).append(work)
    return [sorted(sweep, key=lambda work: not work.case.heads_differ) for sweep in found.values()]


def _works(plan: Plan, subject: Subject, name: str, rows: dict[tuple, Row]) -> list[Work]:
    module, vocabulary = task(name), subject.vocabulary
    settings = {**module.SETTINGS, **(plan.settings or {}).get(name, {})}
    items = _load(name, Options(lambda text: count(vocabulary, text), plan.data_dir, plan.n, plan.seed, plan.chat,
                                settings))
    asked = [(item, render(item, vocabulary, plan.chat)) for item in items]
    needed = max(count(vocabulary, prompt.head) + count(vocabulary, prompt.tail) + item.max_tokens
                 for item, prompt in asked) + N_SPARE
    limit, what = (plan.n_ctx, "--n-ctx is") if plan.n_ctx else (subject.n_ctx_train, f"{subject.name} was trained for")
    if needed > limit:
        raise ValueError(f"{name} needs a context of {needed} tokens, {what} {limit}")
    n_ctx = plan.n_ctx or needed
    works = []
    for case in plan.cases:
        for protocol in plan.protocols:
            left = [(item, prompt) for item, prompt in asked
                    if not is_answer(rows.get(key(key_row(plan, name, item, protocol, case))), prompt)]
            works.append(Work(plan, name, settings, case, protocol, n_ctx, asked, left))
    return works


def _load(name: str, options: Options) -> list[Item]:
    try:
        return task(name).load(options)
    # a row has the fields, but not of the kind that the task reads
    except (TypeError, AttributeError, LookupError) as error:
        where = f" in {options.data_dir}" if options.data_dir else ""
        raise ValueError(f"the rows of {name}{where} are not as its data set has them: "
                         f"{type(error).__name__}: {error}") from None


def is_done(row: Row | None) -> bool:
    return row is not None and "error" not in row


def is_answer(row: Row | None, prompt: Prompt) -> bool:
    """Need this prompt not be asked again? A task or a template may have changed since."""
    return is_done(row) and row.get("prompt") == prompt.digest


def key_row(plan: Plan, name: str, item: Item, protocol: str, case: Case) -> Row:
    return {"task": name, "item": item.id, "protocol": protocol, "policy": case.policy, "budget": case.budget,
            "decode_budget": case.decode_budget,
            "cells": case.cells, "type_k": case.type_k, "type_v": case.type_v, "n_ubatch": plan.n_ubatch,
            "chat": plan.chat and item.chat, "seed": plan.seed}


def weight(asked: Asked, subject: Subject) -> int:
    """About how long it takes: generated tokens take longer. Contexts are left out."""
    return sum(count(subject.vocabulary, prompt.tail) + 4*item.max_tokens for item, prompt in asked)
