"""The loop: for every model, task, case and protocol what is not answered yet is asked, saved, and then scored."""
import hashlib
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Sequence

import pykvc
from pykvc import _core, models

from .ask import Asked, ask, ask_batch, groups, side_by_side
from .cases import Case
from .items import Item, Options
from .prompts import count, render
from .report import changed
from .store import KEY, Row, Rows, key
from .tasks import task

Watch = Callable[[int, str], None]  # tokens done, what is under way

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
    todo: list[Asked]             # groups that are not answered yet


@dataclass
class Subject:
    """The model under test."""
    path: Path
    sha256: str
    vocabulary: "_core.Model"

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def n_ctx_train(self) -> int:
        meta = self.vocabulary.meta
        return int(meta[f"{meta['general.architecture']}.context_length"])


def run(plan: Plan, model: str | None, size: Callable[[int], None] = lambda n: None, watch: Watch = lambda n, what: None) -> list[str]:
    """run_all() of one plan."""
    return run_all([plan], model, size, watch)


def run_all(plans: Sequence[Plan], model: str | None, size: Callable[[int], None] = lambda n: None,
            watch: Watch = lambda n, what: None) -> list[str]:
    """Does what is left of the plans, which share an `out`, for one model; returns what went wrong, in sentences.

    size: is told how many tokens there are to evaluate; watch: how many were, and what is under way.
    ValueError for every mistake in a plan, before anything is evaluated."""
    subject = open_model(model)
    identity = {"model": subject.name, "model_sha256": subject.sha256, "commit": commit()}
    with ExitStack() as stack:
        answers = stack.enter_context(Rows(plans[0].out/f"{subject.name}.answers.jsonl"))
        answers.check(identity, plans[0].any_commit)
        scores = stack.enter_context(Rows(plans[0].out/f"{subject.name}.scores.jsonl"))
        works = all_works(plans, subject, answered(answers))
        for work in {_checked_alike(work): work for work in works if work.todo}.values():
            _check(subject, work)
        size(sum(_weight(group, subject) for work in works for group in work.todo))
        for work in works:
            _answer(subject, work, identity, answers, scores, watch)
        return [problem for work in works for problem in _problems(work, answers, scores)]


def open_model(model: str | None) -> Subject:
    path = models.resolve(model)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    return Subject(path, digest.hexdigest(), _core.Model(str(path), vocab_only=True))


def commit() -> str:
    """Of this checkout; "+" where tracked files differ from it."""
    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent.parent), *args], capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# -- what is to be done -------------------------------------------------------------------------------------------------

def answered(answers: Rows) -> set[tuple]:
    """Keys of the rows that need not be asked again."""
    return {k for k, row in answers.rows.items() if _done(row)}


def all_works(plans: Sequence[Plan], subject: Subject, done: set[tuple]) -> list[Work]:
    """Of all plans, without what one before asks already. done: the keys of what is answered."""
    works: dict[tuple, Work] = {}
    for plan in plans:
        for name in plan.tasks:
            for work in _works(plan, subject, name, done):
                works.setdefault(tuple(key(_key_row(plan, name, item, work.protocol, work.case)) for item, _ in work.asked), work)
    return list(works.values())


def _works(plan: Plan, subject: Subject, name: str, done: set[tuple]) -> list[Work]:
    module, vocabulary = task(name), subject.vocabulary
    settings = {**module.SETTINGS, **(plan.settings or {}).get(name, {})}
    items = module.load(Options(lambda text: count(vocabulary, text), plan.data_dir, plan.n, plan.seed, plan.chat, settings))
    asked = [(item, render(item, vocabulary, plan.chat)) for item in items]
    needed = max(count(vocabulary, prompt.head) + count(vocabulary, prompt.tail) + item.max_tokens for item, prompt in asked) + N_SPARE
    limit, what = (plan.n_ctx, "--n-ctx is") if plan.n_ctx else (subject.n_ctx_train, f"{subject.name} was trained for")
    if needed > limit:
        raise ValueError(f"{name} needs a context of {needed} tokens, {what} {limit}")
    n_ctx = plan.n_ctx or needed
    works = []
    for case in plan.cases:
        for protocol in plan.protocols:
            left = [(item, prompt) for item, prompt in asked if key(_key_row(plan, name, item, protocol, case)) not in done]
            works.append(Work(plan, name, settings, case, protocol, n_ctx, asked, groups(left, protocol, case)))
    return works


def _done(row: Row | None) -> bool:
    return row is not None and "error" not in row


def _key_row(plan: Plan, name: str, item: Item, protocol: str, case: Case) -> Row:
    return {"task": name, "item": item.id, "protocol": protocol, "policy": case.policy, "budget": case.budget, "decode_budget": case.decode_budget,
            "cells": case.cells, "type_k": case.type_k, "type_v": case.type_v, "n_ubatch": plan.n_ubatch, "chat": plan.chat and item.chat,
            "seed": plan.seed}


def tokens_of(group: Asked, subject: Subject) -> int:
    """To evaluate before the answers."""
    return count(subject.vocabulary, group[0][1].head) + sum(count(subject.vocabulary, prompt.tail) for _, prompt in group)


def _weight(asked: Asked, subject: Subject) -> int:
    """About how long it takes: generated tokens take longer. Contexts are left out."""
    return sum(count(subject.vocabulary, prompt.tail) + 4*item.max_tokens for item, prompt in asked)


# -- answers ------------------------------------------------------------------------------------------------------------

