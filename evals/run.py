"""The loop: for every model, task, case and protocol what is not answered yet is asked, saved, and then scored."""
import itertools
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Callable, Iterator, Sequence

import pykvc
from pykvc import _core

from .ask import Asked, ask, ask_batch, shared, together
from .cases import exceeds
from .items import Item
from .prompts import Prompt
from .report import changed
from .store import KEY, Row, Rows, key
from .tasks import task, verdicts
from .work import (Plan, Subject, Work, all_works, commit, engine, is_answer, is_done, key_row, open_model, processor,
                   sweeps, weight)

Watch = Callable[[int, str], None]  # tokens done, what is under way


def run(plan: Plan, model: str | None, size: Callable[[int], None] = lambda n: None,
        watch: Watch = lambda n, what: None) -> list[str]:
    """run_all() of one plan."""
    return run_all([plan], model, size, watch)


def check_all(plans: Sequence[Plan], model: str | None) -> None:
    """ValueError for every mistake in the plans, before anything is evaluated: of all models before the first of them
    answers."""
    with _ready(plans, model):
        pass


def run_all(plans: Sequence[Plan], model: str | None, size: Callable[[int], None] = lambda n: None,
            watch: Watch = lambda n, what: None) -> list[str]:
    """Does what is left of the plans, which share an `out`, for one model; returns what went wrong, in sentences.

    size: is told how many tokens there are to evaluate; watch: how many were, and what is under way.
    ValueError for every mistake in a plan, before anything is evaluated."""
    with _ready(plans, model) as (subject, identity, answers, scores, works):
        size(sum(weight(work.todo, subject) for work in works))
        for sweep in sweeps(works):
            _answer(subject, [Record(work, identity, answers, scores) for work in sweep], watch)
        return [problem for work in works for problem in _problems(work, answers, scores)]


@contextmanager
def _ready(plans: Sequence[Plan], model: str | None) -> Iterator[tuple[Subject, Row, Rows, Rows, list[Work]]]:
    subject = open_model(model)
    identity = {"model": subject.name, "model_sha256": subject.sha256, "commit": commit()}
    with Rows(plans[0].out/f"{subject.name}.answers.jsonl") as answers:
        answers.check(identity, plans[0].any_commit)
        with Rows(plans[0].out/f"{subject.name}.scores.jsonl") as scores:
            works = all_works(plans, subject, answers.rows)
            if any(work.todo for work in works):
                subject.hold(plans[0].n_gpu_layers)
            for work in {_checked_alike(work): work for work in works if work.todo}.values():
                _check(subject, work)
            yield subject, identity, answers, scores, works


# -- answers --------------------------------------------------------------------------------------------------------

def _open(subject: Subject, work: Work, n_parallel: int = 1) -> pykvc.LLM:
    plan = work.plan
    n_ctx = work.n_ctx + work.case.n_probe(plan.n_ubatch)
    return pykvc.LLM(subject.path, n_ctx=n_ctx, n_batch=plan.n_ubatch, n_ubatch=plan.n_ubatch, n_threads=plan.n_threads,
                     n_gpu_layers=plan.n_gpu_layers, n_seq_max=n_parallel, seed=plan.seed, **work.case.settings())


def _checked_alike(work: Work) -> tuple:
    """Ratios cannot be too small."""
    ratios = {name: "25%" for name in ("budget", "decode_budget") if "." in getattr(work.case, name)}
    return work.task, work.n_ctx, replace(work.case, **ratios)


def _check(subject: Subject, work: Work) -> None:
    """A budget that cannot be, or a question too long to be asked after each chunk, is a mistake now and not in an
    hour."""
    with _open(subject, work) as llm:
        if work.case.asks:
            llm.prefill("a", kv_query=max((prompt.query for _, prompt in work.asked),
                                          key=lambda query: len(llm.tokenize(query))))


@dataclass
class Record:
    """What is there of a work's answers, and where more of them go."""
    work: Work
    identity: Row
    answers: Rows
    scores: Rows

    def key_row(self, item: Item) -> Row:
        return key_row(self.work.plan, self.work.task, item, self.work.protocol, self.work.case)

    def left(self) -> Asked:
        """Another plan may have asked some since."""
        return [(item, prompt) for item, prompt in self.work.asked
                if not is_answer(self.answers.rows.get(key(self.key_row(item))), prompt)]

    def score_rest(self) -> None:
        """A run was killed between an answer and its score."""
        for item, _ in self.work.asked:
            row = self.answers.rows.get(key(self.key_row(item)))
            if is_done(row) and self.scores.rows.get(key(row), {}).get("prompt") != row.get("prompt"):
                _score(item, row, self.scores)

    def save(self, item: Item, prompt: Prompt, figures: Row) -> None:
        plan = self.work.plan
        row = {**self.key_row(item), **self.identity, "settings": self.work.settings, "prompt": prompt.digest}
        if "error" not in figures:
            row |= {"engine": engine(), "processor": processor(), "n_threads": plan.n_threads,
                    "n_gpu_layers": plan.n_gpu_layers}
            row |= {"n_ctx": self.work.n_ctx, "gold": item.gold, "tags": item.tags}
        self.answers.append(row := {**row, **figures})
        if "error" not in figures:
            _score(item, row, self.scores)


