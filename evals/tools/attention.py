"""The [[attention]] blocks of a study: where the attention of a task's questions goes, and which tokens each policy
leaves.

An item is evaluated with the whole cache. Of the question's last queries (32 at most): the mass on each part of the
prompt, how few tokens hold most of it, and its entropy over log(n), each with and without the first 4 tokens, where
models park attention they do not need. Then the context is evicted under each policy before the question is asked
(question-out), and what is left is counted. A row of figures is saved for each item, and beside it an .npz with what
the pictures show.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

import numpy as np

import pykvc
from pykvc.inspect import N_SINKS, WINDOW, Attention, attention, counts, survivors

from ..cases import Case, cases, exceeds
from ..items import Item, Options
from ..prompts import Prompt, count, render
from ..settings import SETTINGS, Only, sweep, texts
from ..store import Row, Rows, key
from ..tasks import settings_of, task, usual_settings
from ..work import N_SPARE, Subject, commit, open_model

N_ROWS = 64   # of a heat map
N_GRID = 200  # points of a cumulative curve
N_DEFAULT = 4

Watch = Callable[[int, str], None]


@dataclass(frozen=True)
class View:
    """One item to look at."""
    task: str
    item: Item
    settings: Row
    cases: list[Case]
    seed: int
    chat: bool

    def key_row(self) -> Row:
        return {"task": self.task, "item": self.item.id, "protocol": "attention",
                "policy": " ".join(case.policy for case in self.cases),
                "budget": " ".join(dict.fromkeys(case.budget for case in self.cases)), "decode_budget": "", "cells": "",
                "type_k": "f16", "type_v": "f16",
                "n_ubatch": 512, "chat": self.chat and self.item.chat, "seed": self.seed}


def views(blocks: Sequence[Row], subject: Subject, only: Only, data_dir: Path | None, n: int | None, usual: int | None,
          chat: bool) -> list[View]:
    """Of all blocks. n: what the command line says, usual: the study. ValueError names what is valid."""
    found = []
    for block in blocks:
        for one in sweep(block, SETTINGS):
            names = [name for name in texts(one.get("task", [])) if task(name)]
            if not names:
                raise ValueError("[[attention]] names no task")
            given = settings_of(names, {name: one[name] for name in SETTINGS if name in one})
            chosen = cases(texts(one.get("policy", ["full"])), texts(one.get("budget", ["none"])), ["none"], ["none"],
                           ["f16"], ["f16"])
            chosen = [case for case in chosen if case.name != "full" and only.case(case.policy, case.budget)]
            in_chat, seed = chat and not one.get("plain", False), one.get("seed", 0)
            for name in names if not only.tasks else [name for name in names if name in only.tasks]:
                # no code is run
                settings = {**usual_settings(name, given[name]), **given[name]}
                settings |= {"unsafe_code": True} if name == "humaneval" else {}
                items = task(name).load(Options(lambda text: count(subject.vocabulary, text), data_dir,
                                                n or one.get("n") or usual or N_DEFAULT, seed, in_chat, settings))
                found += [View(name, item, settings, chosen, seed, in_chat) for item in items]
    return found


def run(todo: Sequence[View], model: str | None, out: Path, n_threads: int | None, n_gpu_layers: int, any_commit: bool,
        size: Callable[[int], None], watch: Watch) -> list[str]:
    """Looks at what the folder does not hold yet; returns what went wrong, in sentences: an item that fails is no other
    item's end."""
    size(len(todo))
    subject, problems = open_model(model), []
    identity = {"model": subject.name, "model_sha256": subject.sha256, "commit": commit()}
    with Rows(out/f"{subject.name}.attention.jsonl") as rows:
        rows.check(identity, any_commit)
        if any(key(view.key_row()) not in rows.rows for view in todo):
            subject.hold(n_gpu_layers)
        for view in todo:
            watch(0, f"attention: {view.task}")
            if key(view.key_row()) not in rows.rows:
                try:
                    figures, arrays = look(view, subject, n_threads, n_gpu_layers)
                except Exception as error:
                    problems.append(f"attention of {view.task}, {view.item.id}: {type(error).__name__}: {error}")
                    continue
                path = out/"attention"/f"{subject.name}-{view.task}-{len(rows.rows)}.npz"
                path.parent.mkdir(exist_ok=True)
                np.savez_compressed(path, **arrays)
                rows.append({**view.key_row(), **identity, "settings": view.settings, "tags": view.item.tags, **figures,
                             "arrays": str(path.relative_to(out))})
            watch(1, f"attention: {view.task}")
            problems += _not_evicted(view, rows.rows[key(view.key_row())])
    return problems


def _not_evicted(view: View, row: Row) -> list[str]:
    """Budgets that the context exceeds, and yet nothing was evicted: what always stays was all of it."""
    return [f"attention of {view.task}, {view.item.id}: {_name(case)} evicted nothing of {row['n_context']} tokens"
            for case in view.cases if "evictions" in row and not row["evictions"][_name(case)]
            and exceeds(row["n_context"], case.budget)]


