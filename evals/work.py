"""What a run was asked for: single questions, each for one configuration."""
import hashlib
import itertools
import json
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Iterator, Sequence

from pykvc import __version__, _core, models, weights

from .ask import Asked, shared, side_by_side
from .cases import Case
from .items import Item, Options
from .prompts import Prompt, count, render
from .store import Row, grouped, key
from .tasks import task, usual_settings

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

    @property
    def how(self) -> dict[str, Any]:
        """Keywords of LLM that the whole cache has, too."""
        return dict(n_batch=self.n_ubatch, n_ubatch=self.n_ubatch, n_threads=self.n_threads,
                    n_gpu_layers=self.n_gpu_layers)


@dataclass(frozen=True)
class Job:
    """One question for one configuration and protocol."""
    plan: Plan
    task: str
    settings: Row                 # of the task, all of them
    case: Case
    protocol: str
    n_ctx: int
    item: Item
    prompt: Prompt

    @cached_property
    def key_row(self) -> Row:
        return {"task": self.task, "item": self.item.id, "protocol": self.protocol, **asdict(self.case),
                "n_ubatch": self.plan.n_ubatch, "chat": self.plan.chat and self.item.chat, "seed": self.plan.seed}

    @cached_property
    def key(self) -> tuple:
        return key(self.key_row)

    @cached_property
    def rest(self) -> str:
        """A digest of what an answer depends on beside its prompt's text: fidelity's on the text it compares on."""
        given = self.item.gold if hasattr(task(self.task), "ask") else None
        text = json.dumps([self.prompt.spans, self.item.stop, self.item.max_tokens, given])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def asked(self) -> Asked:
        return self.item, self.prompt, self.case

    @property
    def context(self) -> str:
        return shared(*self.asked, self.protocol)

    @property
    def configuration(self) -> tuple:
        return id(self.plan), self.task, self.protocol, self.case

    def is_answered(self, rows: dict[tuple, Row]) -> bool:
        """A task or a template may have changed since; older rows have no rest."""
        row = rows.get(self.key)
        return is_done(row) and row.get("prompt") == self.prompt.digest and row.get("rest", self.rest) == self.rest

    def weight(self, subject: "Subject") -> int:
        """About how long it takes: generated tokens take longer. Contexts are left out."""
        return count(subject.vocabulary, self.prompt.tail) + 4*self.item.max_tokens


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


@cache
def engine() -> str:
    """Version and library that answer, whatever the checkout says: pykvc's, and the beginning of libllama's sha256."""
    library = next(Path(_core.__file__).parent.rglob("libllama.*"), Path(_core.__file__))
    return f"{__version__}-{hashlib.sha256(library.read_bytes()).hexdigest()[:12]}"


@cache
def processor() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:(.*)$", path.read_text() if path.is_file() else "", re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def all_jobs(plans: Sequence[Plan], subject: Subject) -> list[Job]:
    """Of all plans, each question once. ValueError for every mistake that can be seen before a model evaluates."""
    found: dict[tuple, Job] = {}
    for plan in plans:
        for job in itertools.chain.from_iterable(_jobs(plan, subject, name) for name in plan.tasks):
            found.setdefault(job.key, job)
    return list(found.values())


def _jobs(plan: Plan, subject: Subject, name: str) -> Iterator[Job]:
    vocabulary, given = subject.vocabulary, (plan.settings or {}).get(name, {})
    settings = {**usual_settings(name, given), **given}
    items = _load(name, Options(lambda text: count(vocabulary, text), plan.data_dir, plan.n, plan.seed, plan.chat,
                                settings))
    if not items:
        raise ValueError(f"{name} has no item to ask: its data or --sets have none")
    asked = [(item, render(item, vocabulary, plan.chat)) for item in items]
    needed = max(count(vocabulary, prompt.head) + count(vocabulary, prompt.tail) + item.max_tokens
                 for item, prompt in asked) + N_SPARE
    limit, what = (plan.n_ctx, "--n-ctx is") if plan.n_ctx else (subject.n_ctx_train, f"{subject.name} was trained for")
    if needed > limit:
        raise ValueError(f"{name} needs a context of {needed} tokens, {what} {limit}")
    for case, protocol, one in itertools.product(plan.cases, plan.protocols, asked):
        yield Job(plan, name, settings, case, protocol, plan.n_ctx or needed, *one)


def sweeps(jobs: Sequence[Job], subject: Subject) -> list[list[Job]]:
    """Questions that differ in their budgets alone, so that one model holds them, one evaluated context begins them,
    and a sequence that is done makes room for the next budget's question. With question-out they may be of other
    policies, too, of those that the first one's context serves, where that pays: side by side is one policy. With
    kv_cells the budget counts while a context is evaluated, so every budget has contexts of its own."""
    def alike(job: Job) -> tuple:
        case, budgets = job.case, (bool(job.case.budget), bool(job.case.decode_budget))
        if not case.cells:
            case = replace(case, budget="", decode_budget="" if case.budget else case.decode_budget)
            if budgets == (True, False) and job.protocol == "question-out":
                case = replace(case, policy="")
        return id(job.plan), job.task, job.protocol, budgets, case
    found: list[list[Job]] = []
    for served in itertools.chain.from_iterable(map(_served, grouped(jobs, alike).values())):
        of_each = list(grouped(served, lambda job: job.case.policy).values())
        found += [served] if _pays(served, len(of_each) - 1, subject) else of_each
    return found


def _served(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Parted into what one policy's context serves; that policy comes first."""
    left = grouped(jobs, lambda job: job.case.policy)
    while left:
        cases = [of[0].case for of in left.values()]
        first = max(cases, key=lambda case: sum(map(case.serves, cases)))
        served = [first, *(case for case in cases if case is not first and first.serves(case))]
        yield [job for case in served for job in left.pop(case.policy)]


def _pays(jobs: Sequence[Job], n_saved: int, subject: Subject) -> bool:
    """Is evaluating every context n_saved times less worth asking one question after the other? On a CPU a generated
    token then takes as long as four of a prompt, side by side as one; a GPU prefers side by side."""
    plan, heads = jobs[0].plan, {job.context: job.prompt.head for job in jobs}
    if plan.n_parallel == 1 or hasattr(task(jobs[0].task), "ask") or not all(side_by_side(job.case) for job in jobs):
        return True
    n_evaluated = n_saved*sum(count(subject.vocabulary, head) for head in heads.values())
    return plan.n_gpu_layers == 0 and n_evaluated > 3*sum(job.item.max_tokens for job in jobs)


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
