"""The loop: for every model, task, case and protocol what is not answered yet is asked, saved, and then scored."""
import itertools
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Callable, Iterator, Sequence

import pykvc
from pykvc import _core

from .ask import ask, ask_batch, together
from .cases import Case, exceeds
from .items import Item
from .report import changed, listed
from .stats import mean
from .store import KEY, Row, Rows, grouped, key
from .tasks import task, verdicts
from .work import Job, Plan, Subject, all_jobs, commit, engine, is_done, open_model, processor, sweeps

Watch = Callable[[int, str], None]  # tokens done, what is under way


def check_all(plans: Sequence[Plan], model: str | None) -> None:
    """ValueError for every mistake in the plans, before anything is evaluated: of all models before the first of them
    answers."""
    with _ready(plans, model):
        pass


def run(plans: Plan | Sequence[Plan], model: str | None, size: Callable[[int], None] = lambda n: None,
        watch: Watch = lambda n, what: None) -> list[str]:
    """Does what is left of the plans, which share an `out`, for one model; returns what went wrong, in sentences.

    size: is told how many tokens there are to evaluate; watch: how many were, and what is under way.
    ValueError for every mistake in a plan, before anything is evaluated."""
    with _ready([plans] if isinstance(plans, Plan) else plans, model) as (jobs, book):
        book.score_rest(jobs)
        left = book.left(jobs)
        size(sum(job.weight(book.subject) for job in left))
        for sweep in sweeps(left, book.subject):
            _answer(sweep, book, watch)
        return list(itertools.chain.from_iterable(
            _problems(of, book) for of in grouped(jobs, lambda job: job.configuration).values()))


@contextmanager
def _ready(plans: Sequence[Plan], model: str | None) -> "Iterator[tuple[list[Job], Book]]":
    subject, out = open_model(model), plans[0].out
    identity = {"model": subject.name, "model_sha256": subject.sha256, "commit": commit()}
    with Rows(out/f"{subject.name}.answers.jsonl") as answers:
        answers.check(identity, plans[0].any_commit)
        with Rows(out/f"{subject.name}.scores.jsonl") as scores:
            jobs, book = all_jobs(plans, subject), Book(subject, identity, answers, scores)
            if left := book.left(jobs):
                subject.hold(plans[0].n_gpu_layers)
            for alike in grouped(left, _checked_alike).values():
                _check(alike, subject)
            yield jobs, book


@dataclass
class Book:
    """The answers and scores of a model, and where more of them go."""
    subject: Subject
    identity: Row
    answers: Rows
    scores: Rows

    def left(self, jobs: Sequence[Job]) -> list[Job]:
        """What is not answered yet. Whose contexts can be shared stand together, and of these the ones of a case."""
        left = [job for job in jobs if not job.is_answered(self.answers.rows)]
        return [job for together in grouped(left, lambda job: job.context).values() for job in together]

    def score_rest(self, jobs: Sequence[Job]) -> None:
        """A run was killed between an answer and its score, or what is right has changed since."""
        for job in (job for job in jobs if job.is_answered(self.answers.rows)):
            row, gold = self.answers.rows[job.key], json.loads(json.dumps(job.item.gold))
            other = "gold" in row and row["gold"] != gold
            if other or self.scores.rows.get(job.key, {}).get("prompt") != row.get("prompt"):
                _score(job.item, row, self.scores)
            if other:  # now that it is scored
                self.answers.append({**row, "gold": gold})

    def save(self, job: Job, figures: Row) -> None:
        row = {**job.key_row, **self.identity, "settings": job.settings, "prompt": job.prompt.digest,
               "rest": job.rest, **figures}
        if "error" not in figures:
            row |= {"engine": engine(), "processor": processor(), "n_threads": job.plan.n_threads,
                    "n_gpu_layers": job.plan.n_gpu_layers, "n_ctx": job.n_ctx, "gold": job.item.gold,
                    "tags": job.item.tags}
        self.answers.append(row)
        if "error" not in figures:
            _score(job.item, row, self.scores)


# -- answers --------------------------------------------------------------------------------------------------------

def _open(subject: Subject, job: Job, case: Case, n_parallel: int = 1) -> pykvc.LLM:
    """case: the job's, or one that serves it."""
    plan = job.plan
    n_ctx = job.n_ctx + case.n_probe(plan.n_ubatch)
    return pykvc.LLM(subject.path, n_ctx=n_ctx, n_seq_max=n_parallel, seed=plan.seed, **plan.how, **case.settings())


def _checked_alike(job: Job) -> tuple:
    """Ratios cannot be too small."""
    ratios = {name: "25%" for name in ("budget", "decode_budget") if "." in getattr(job.case, name)}
    return job.task, job.n_ctx, replace(job.case, **ratios)


