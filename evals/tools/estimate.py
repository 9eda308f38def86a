"""How long a plan takes here: its tokens, and this machine's rates, measured for a few seconds."""
from time import perf_counter
from typing import Sequence

import pykvc
from pykvc.prose import prose

from ..ask import together
from ..prompts import count
from ..stats import mean
from ..store import grouped, read
from ..tasks import task
from ..work import Plan, all_jobs, open_model, sweeps

N_PREFILL, N_DECODE = 512, 24


def sentence(plans: Sequence[Plan], model: str | None) -> str:
    """Rows, tokens and hours of what is not answered yet. An answer is taken to be as long as those of its task that
    are there, else as it may be."""
    subject = open_model(model)
    rows = read(plans[0].out/f"{subject.name}.answers.jsonl")
    of_task = grouped((row for row in rows.values() if "error" not in row), lambda row: row["task"])
    lengths = {name: mean(row["n_predicted"] for row in of) for name, of in of_task.items()}
    jobs = all_jobs(plans, subject)
    left = [job for job in jobs if not job.is_answered(rows)]
    if not left:
        return f"{subject.name}: nothing is left to do of {len(jobs)} rows"
    n_prefill, n_decode = 0, {True: 0.0, False: 0.0}  # several questions at once, one after the other
    for sweep in sweeps(left, subject):
        forced = hasattr(task(sweep[0].task), "ask")  # teacher-forced: nothing is generated
        heads = {job.context: job.prompt.head for job in sweep}
        n_prefill += sum(count(subject.vocabulary, head) for head in heads.values())
        n_prefill += sum(count(subject.vocabulary, job.prompt.tail) + job.item.max_tokens*forced for job in sweep)
        at_once = plans[0].n_parallel > 1 and together(job.case for job in sweep)
        n_decode[at_once] += sum(min(job.item.max_tokens, lengths.get(job.task, job.item.max_tokens))
                                 for job in sweep if not forced)
    per_prefill, per_decode = _rates(plans[0], model, 1)
    per_batch = _rates(plans[0], model, plans[0].n_parallel)[1] if n_decode[True] else per_decode
    hours = (n_prefill*per_prefill + n_decode[True]*per_batch + n_decode[False]*per_decode)/3600
    n_configurations = len({job.configuration for job in left})
    return (f"{subject.name}: {len(left)} rows in {n_configurations} configurations, {n_prefill} "
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
