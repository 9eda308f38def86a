"""Puts the questions of one context to a model, under one of the two protocols.

question-in (query-aware):     the context and the question are evaluated, then evicted.
question-out (query-agnostic): the context is evaluated and evicted; then each question is asked from that very state.

Either way a context is evaluated once for all its questions and all budgets of a policy, and the text of a prompt is
tokenized in these two parts. With question-out that evaluation serves other policies, too (Case.serves), and kvzip's
repetition all its shares.
"""
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Iterable, Iterator, Sequence

import pykvc
from pykvc import options
from pykvc.context import Context

from .cases import Case
from .items import Item
from .prompts import Prompt

Asked = tuple[Item, Prompt, Case]


def shared(item: Item, prompt: Prompt, case: Case, protocol: str) -> str:
    """Questions that have this in common can share an evaluated context."""
    # with few cells, the context is evicted before the question is there
    if case.asks or (protocol == "question-in" and case.cells):
        return item.id
    return prompt.head or item.id


def ask(llm: pykvc.LLM, asked: Sequence[Asked], protocol: str, how: dict[str, Any] | None = None,
        out: Path | None = None) -> Iterator[tuple[Item, dict[str, Any]]]:
    """(item, figures and answer), one after the other, of one context. Cases follow one another; they differ in their
    budgets, with question-out in their policies, too. prefill_ms of the context counts in the first row, evict_ms in
    the first of each case."""
    question_in = protocol == "question-in"
    for case, item, prompt, before in contexts(llm, asked, protocol):
        n_before = llm.stats()["n_evictions"]
        compressed = not question_in and case.compresses  # its context was, to the budgets
        answer = llm.generate(prompt.tail, spans=(), reset=False, compress=question_in and case.compresses,
                              **({} if compressed else case.budgets), **_length(item))
        n_prompt = before.n_tokens + len(llm.tokenize(prompt.tail, add_special=False))
        yield item, _figures(answer, 0 if question_in else before.n_tokens, n_prompt,
                             answer.kv["kept"] if question_in else before.kept,
                             before.n_evictions + llm.stats()["n_evictions"] - n_before, llm.stats()["cells_allocated"]
                             ) | {"bytes_allocated": allocated(llm, case)}


@dataclass(frozen=True)
class Before:
    """What stands before a question."""
    n_tokens: int
    kept: list[int]             # [n_layer]
    n_evictions: int
    prefill_ms: float
    evict_ms: float


def contexts(llm: pykvc.LLM, asked: Sequence[Asked], protocol: str) -> Iterator[tuple[Case, Item, Prompt, Before]]:
    """For each question leaves `llm` at the end of its context: evaluated once, evicted (question-out) once for each
    case."""
    llm.reset()
    (_, prompt, case), begin, start = asked[0], perf_counter(), llm.stats()["n_evictions"]
    spans = dict(spans=prompt.spans, span_unit="chars") if prompt.spans else {}
    query = dict(kv_query=prompt.query) if case.asks else {}
    n_tokens = llm.prefill(prompt.head, **spans, **query) if prompt.head else 0
    prefill_ms, n_before = ms(begin), llm.stats()["n_evictions"] - start
    context = Context(llm, n_tokens)
    for k, (case, of_case) in enumerate(itertools.groupby(asked, key=lambda one: one[2])):
        n_evictions, work, spent = llm.stats()["n_evictions"], llm._session.work, _spent_ms(llm)
        if evicts := protocol == "question-out" and case.compresses:
            context.compress(case.policy if case.policy != llm.policy else None, case.budget or None,
                             case.decode_budget or None)
        elif k:
            context.go_back(to_evict=True)
        spent = _spent_ms(llm) - spent*(llm._session.work is work)  # to go back is to count anew
        before = Before(n_tokens, context.kept, n_before + evicts*(llm.stats()["n_evictions"] - n_evictions),
                        prefill_ms*(k == 0), evicts*round(spent, 1))
        for i, (item, prompt, _) in enumerate(of_case):
            if i:
                context.go_back(to_evict=protocol == "question-in")
                before = replace(before, prefill_ms=0.0, evict_ms=0.0)
            yield case, item, prompt, before