def _answer(subject: Subject, records: list[Record], watch: Watch) -> None:
    """Of a sweep."""
    work = records[0].work
    for record in records:
        record.score_rest()
    if not (todo := _left(records)):
        return
    what = _name(work, records)
    watch(0, what)
    several = [record.work.case for record, *_ in todo]
    if work.plan.n_parallel > 1 and len(todo) > 1 and not hasattr(task(work.task), "ask") and together(several):
        _together(subject, todo, what, watch)
    _one_by_one(subject, _left(records), what, watch)


def _left(records: list[Record]) -> list[tuple[Record, Item, Prompt]]:
    """Whose contexts can be shared stand together, and of these the ones of a case."""
    found: dict[str, list[tuple[Record, Item, Prompt]]] = {}
    for record in records:
        for item, prompt in record.left():
            found.setdefault(shared(item, prompt, record.work.protocol, record.work.case),
                             []).append((record, item, prompt))
    return [one for together in found.values() for one in together]


def _together(subject: Subject, todo: list[tuple[Record, Item, Prompt]], what: str, watch: Watch) -> None:
    """What crashes is asked again, alone, to find out which row it is."""
    work, n_parallel = todo[0][0].work, min(todo[0][0].work.plan.n_parallel, len(todo))
    try:
        with _open(subject, work, n_parallel) as llm:
            for i, figures in ask_batch(llm, [(item, prompt, record.work.case) for record, item, prompt in todo],
                                        work.protocol, n_parallel):
                record, item, prompt = todo[i]
                record.save(item, prompt, {**figures, "n_parallel": n_parallel})
                watch(weight([(item, prompt)], subject), what)
    except Exception as error:
        print(f"{what}: {type(error).__name__}: {error}; one by one from here", flush=True)


def _one_by_one(subject: Subject, todo: list[tuple[Record, Item, Prompt]], what: str, watch: Watch) -> None:
    llm, works = None, [record.work for record, *_ in todo]
    first = next((work for work in works if work.case.heads_differ), None)  # the others are variants of it
    try:
        def context(one: tuple[Record, Item, Prompt]) -> str:
            return shared(*one[1:], one[0].work.protocol, one[0].work.case)
        for _, of_context in itertools.groupby(todo, key=context):
            left = list(of_context)
            while left:
                work = left[0][0].work
                try:
                    llm = llm or _open(subject, first or work)
                    jobs = [(item, prompt, record.work.case) for record, item, prompt in left]
                    put = getattr(task(work.task), "ask", ask)
                    for item, figures in put(llm, jobs, work.protocol, work.plan.n_threads, work.plan.out):
                        record, _, prompt = left[0]
                        record.save(item, prompt, figures)
                        left.pop(0)
                        watch(weight([(item, prompt)], subject), what)
                except Exception as error:  # of one row; the others go on, with a model that knows nothing of it
                    if not left:
                        raise
                    record, item, prompt = left.pop(0)
                    record.save(item, prompt, {"error": f"{type(error).__name__}: {error}"})
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

def _name(work: Work, sweep: Sequence[Record] = ()) -> str:
    """sweep: the budgets of all of them."""
    budgets = [record.work.case.budget or record.work.case.decode_budget for record in sweep]
    case = replace(work.case, budget="/".join(budgets), decode_budget="") if len(budgets) > 1 else work.case
    return ", ".join(filter(None, [work.task, changed(work.task, work.settings), work.protocol])) + f": {case.label()}"


def _problems(work: Work, answers: Rows, scores: Rows) -> list[str]:
    """Also prints what happened."""
    plan = work.plan
    keys = [key(key_row(plan, work.task, item, work.protocol, work.case)) for item, _ in work.asked]
    rows = [answers.rows[k] for k in keys if k in answers.rows]
    done, failed = [row for row in rows if is_done(row)], [row for row in rows if not is_done(row)]
    n_evictions, name = sum(row["evictions"] for row in done), _name(work)
    values = [scores.rows[key(row)]["score"] for row in done if "score" in scores.rows.get(key(row), {})]
    mean = f"{sum(values)/len(values):.3f}" if values else "none"
    print(f"{name}: {len(done)} answers, {n_evictions} evictions, score {mean}", flush=True)
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
