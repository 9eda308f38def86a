"""How long a plan takes here: its tokens, and this machine's rates, measured for a few seconds."""
from time import perf_counter
from typing import Sequence

import pykvc
from pykvc.prose import prose

from .run import Plan, all_works, open_model, tokens_of
from .store import Row, key, read

N_PREFILL, N_DECODE = 512, 24


def sentence(plans: Sequence[Plan], model: str | None) -> str:
    """Rows, tokens and hours of what is not answered yet. An answer is taken to be as long as those of its task that are there, else as it may be."""
    subject = open_model(model)
    rows = read(plans[0].out/f"{subject.name}.answers.jsonl")
    done = {key(row) for row in rows if "error" not in row}
    lengths = _lengths(rows)
    works = all_works(plans, subject, done)
    n_rows = n_prefill = n_decode = 0
    for work in works:
        for group in work.todo:
            n_rows += len(group)
            n_prefill += tokens_of(group, subject)
            n_decode += sum(min(item.max_tokens, lengths.get(work.task, item.max_tokens)) for item, _ in group)
    if not n_rows:
        return f"{subject.name}: nothing is left to do of {sum(len(work.asked) for work in works)} rows"
    per_prefill, per_decode = _rates(plans[0], model)
    hours = (n_prefill*per_prefill + n_decode*per_decode)/3600
    return (f"{subject.name}: {n_rows} rows in {sum(bool(work.todo) for work in works)} configurations, {n_prefill} tokens to evaluate at {1/per_prefill:.0f} t/s and "
            f"{'about' if lengths else 'at most'} {n_decode} to generate at {1/per_decode:.0f} t/s: {hours:.2g} hours")


def _lengths(rows: list[Row]) -> dict[str, float]:
    """Tokens of an answer, by task."""
    seen: dict[str, list[int]] = {}
    for row in rows:
        if "error" not in row:
            seen.setdefault(row["task"], []).append(row["n_predicted"])
    return {name: sum(values)/len(values) for name, values in seen.items()}


def _rates(plan: Plan, model: str | None) -> tuple[float, float]:
    """Seconds a token takes to be evaluated in a prompt, and to be generated."""
    with pykvc.LLM(model, n_ctx=2*N_PREFILL, n_threads=plan.n_threads, n_gpu_layers=plan.n_gpu_layers) as llm:
        ids = llm.tokenize(prose(N_PREFILL//8))[:N_PREFILL]
        llm.prefill(tokens=ids[:32])
        begin = perf_counter()
        llm.prefill(tokens=ids[32:])
        middle = perf_counter()
        for token in ids[:N_DECODE]:
            llm.prefill(tokens=[token])
        return (middle - begin)/(len(ids) - 32), (perf_counter() - middle)/N_DECODE
