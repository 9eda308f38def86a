"""What LLM.generate_batch() was asked: its arguments, read and checked before anything is evaluated."""
from typing import Any, NamedTuple, Sequence

import numpy as np

from . import options, prompts as prompts_of, sampling, spans as units
from .arguments import Budget
from .batch import Prefix
from .generation import Request
from .sampling import Sampler, SamplingParams
from .session import Session
from .text import check_stop


class BatchRequest(NamedTuple):
    """As batch.answers() takes it: of each prompt."""
    requests: list[Request]
    budgets: list[tuple[str, str] | None]
    prefixes: list[Prefix | None]   # neighbours that share one have the same object


def read(session: Session, prompts: Sequence[str | Sequence[int]], llm_seed: int, *,
         prefix: str | Sequence[str] | None = None, shots: Sequence[str] | None = None,
         spans: Sequence[units.Span] | Sequence[Sequence[units.Span] | None] | None = None, span_unit: str = "tokens",
         segment: str | None = None, compress_prefix: bool = True, kv_budget: Budget | Sequence[Budget] = None,
         kv_decode_budget: Budget | Sequence[Budget] = None, kv_query: str | None = None, compress: bool | None = None,
         sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, **own: Any) -> BatchRequest:
    """ValueError for every mistake. llm_seed: of what has no seed of its own. own: fields of SamplingParams."""
    if isinstance(prompts, str) or not isinstance(prompts, (Sequence, np.ndarray)) or len(prompts) == 0:
        raise ValueError("prompts is a list of strings or of lists of token ids, and not empty")
    if not isinstance(prefix, (str, Sequence, type(None))):
        raise ValueError(f"prefix is a string, or a list of them, one for each prompt, not {prefix!r}")
    own_spans: list[Sequence[units.Span] | None] = [None]*len(prompts)
    if shots is not None:
        if any(given is not None for given in (prefix, spans, segment)):
            raise ValueError("shots are the prefix and its spans: give no prefix, spans or segment beside them")
        prefix, spans = prompts_of.join(shots, "")
        span_unit = "chars"
    elif spans is not None and prefix is None:
        own_spans = prompts_of.spans_of_each(spans, len(prompts))
    if session.probe.kind != "none" and prefix is None:
        raise ValueError("a policy that asks probes one context: give it as prefix or shots")
    if session.probe.kind != "none" and not compress_prefix:
        raise ValueError("a policy that asks probes a prefix and compresses it: compress_prefix=False is not for it")

    def encoded(text: str | None, tokens: Any, marked: Any, by: str | None,
                first: bool) -> tuple[list[int], list[units.Span]]:
        return prompts_of.encode(session.model, session.needs_spans, text, tokens, marked, span_unit, by, first)

    def prefix_of(text: str | None, marked: Any) -> Prefix | None:
        return None if text is None else Prefix(*encoded(text, None, marked, segment, first=True),
                                                prompts_of.query(session, kv_query), compress_prefix)

    shared: list[Prefix | None]
    if prefix is None or isinstance(prefix, str):
        shared = [prefix_of(prefix, spans)]*len(prompts)
    elif len(prefix) != len(prompts) or spans is not None and len(spans) != len(prompts):
        raise ValueError(f"prefix, if it is a list, has one for each of the {len(prompts)} prompts, and so has spans")
    else:
        shared = []
        for i, text in enumerate(prefix):
            same = i > 0 and text == prefix[i - 1] and (spans is None or spans[i] == spans[i - 1])
            shared.append(shared[-1] if same else prefix_of(text, None if spans is None else spans[i]))
    budgets = options.budgets(kv_budget, kv_decode_budget, len(prompts), session)
    if session.has_budget or any(budget and budget[0] for budget in budgets):
        session.probe.check_asked(kv_query)
    requests = []
    settings = sampling.of_each(sampling_params, own, len(prompts))
    for prompt, before, mine, how in zip(prompts, shared, own_spans, settings):
        written, tokens = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        ids, found = encoded(written, tokens, mine, None if before else segment, first=not before)
        session.check_fits(len(ids), len(before.ids) if before else 0, spare=1 if how.max_tokens else 0)
        requests.append(Request(ids, [] if before else found, True, compress, how.max_tokens, check_stop(how.stop),
                                Sampler(session.model, how, llm_seed), ""))
    if compress and not any(budget and budget[0] for budget in budgets):
        session.check_compress()
    return BatchRequest(requests, budgets, shared)
