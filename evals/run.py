"""The loop: for every model, task, case and protocol what is not answered yet is asked, saved, and then scored."""
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Callable, Iterator, Sequence

import pykvc
from pykvc import _core

from .ask import Asked, ask, ask_batch, groups, side_by_side
from .cases import exceeds
from .items import Item
from .report import changed
from .store import KEY, Row, Rows, key
from .tasks import task
from .work import Plan, Subject, Work, all_works, commit, engine, is_answer, is_done, key_row, open_model, processor, weight

Watch = Callable[[int, str], None]  # tokens done, what is under way


def run(plan: Plan, model: str | None, size: Callable[[int], None] = lambda n: None, watch: Watch = lambda n, what: None) -> list[str]:
    """run_all() of one plan."""
    return run_all([plan], model, size, watch)


def check_all(plans: Sequence[Plan], model: str | None) -> None:
    """ValueError for every mistake in the plans, before anything is evaluated: of all models before the first of them answers."""
    with _ready(plans, model):
        pass


def run_all(plans: Sequence[Plan], model: str | None, size: Callable[[int], None] = lambda n: None,
            watch: Watch = lambda n, what: None) -> list[str]:
    """Does what is left of the plans, which share an `out`, for one model; returns what went wrong, in sentences.

    size: is told how many tokens there are to evaluate; watch: how many were, and what is under way.
    ValueError for every mistake in a plan, before anything is evaluated."""
    with _ready(plans, model) as (subject, identity, answers, scores, works):
        size(sum(weight(group, subject) for work in works for group in work.todo))
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
            for work in {_checked_alike(work): work for work in works if work.todo}.values():
                _check(subject, work)
            yield subject, identity, answers, scores, works


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


@dataclass
class Record:
    """What is there of a work's answers, and where more of them go."""
    work: Work
    identity: Row
    answers: Rows
    scores: Rows

    def __post_init__(self) -> None:
        self.digests = {item.id: prompt.digest for item, prompt in self.work.asked}

    def key_row(self, item: Item) -> Row:
        return key_row(self.work.plan, self.work.task, item, self.work.protocol, self.work.case)

    def left(self, of: Asked) -> Asked:
        """Another plan may have asked them since."""
        return [(item, prompt) for item, prompt in of if not is_answer(self.answers.rows.get(key(self.key_row(item))), prompt)]

    def score_rest(self) -> None:
        """A run was killed between an answer and its score."""
        for item, _ in self.work.asked:
            row = self.answers.rows.get(key(self.key_row(item)))
            if is_done(row) and self.scores.rows.get(key(row), {}).get("prompt") != row.get("prompt"):
                _score(item, row, self.scores)

    def save(self, item: Item, figures: Row) -> None:
        plan = self.work.plan
        row = {**self.key_row(item), **self.identity, "settings": self.work.settings, "prompt": self.digests[item.id]}
        if "error" not in figures:
            row |= {"engine": engine(), "processor": processor(), "n_threads": plan.n_threads, "n_gpu_layers": plan.n_gpu_layers}
            row |= {"n_ctx": self.work.n_ctx, "gold": item.gold, "tags": item.tags}
        self.answers.append(row := {**row, **figures})
        if "error" not in figures:
            _score(item, row, self.scores)


def sweeps(works: Sequence[Work]) -> list[list[Work]]:
    """Works that differ in their budgets alone, so that one context holds them, one evaluated prompt begins them, and a sequence that is
    done makes room for the next budget's question."""
    found: dict[tuple, list[Work]] = {}
    for work in works:
        budgets = (bool(work.case.budget), bool(work.case.decode_budget))
        found.setdefault((id(work.plan), work.task, repr(work.settings), work.n_ctx, work.protocol, budgets, replace(work.case, budget="", decode_budget="")), []).append(work)
    return list(found.values())


def _answer(subject: Subject, records: list[Record], watch: Watch) -> None:
    """Of a sweep."""
    work = records[0].work
    for record in records:
        record.score_rest()
    asked = [(record, record.left([one for group in record.work.todo for one in group])) for record in records]
    if work.plan.n_parallel > 1 and sum(len(of) for _, of in asked) > 1 and not hasattr(task(work.task), "ask") and side_by_side(work.case):
        watch(0, _name(work, records))
        _together(subject, asked, watch)
    for record in records:
        left = record.left([one for group in record.work.todo for one in group])
        if left:
            watch(0, _name(record.work))
            _one_by_one(subject, record.work, groups(left, record.work.protocol, record.work.case), record.save, watch)


def _together(subject: Subject, asked: list[tuple[Record, Asked]], watch: Watch) -> None:
    """Contexts are evaluated once, so their questions stand together. What crashes is asked again, alone, to find out which row it is."""
    heads = dict.fromkeys(prompt.head for _, of in asked for _, prompt in of)
    ordered = [(record, item, prompt) for head in heads for record, of in asked for item, prompt in of if prompt.head == head]
    work, n_parallel = ordered[0][0].work, min(ordered[0][0].work.plan.n_parallel, len(ordered))
    try:
        with _open(subject, work, n_parallel) as llm:
            for i, figures in ask_batch(llm, [(item, prompt, record.work.case) for record, item, prompt in ordered], work.protocol, n_parallel):
                record, item, prompt = ordered[i]
                record.save(item, {**figures, "n_parallel": n_parallel})
                watch(weight([(item, prompt)], subject), _name(work, [record for record, of in asked if of]))
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
                        watch(weight([left.pop(0)], subject), _name(work))
                except Exception as error:  # of one row; the others go on, with a model that knows nothing of it
                    if not left:
                        raise
                    save(left.pop(0)[0], {"error": f"{type(error).__name__}: {error}"})
                    llm = llm and llm.close()
    finally:
        if llm is not None:
            llm.close()


def _score(item: Item, row: Row, scores: Rows) -> None:
    result = {name: row.get(name) for name in (*KEY, "prompt")}
    try:
        result["score"] = float(task(row["task"]).score(item, row["answer"]))
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    scores.append(result)


# -- what went wrong ----------------------------------------------------------------------------------------------------

def _name(work: Work, sweep: Sequence[Record] = ()) -> str:
    """sweep: the budgets of all of them."""
    budgets = [record.work.case.budget or record.work.case.decode_budget for record in sweep]
    label = replace(work.case, budget="/".join(budgets), decode_budget="").label() if len(budgets) > 1 else work.case.label()
    return ", ".join(filter(None, [work.task, changed(work.task, work.settings), work.protocol])) + f": {label}"


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
        problems.append(f"{name}: {len(failed)} rows failed, the first with {failed[0]['error']}; the next run asks them again")
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
    late = sum(map(int, re.findall(r"\b(?:interval|recent)=(\d+)(?=,|$)", row["policy"])))  # tokens that may wait, or are always kept
    return row["n_predicted"] > (amount if kind == "tokens" else amount*row["n_predicted"]) + late