def evict(llm: pykvc.LLM, case: Case) -> tuple[list[int], int, float]:
    """(cells a layer has now, evictions, ms)"""
    begin, before = perf_counter(), llm.stats()["n_evictions"]
    if case.compresses:
        llm.compress(**case.budgets)
    stats = llm.stats()
    return [int(n) for n in stats["kept"]], stats["n_evictions"] - before, ms(begin)


def allocated(llm: pykvc.LLM, case: Case) -> int:
    """Bytes of a context of the case's own policy: of another one that serves it the window of queries is longer."""
    stats, (has, own) = llm.stats(), (options.needs(policy)["window"] for policy in (llm.policy, case.policy))
    return stats["bytes_allocated"] - (stats["bytes_signals"]*(has - own)//has if has else 0)


def _spent_ms(llm: pykvc.LLM) -> float:
    """With evictions and what is asked for them, since the last answer."""
    return llm._session.work.evict_ms + llm._session.work.probe_ms


def ms(begin: float) -> float:
    """Since perf_counter() was `begin`."""
    return round(1e3*(perf_counter() - begin), 1)


def together(cases: Iterable[Case]) -> bool:
    """Can they be asked in one context of several sequences? Its sequences have one policy."""
    several = set(cases)
    return len({case.policy for case in several}) == 1 and all(map(side_by_side, several))


def side_by_side(case: Case) -> bool:
    """Not with kv_cells, nor a probe, which is evaluated in the first sequence."""
    return not (case.cells or case.probes)


def ask_batch(llm: pykvc.LLM, asked: Sequence[Asked], protocol: str,
              n_parallel: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, figures and answer) as ask() of several groups, n_parallel questions at once, in the order in which they
    are done. Cases differ in their budgets alone. Neighbours' contexts are evaluated once, and their time is in no
    row."""
    question_in, i = protocol == "question-in", 0
    while i < len(asked):  # those that may become as long and end alike
        how = _length(asked[i][0])
        part = list(itertools.takewhile(lambda one, how=how: _length(one[0]) == how, asked[i:]))
        prompts, several = [prompt for _, prompt, _ in part], [case for _, _, case in part]
        n_tails = [len(llm.tokenize(prompt.tail, add_special=False)) for prompt in prompts]
        n_heads = {head: len(llm.tokenize(head)) if head else 0 for head in {prompt.head for prompt in prompts}}
        answers = llm.generate_batch([prompt.tail for prompt in prompts],
                                     prefix=[prompt.head or None for prompt in prompts], span_unit="chars",
                                     spans=[prompt.spans for prompt in prompts],
                                     kv_budget=[case.budget or None for case in several],
                                     kv_decode_budget=[case.decode_budget or None for case in several],
                                     compress_prefix=not question_in,
                                     compress=question_in and several[0].compresses, stream=True, **how)
        for j, answer in answers:
            n_context = n_heads[prompts[j].head]
            kept = answer.kv["kept" if question_in or not n_context else "prefix_kept"]
            figures = _figures(answer, 0 if question_in else n_context, n_context + n_tails[j], kept,
                               answer.kv.get("prefix_evictions", 0) + answer.kv["evictions"],
                               llm.stats()["cells_allocated"])
            yield i + j, {**figures, "bytes_allocated": figures["bytes_allocated"]//n_parallel}
        i += len(part)


def _length(item: Item) -> dict[str, Any]:
    return dict(max_tokens=item.max_tokens, stop=list(item.stop))


def _figures(answer: pykvc.Generation, n_context: int, n_prompt: int, kept: list[int], n_evictions: int,
             n_cells: int) -> dict[str, Any]:
    return {"n_context": n_context, "n_prompt": n_prompt, "n_predicted": answer.n_predicted, "kept": kept,
            "evictions": n_evictions, "cells_allocated": n_cells,
            **{name: answer.kv[name] for name in ("bytes_used", "bytes_full", "bytes_allocated")},
            **{name: round(answer.timings[name], 1) for name in ("prefill_ms", "evict_ms", "decode_ms")},
            "stop_reason": answer.stop_reason, "answer": answer.text}