def _open(subject: Subject, work: Work, n_parallel: int = 1) -> pykvc.LLM:
    plan = work.plan
    n_ctx = work.n_ctx + plan.n_ubatch*(work.case.probes and not work.case.cells)  # a probe is evaluated after the context
    return pykvc.LLM(subject.path, n_ctx=n_ctx, n_batch=plan.n_ubatch, n_ubatch=plan.n_ubatch, n_threads=plan.n_threads,
                     n_gpu_layers=plan.n_gpu_layers, n_seq_max=n_parallel, seed=plan.seed, **work.case.settings())


def _checked_alike(work: Work) -> tuple:
    """Ratios cannot be too small."""
    return work.task, work.n_ctx, replace(work.case, **{name: "25%" for name in ("budget", "decode_budget") if "." in getattr(work.case, name)})


def _check(subject: Subject, work: Work) -> None:
    """A budget that cannot be, or a question too long to be asked after each chunk, is a mistake now and not in an hour."""
    with _open(subject, work) as llm:
        if work.case.asks:
            llm.prefill("a", kv_query=max((prompt.query for _, prompt in work.asked), key=lambda query: len(llm.tokenize(query))))


def _answer(subject: Subject, work: Work, identity: Row, answers: Rows, scores: Rows, watch: Watch) -> None:
    plan, what = work.plan, _name(work)
    for item, _ in work.asked:  # a run was killed between the two
        row = answers.rows.get(key(_key_row(plan, work.task, item, work.protocol, work.case)))
        if _done(row) and key(row) not in scores.rows:
            _score(item, row, scores)

    def left(of: Asked) -> Asked:  # another plan may have asked them since
        return [(item, prompt) for item, prompt in of if not _done(answers.rows.get(key(_key_row(plan, work.task, item, work.protocol, work.case))))]

    def save(item: Item, figures: Row) -> None:
        row = {**_key_row(plan, work.task, item, work.protocol, work.case), **identity, "settings": work.settings}
        if "error" not in figures:
            row |= {"n_ctx": work.n_ctx, "gold": item.gold, "tags": item.tags}
        answers.append(row := {**row, **figures})
        if "error" not in figures:
            _score(item, row, scores)

    watch(0, what)
    asked = left([one for group in work.todo for one in group])
    if plan.n_parallel > 1 and len(asked) > 1 and not hasattr(task(work.task), "ask") and side_by_side(work.case):
        _together(subject, work, asked, save, watch)
        if not (asked := left(asked)):
            return
    _one_by_one(subject, work, groups(asked, work.protocol, work.case), save, watch)


def _together(subject: Subject, work: Work, asked: Asked, save: Callable[[Item, Row], None], watch: Watch) -> None:
    """What crashes is asked again, alone, to find out which row it is."""
    n_parallel, prompts = min(work.plan.n_parallel, len(asked)), {item.id: prompt for item, prompt in asked}
    try:
        with _open(subject, work, n_parallel) as llm:
            for item, figures in ask_batch(llm, asked, work.protocol, work.case, n_parallel):
                save(item, {**figures, "n_parallel": n_parallel})
                watch(_weight([(item, prompts[item.id])], subject), _name(work))
    except Exception as error:
        print(f"{_name(work)}: {type(error).__name__}: {error}; one by one from here", flush=True)


def _one_by_one(subject: Subject, work: Work, todo: list[Asked], save: Callable[[Item, Row], None], watch: Watch) -> None:
    llm, asks = None, getattr(task(work.task), "ask", ask)
    try:
        for group in todo:
            left = list(group)
            while left:
                try:
                    llm = llm or _open(subject, work)
                    for item, figures in asks(llm, left[:], work.protocol, work.case, work.plan.n_threads):
                        save(item, figures)
                        watch(_weight([left.pop(0)], subject), _name(work))
                except Exception as error:  # of one row; the others go on, with a model that knows nothing of it
                    if not left:
                        raise
                    save(left.pop(0)[0], {"error": f"{type(error).__name__}: {error}"})
                    llm = llm and llm.close()
    finally:
        if llm is not None:
            llm.close()


def _score(item: Item, row: Row, scores: Rows) -> None:
    result = {name: row[name] for name in KEY}
    try:
        result["score"] = float(task(row["task"]).score(item, row["answer"]))
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    scores.append(result)


# -- what went wrong ----------------------------------------------------------------------------------------------------

def _name(work: Work) -> str:
    return ", ".join(filter(None, [work.task, changed(work.task, work.settings), work.protocol])) + f": {work.case.label()}"


def _problems(work: Work, answers: Rows, scores: Rows) -> list[str]:
    """Also prints what happened."""
    plan = work.plan
    keys = [key(_key_row(plan, work.task, item, work.protocol, work.case)) for item, _ in work.asked]
    rows = [answers.rows[k] for k in keys if k in answers.rows]
    done, failed = [row for row in rows if _done(row)], [row for row in rows if not _done(row)]
    n_evictions, name = sum(row["evictions"] for row in done), _name(work)
    values = [scores.rows[key(row)]["score"] for row in done if "score" in scores.rows.get(key(row), {})]
    mean = f"{sum(values)/len(values):.3f}" if values else "none"
    print(f"{name}: {len(done)} answers, {n_evictions} evictions, score {mean}", flush=True)
    problems = []
    if failed:
        problems.append(f"{name}: {len(failed)} rows failed, the first with {failed[0]['error']}; the next run asks them again")
    if not n_evictions and any(_should_evict(row) for row in done):
        problems.append(f"{name}: nothing was evicted, so these scores say nothing of the policy")
    return problems


def _should_evict(row: Row) -> bool:
    if row["policy"] == "full":
        return False
    n = row["n_context"] if row["protocol"] == "question-out" else row["n_prompt"]
    if row["budget"]:
        kind, amount = _core.parse_budget(row["budget"])
        return (amount if kind == "tokens" else amount*n) < n
    return bool(row["cells"]) and row["cells_allocated"] < n