def look(view: View, subject: Subject, n_threads: int | None = None,
         n_gpu_layers: int = 0) -> tuple[Row, dict[str, np.ndarray]]:
    """(figures, arrays for the pictures) of one item."""
    prompt = render(view.item, subject.vocabulary, view.chat)
    n_ctx = count(subject.vocabulary, prompt.head) + count(subject.vocabulary, prompt.tail) + N_SPARE
    if n_ctx > subject.n_ctx_train:
        raise ValueError(f"{view.task} needs a context of {n_ctx} tokens, {subject.name} was trained for "
                         f"{subject.n_ctx_train}")
    how = dict(model=subject.path, n_ctx=n_ctx, n_threads=n_threads, n_gpu_layers=n_gpu_layers)
    n_question = count(subject.vocabulary, prompt.tail)
    # [n_layer, n_head, n]
    tokens, attn = attention(prompt.head, prompt.tail, window=max(1, min(WINDOW, n_question)), **how)
    n = len(tokens)
    kept: dict[str, np.ndarray] = {}
    evictions: Row = {}
    for case in view.cases:
        llm, found = survivors(prompt.head, prompt.tail, spans=prompt.spans, span_unit="chars",
                               kv_query=prompt.query if case.asks else None,
                               **{**how, "n_ctx": n_ctx + case.n_probe(512)},
                               **{**case.settings(), "kv_decode_budget": None})
        evictions[_name(case)] = llm.stats()["n_evictions"]
        llm.close()
        # [n_layer, n] share of heads
        kept[_name(case)] = np.stack([counts(layer, n).mean(axis=0) for layer in found]).astype(np.float16)
    parts = _parts(prompt, view.item, tokens, n - n_question, subject)
    heat, step = heat_map(tokens, how)
    bare = _without_sinks(attn)
    figures = {"n_tokens": n, "n_context": n - n_question, "evictions": evictions, "parts": parts, "step": step,
               "n_query": min(WINDOW, n_question),
               **{f"mass{end}": {name: float(a[..., begin:stop].sum(axis=-1).mean()) for name, begin, stop in parts}
                  for end, a in (("", attn), ("_bare", bare))},
               "sinks": float(attn[..., :N_SINKS].sum(axis=-1).mean()), "entropy": float(entropy(attn).mean()),
               "entropy_bare": float(entropy(bare).mean()),
               "tokens_90": float(share_of_tokens(attn).mean()), "tokens_90_bare": float(share_of_tokens(bare).mean()),
               "kept": {name: {part: float(share[:, begin:stop].mean()) for part, begin, stop in parts if stop > begin}
                        for name, share in kept.items()}}
    arrays = {"heat": heat, "entropy": entropy(attn).mean(axis=1), "entropy_bare": entropy(bare).mean(axis=1),
              "cumulative": cumulative(attn),
              "cumulative_bare": cumulative(bare), **{f"kept {name}": share for name, share in kept.items()}}
    return figures, arrays


def _name(case: Case) -> str:
    return f"{case.name} {case.budget}"


def _parts(prompt: Prompt, item: Item, tokens: list[int], n_head: int, subject: Subject) -> list[tuple[str, int, int]]:
    """(name, begin, end) in tokens: what is before the spans, the spans, what is between them and the question, the
    question."""
    from pykvc.spans import token_lengths, token_spans
    pieces = [subject.vocabulary.piece(token, True) for token in tokens[:n_head]]
    spans = token_spans(prompt.head, prompt.spans, token_lengths(prompt.head.encode(), pieces)) if prompt.spans else []
    begin, end = (spans[0][0], spans[-1][1]) if spans else (n_head, n_head)
    parts = [("system", 0, begin), ("shots" if item.shots else "context", begin, end), ("rest", end, n_head),
             ("question", n_head, len(tokens))]
    return [part for part in parts if part[1] < part[2]]


def heat_map(tokens: list[int], how: Row) -> tuple[np.ndarray, int]:
    """(F16 [n_rows, n_tokens], tokens of a row): the attention of each `step` queries, mean over layers and heads."""
    step = max(1, -(-len(tokens)//N_ROWS))
    policy = Attention(step)
    rows = []
    with pykvc.LLM(**how, kv_policy=policy, kv_budget="100%") as llm:
        for i in range(0, len(tokens), step):
            llm.prefill(tokens=tokens[i:i + step], spans=())
            policy.seen.clear()
            llm.scores()
            mean = np.mean([layer.mean(axis=0) for layer in policy.seen], axis=0)
            rows.append(np.pad(mean, (0, len(tokens) - len(mean))))
    return np.stack(rows).astype(np.float16), step


# -- figures: a [..., n] is a distribution over tokens --------------------------------------------------------------

def _without_sinks(a: np.ndarray) -> np.ndarray:
    rest = a.copy()
    rest[..., :N_SINKS] = 0
    return rest/np.maximum(rest.sum(axis=-1, keepdims=True), 1e-12)


def entropy(a: np.ndarray) -> np.ndarray:
    """[...] of the distribution over log(n): 1 if it is even, 0 if it is one token."""
    return -(a*np.log(np.maximum(a, 1e-30))).sum(axis=-1)/np.log(a.shape[-1])


def cumulative(a: np.ndarray) -> np.ndarray:
    """[N_GRID + 1] mean mass on the share i/N_GRID of tokens that have most of it, each head's own."""
    sums = np.concatenate([np.zeros((*a.shape[:-1], 1)), np.cumsum(-np.sort(-a, axis=-1), axis=-1)],
                          axis=-1).reshape(-1, a.shape[-1] + 1)
    return np.interp(np.linspace(0, a.shape[-1], N_GRID + 1), np.arange(a.shape[-1] + 1), sums.mean(axis=0))


def share_of_tokens(a: np.ndarray, mass: float = 0.9) -> np.ndarray:
    """[...] the smallest share of tokens that has so much of the mass."""
    sums = np.cumsum(-np.sort(-a, axis=-1), axis=-1)
    return ((sums < mass*sums[..., -1:]).sum(axis=-1) + 1)/a.shape[-1]
