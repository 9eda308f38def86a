"""Puts the questions of one context to a model, under one of the two protocols.

question-in:  the context and the question are evaluated, then evicted. Each question is a prefill of its own.
question-out: the context is evaluated and evicted; then each question is asked from that very state.
"""
import tempfile
from pathlib import Path
from typing import Any, Iterator

import pykvc

from .cases import Case
from .items import Item
from .prompts import Prompt

Asked = list[tuple[Item, Prompt]]


def groups(asked: Asked, protocol: str, case: Case) -> list[Asked]:
    """Those that can share a compressed context, in the order of the first of them."""
    if protocol == "question-in" or case.asks:
        return [[one] for one in asked]
    together: dict[str, Asked] = {}
    for item, prompt in asked:
        together.setdefault(prompt.head or item.id, []).append((item, prompt))
    return list(together.values())


def ask(llm: pykvc.LLM, group: Asked, protocol: str, case: Case, n_threads: int | None = None) -> Iterator[tuple[Item, dict[str, Any]]]:
    """(item, figures and answer), one after the other. prefill_ms and evict_ms of a shared context count in its first row."""
    if protocol == "question-in":
        for item, prompt in group:
            llm.reset()
            before = llm.stats()["n_evictions"]
            n_prompt = len(llm.tokenize(prompt.head + prompt.tail))
            answer = llm.generate(prompt.head + prompt.tail, **_spans(prompt), **_query(prompt, case), **_length(item))
            yield item, _figures(llm, answer, 0, n_prompt, answer.kv["kept"], llm.stats()["n_evictions"] - before)
        return

    llm.reset()
    before, prompt = llm.stats()["n_evictions"], group[0][1]
    n_context = llm.prefill(prompt.head, **_spans(prompt), **_query(prompt, case))
    if case.compresses:
        llm.compress()
    stats = llm.stats()
    kept, n_evictions = [int(n) for n in stats["kept"]], stats["n_evictions"] - before
    with Mark(llm, case, again=len(group) > 1) as mark:
        for i, (item, prompt) in enumerate(group):
            if i:
                mark.return_to()
            before = llm.stats()["n_evictions"]
            answer = llm.generate(prompt.tail, reset=False, compress=False, **_length(item))
            n_prompt = n_context + len(llm.tokenize(prompt.tail, add_special=False))
            yield item, _figures(llm, answer, n_context, n_prompt, kept, n_evictions + llm.stats()["n_evictions"] - before)


class Mark:
    """A state to come back to. What was evicted since, or added to sums, is only undone by a file; a whole cache is cut."""

    def __init__(self, llm: pykvc.LLM, case: Case, again: bool) -> None:
        self.llm, self.n_tokens = llm, llm.n_tokens
        self.folder = tempfile.TemporaryDirectory(prefix="pykvc-evals-") if again and case.name != "full" else None
        if self.folder:
            llm.save(Path(self.folder.name)/"state")

    def return_to(self) -> None:
        if self.folder:
            self.llm.load(Path(self.folder.name)/"state")
        else:
            self.llm.truncate(self.n_tokens)

    def __enter__(self) -> "Mark":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.folder:
            self.folder.cleanup()


def _spans(prompt: Prompt) -> dict[str, Any]:
    return dict(spans=prompt.spans, span_unit="chars") if prompt.spans else {}


def _query(prompt: Prompt, case: Case) -> dict[str, str]:
    return dict(kv_query=prompt.query) if case.asks else {}


def _length(item: Item) -> dict[str, Any]:
    return dict(max_tokens=item.max_tokens, stop=list(item.stop))


def _figures(llm: pykvc.LLM, answer: pykvc.Generation, n_context: int, n_prompt: int, kept: list[int], n_evictions: int) -> dict[str, Any]:
    return {"n_context": n_context, "n_prompt": n_prompt, "n_predicted": answer.n_predicted, "kept": kept, "evictions": n_evictions,
            "cells_allocated": llm.stats()["cells_allocated"],
            **{name: answer.kv[name] for name in ("bytes_used", "bytes_full", "bytes_allocated")},
            **{name: round(answer.timings[name], 1) for name in ("prefill_ms", "evict_ms", "decode_ms")},
            "stop_reason": answer.stop_reason, "answer": answer.text}
