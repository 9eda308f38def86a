"""Puts the questions of one context to a model, under one of the two protocols.

question-in:  the context and the question are evaluated, then evicted.
question-out: the context is evaluated and evicted; then each question is asked from that very state.

Either way a context is evaluated once for all its questions, and the text of a prompt is tokenized in these two parts.
"""
import itertools
import tempfile
from pathlib import Path
from typing import Any, Iterator

import pykvc
from pykvc import _core

from .cases import Case
from .items import Item
from .prompts import Prompt

Asked = list[tuple[Item, Prompt]]


def groups(asked: Asked, protocol: str, case: Case) -> list[Asked]:
    """Those that can share an evaluated context, in the order of the first of them."""
    if case.asks or (protocol == "question-in" and case.cells):  # with few cells, the context is evicted before the question is there
        return [[one] for one in asked]
    together: dict[str, Asked] = {}
    for item, prompt in asked:
        together.setdefault(prompt.head or item.id, []).append((item, prompt))
    return list(together.values())


def ask(llm: pykvc.LLM, group: Asked, protocol: str, case: Case, n_threads: int | None = None) -> Iterator[tuple[Item, dict[str, Any]]]:
    """(item, figures and answer), one after the other. prefill_ms and evict_ms of a shared context count in its first row."""
    llm.reset()
    question_in, start, prompt = protocol == "question-in", llm.stats()["n_evictions"], group[0][1]
    n_context = llm.prefill(prompt.head, **_spans(prompt), **_query(prompt, case))
    if case.compresses and not question_in:
        llm.compress()
    stats = llm.stats()
    kept, n_evictions = [int(n) for n in stats["kept"]], stats["n_evictions"] - start
    with Mark(llm, case, again=len(group) > 1) as mark:
        for i, (item, prompt) in enumerate(group):
            if i:
                mark.return_to()
            before = llm.stats()["n_evictions"]
            answer = llm.generate(prompt.tail, spans=(), reset=False, compress=question_in and case.compresses, **_length(item))
            n_prompt = n_context + len(llm.tokenize(prompt.tail, add_special=False))
            yield item, _figures(answer, 0 if question_in else n_context, n_prompt, answer.kv["kept"] if question_in else kept,
                                 n_evictions + llm.stats()["n_evictions"] - before, llm.stats()["cells_allocated"])


def side_by_side(case: Case) -> bool:
    """Can a context of several sequences hold it? Not where layers or heads differ, nor a probe, which is evaluated in the first one."""
    policy = next(p for p in _core.policies() if p["name"] == case.name)
    return not (case.cells or policy["layers_differ"] or policy["heads_differ"] or policy["needs"]["probe"] != "none")


def ask_batch(llm: pykvc.LLM, asked: list[tuple[Item, Prompt, Case]], protocol: str, n_parallel: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, figures and answer) as ask() of several groups, n_parallel questions at once, in the order in which they are done. Cases differ
    in their budgets alone. Neighbours' contexts are evaluated once, and their time is in no row."""
    question_in, i = protocol == "question-in", 0
    while i < len(asked):  # those that may become as long and end alike
        how = _length(asked[i][0])
        part = list(itertools.takewhile(lambda one: _length(one[0]) == how, asked[i:]))
        prompts, several = [prompt for _, prompt, _ in part], [case for _, _, case in part]
        n_tails = [len(llm.tokenize(prompt.tail, add_special=False)) for prompt in prompts]
        n_heads = {head: len(llm.tokenize(head)) for head in {prompt.head for prompt in prompts}}
        answers = llm.generate_batch([prompt.tail for prompt in prompts], prefix=[prompt.head for prompt in prompts], span_unit="chars",
                                     spans=[prompt.spans for prompt in prompts], kv_budget=[case.budget or None for case in several],
                                     kv_decode_budget=[case.decode_budget or None for case in several], compress_prefix=not question_in,
                                     compress=question_in and several[0].compresses, stream=True, **how)
        for j, answer in answers:
            n_context = n_heads[prompts[j].head]
            kept = answer.kv["kept"] if question_in else answer.kv["prefix_kept"]
            figures = _figures(answer, 0 if question_in else n_context, n_context + n_tails[j], kept,
                               answer.kv["prefix_evictions"] + answer.kv["evictions"], llm.stats()["cells_allocated"])
            yield i + j, {**figures, "bytes_allocated": figures["bytes_allocated"]//n_parallel}
        i += len(part)


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


def _figures(answer: pykvc.Generation, n_context: int, n_prompt: int, kept: list[int], n_evictions: int, n_cells: int) -> dict[str, Any]:
    return {"n_context": n_context, "n_prompt": n_prompt, "n_predicted": answer.n_predicted, "kept": kept, "evictions": n_evictions,
            "cells_allocated": n_cells,
            **{name: answer.kv[name] for name in ("bytes_used", "bytes_full", "bytes_allocated")},
            **{name: round(answer.timings[name], 1) for name in ("prefill_ms", "evict_ms", "decode_ms")},
            "stop_reason": answer.stop_reason, "answer": answer.text}
