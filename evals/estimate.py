"""How long a plan takes here: its tokens, and this machine's rates, measured for a few seconds."""
from time import perf_counter
from typing import Sequence

import pykvc
from pykvc.prose import prose

from .ask import shared, together
from .prompts import count
from .stats import mean
from .store import grouped, read
from .tasks import task
from .work import Plan, all_works, open_model, sweeps

N_PREFILL, N_DECODE = 512, 24


def sentence(plans: Sequence[Plan], model: str | None) -> str:
    """Rows, tokens and hours of what is not answered yet. An answer is taken to be as long as those of its task that
    are there, else as it may be."""
    subject = open_model(model)
    rows = read(plans[0].out/f"{subject.name}.answers.jsonl")
    of_task = grouped((row for row in rows.values() if "error" not in row), lambda row: row["task"])
    lengths = {name: mean(row["n_predicted"] for row in of) for name, of in of_task.items()}
    works = all_works(plans, subject, rows)
    n_rows = n_prefill = 0
    n_decode = {True: 0.0, False: 0.0}  # several questions at once, one after the other
    for sweep in sweeps(works):
        case, protocol, asks = sweep[0].case, sweep[0].protocol, hasattr(task(sweep[0].task), "ask")
        todo = [one for work in sweep for one in work.todo]
        n_rows += len(todo)
        n_prefill += sum(count(subject.vocabulary, head)
                         for head in {shared(*one, protocol, case): one[1].head for one in todo}.values())
        # teacher-forced
        n_prefill += sum(count(subject.vocabulary, prompt.tail) + item.max_tokens*asks for item, prompt in todo)
        at_once = plans[0].n_parallel > 1 and together(work.case for work in sweep)
        n_decode[at_once] += sum(min(item.max_tokens, lengths.get(sweep[0].task, item.max_tokens))
                                 for item, _ in todo if not asks)
    if not n_rows:
        return f"{subject.name}: nothing is left to do of {sum(len(work.asked) for work in works)} rows"
    per_prefill, per_decode = _rates(plans[0], model, 1)
    per_batch = _rates(plans[0], model, plans[0].n_parallel)[1] if n_decode[True] else per_decode
    hours = (n_prefill*per_prefill + n_decode[True]*per_batch + n_decode[False]*per_decode)/3600
    return (f"{subject.name}: {n_rows} rows in {sum(bool(work.todo) for work in works)} configurations, {n_prefill} "
            f"tokens to evaluate at {1/per_prefill:.0f} t/s and {'about' if lengths else 'at most'} "
            f"{n_decode[True]:.0f} to generate at {1/per_batch:.0f} t/s ({plans[0].n_parallel} questions at once) and "
            f"{n_decode[False]:.0f} at {1/per_decode:.0f} t/s: {hours:.2g} hours")


def _rates(plan: Plan, model: str | None, n_parallel: int) -> tuple[float, float]:
    """Seconds a token takes to be evaluated in a prompt, and to be generated, n_parallel sequences side by side."""
    with pykvc.LLM(model, n_ctx=N_PREFILL + N_DECODE, n_seq_max=n_parallel, n_threads=plan.n_threads,
                   n_gpu_layers=plan.n_gpu_layers) as llm:
        ids = llm.tokenize(prose(N_PREFILL//8))[:N_PREFILL]
        llm.prefill(tokens=ids[:32])
        begin = perf_counter()
        llm.prefill(tokens=ids[32:])
        took = perf_counter() - begin
        answers = llm.generate_batch([ids[:64]]*n_parallel, max_tokens=N_DECODE)
        steps = [answer.timings["decode_tps"] for answer in answers if answer.n_predicted > 1]
    return took/(len(ids) - 32), 1/(n_parallel*max(steps)) if steps else took/(len(ids) - 32)