def _check(jobs: Sequence[Job], subject: Subject) -> None:
    """A budget that cannot be, or a question too long to be asked after each chunk, is a mistake now and not in an
    hour."""
    with _open(subject, jobs[-1], jobs[-1].case) as llm:
        if jobs[0].case.asks:
            queries = {job.prompt.query for job in jobs}
            llm.prefill("a", kv_query=max(queries, key=lambda query: len(llm.tokenize(query))))


def _answer(sweep: list[Job], book: Book, watch: Watch) -> None:
    """The first one's policy serves all."""
    case, todo, what = sweep[0].case, book.left(sweep), _name(sweep)
    watch(0, what)
    if todo[0].plan.n_parallel > 1 and len(todo) > 1 and not hasattr(task(todo[0].task), "ask") and together(
            job.case for job in todo):
        _together(todo, book, what, watch)
    _one_by_one(book.left(todo), case, book, what, watch)


def _together(todo: list[Job], book: Book, what: str, watch: Watch) -> None:
    """What crashes is asked again, alone, to find out which row it is."""
    n_parallel = min(todo[0].plan.n_parallel, len(todo))
    try:
        with _open(book.subject, todo[0], todo[0].case, n_parallel) as llm:
            for i, figures in ask_batch(llm, [job.asked for job in todo], todo[0].protocol, n_parallel):
                book.save(todo[i], {**figures, "n_parallel": n_parallel})
                watch(todo[i].weight(book.subject), what)
    except Exception as error:
        print(f"{what}: {type(error).__name__}: {error}; one by one from here", flush=True)


def _one_by_one(todo: list[Job], case: Case, book: Book, what: str, watch: Watch) -> None:
    llm = None
    try:
        for _, of_context in itertools.groupby(todo, key=lambda job: job.context):
            left = list(of_context)
            while left:
                plan, put = left[0].plan, getattr(task(left[0].task), "ask", ask)
                try:
                    llm = llm or _open(book.subject, left[0], case)
                    for _, figures in put(llm, [job.asked for job in left], left[0].protocol, plan.how, plan.out):
                        book.save(left[0], figures)
                        watch(left.pop(0).weight(book.subject), what)
                except Exception as error:  # of one row; the others go on, with a model that knows nothing of it
                    if not left:
                        raise
                    book.save(left.pop(0), {"error": f"{type(error).__name__}: {error}"})
                    llm = llm and llm.close()
    finally:
        if llm is not None:
            llm.close()


def _score(item: Item, row: Row, scores: Rows) -> None:
    result = {name: row.get(name) for name in (*KEY, "prompt")}
    try:
        result["score"] = float(task(row["task"]).score(item, row["answer"]))
        if found := verdicts(row["task"], item, row["answer"]):
            result["verdicts"] = found
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    scores.append(result)


# -- what went wrong ------------------------------------------------------------------------------------------------

def _name(jobs: Sequence[Job]) -> str:
    """With the policies and budgets of all of them."""
    case = jobs[0].case
    if len(budgets := dict.fromkeys(job.case.budget or job.case.decode_budget for job in jobs)) > 1:
        case = replace(case, budget="/".join(budgets), decode_budget="")
    if len(policies := dict.fromkeys(job.case.policy for job in jobs)) > 1:
        case = replace(case, policy="/".join(policies))
    return listed(jobs[0].task, changed(jobs[0].task, jobs[0].settings), jobs[0].protocol) + f": {case.label()}"


def _problems(jobs: Sequence[Job], book: Book) -> list[str]:
    """Of one configuration. Also prints what happened."""
    rows = [book.answers.rows[job.key] for job in jobs if job.key in book.answers.rows]
    done, failed = [row for row in rows if is_done(row)], [row for row in rows if not is_done(row)]
    n_evictions, name = sum(row["evictions"] for row in done), _name(jobs)
    scores = [book.scores.rows[key(row)]["score"] for row in done if "score" in book.scores.rows.get(key(row), {})]
    print(f"{name}: {len(done)} answers, {n_evictions} evictions, "
          f"score {f'{mean(scores):.3f}' if scores else 'none'}", flush=True)
    problems = []
    if failed:
        problems.append(f"{name}: {len(failed)} rows failed, the first with {failed[0]['error']}; the next run asks "
                        "them again")
    if not n_evictions and any(_should_evict(row) for row in done):
        problems.append(f"{name}: nothing was evicted, so these scores say nothing of the policy")
    return problems


def _should_evict(row: Row) -> bool:
    if row["policy"] == "full":
        return False
    n = row["n_context"] if row["protocol"] == "question-out" else row["n_prompt"]
    if row["budget"]:
        return exceeds(n, row["budget"])
    if row["cells"]:
        return row["cells_allocated"] < n
    kind, amount = _core.parse_budget(row["decode_budget"])
    # tokens that may wait, or are always kept
    late = sum(map(int, re.findall(r"\b(?:interval|recent)=(\d+)(?=,|$)", row["policy"])))
    return row["n_predicted"] > (amount if kind == "tokens" else amount*row["n_predicted"]) + late
