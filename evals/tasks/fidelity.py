"""How far the next token's distribution moves: KL divergence from the whole cache, and how often both have the same
first choice.

Teacher-forced: a context is evaluated and evicted, a question follows, and then --tokens tokens of an answer, whatever
the model would have said; a --decode-budget evicts them as if it had. Before each of them its distribution is compared
with that of a cache that keeps everything. --of prose: any text, in niah/haystack/*.txt of the data folder; --length
tokens of it are the context, a sentence or two the question, what follows the answer. --of TASK: the contexts and
questions of that task, with its settings, and as the answer what the whole cache answers. --reference
same: the whole cache of the same types; f16: of that, so that the loss by quantized types counts, too. The score is the
share of equal first choices; KL is in nats, a mean over tokens.
"""
import itertools
import json
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, Iterator, Sequence

import numpy as np
from scipy.special import log_softmax

import pykvc
from pykvc.spans import sentence_spans

from .. import store
from ..ask import Asked, allocated, contexts, evict, ms
from ..items import Item, Options
from ..prompts import Prompt
from . import registry
from .niah import haystacks
from .registry import TASKS

SETTINGS = {"length": 2000, "tokens": 64, "of": "prose", "reference": "same"}
N_QUESTION = 32  # tokens at least
N_DEFAULT = 16
SPARE = 64       # cells beyond those of `tokens`


def load(options: Options) -> list[Item]:
    if options["reference"] not in ("same", "f16"):
        raise ValueError(f"--reference is same (the cache types of the case) or f16, not {options['reference']!r}")
    items = _prose(options) if options["of"] == "prose" else _of_task(options)
    return [replace(item, id=f"{item.id}/f16") for item in items] if options["reference"] == "f16" else items


def _of_task(options: Options) -> list[Item]:
    name, others = options["of"], [name for name in TASKS if name != "fidelity"]
    if name not in others:
        raise ValueError(f"--of is prose, or a task: {', '.join(others)}, not {name!r}")
    settings = {key: options.settings.get(key, value) for key, value in TASKS[name].SETTINGS.items()}
    settings |= {"unsafe_code": True} if name == "humaneval" else {}  # no code is run
    items = TASKS[name].load(replace(options, n=options.n or N_DEFAULT, settings=settings))
    return [replace(item, id=f"{name}:{item.id}/{options['tokens']}", gold="", stop=(),
                    max_tokens=options["tokens"] + SPARE) for item in items]


def _prose(options: Options) -> list[Item]:
    texts = [_chunks(path.read_text(encoding="utf-8"), path.stem, options) for path in haystacks("fidelity", options)]
    items = [item for of_round in zip(*texts) for item in of_round][:options.n or N_DEFAULT]
    if not items:
        raise ValueError(f"the texts are shorter than --length {options['length']} tokens")
    return items


def _chunks(text: str, name: str, options: Options) -> Iterator[Item]:
    lengths = (options["length"], N_QUESTION, options["tokens"] + 8)
    parts, tokens, begin = [], 0, 0
    for a, b in sentence_spans(text):
        tokens += options.count(text[a:b])
        if tokens >= lengths[len(parts)]:
            parts.append(text[begin:b])
            tokens, begin = 0, b
        if len(parts) == 3:
            yield Item(id=f"{name}/{options['length']}/{options['tokens']}/{begin}", context=parts[0],
                       question=parts[1], query="", chat=False, gold=parts[2], max_tokens=options["tokens"] + SPARE)
            parts = []


def unit(item: str, tags: dict) -> str:
    """--of TASK: that task's, whatever --tokens and --reference. Prose: the passage. Another --length or --tokens cuts
    passages that overlap with these, so do not pool several of them in one line."""
    item = item.removesuffix("/f16")
    name, _, asked = item.partition(":")
    return f"{name}:{registry.unit(name, asked.rpartition('/')[0], tags)}" if name in TASKS else item


def draw(item: str, tags: dict) -> str:
    """That of the task it asks."""
    name, _, asked = item.removesuffix("/f16").partition(":")
    return registry.draw(name, asked.rpartition("/")[0], tags) if name in TASKS else ""


# -- what is compared with ---------------------------------------------------------------------------------------

Types = tuple[str, str]                 # of K and V
# an answer's tokens; log probabilities F32 [max(1, n_tokens), n_vocab], in a file
Reference = tuple[list[int], np.ndarray]
N_AT_ONCE = 64                          # rows of a vocabulary: a long answer's are gigabytes as doubles


class References:
    """What the whole cache says, which is compared with: an answer, and before each of its tokens the probabilities of
    all. As long as this process lives, in files that go with it."""

    def __init__(self) -> None:
        self.known: dict[tuple, Reference] = {}

    @cached_property
    def folder(self) -> "tempfile.TemporaryDirectory[str]":
        return tempfile.TemporaryDirectory(prefix="pykvc-fidelity-")

    def of(self, llm: pykvc.LLM, asked: Sequence[Asked], types: Types, n_tokens: int, how: dict[str, Any],
           out: Path | None) -> dict[str, Reference]:
        """By item. Neighbours with one context evaluate it once. out: answers are kept there, so that a run that goes
        on has the same."""
        keys = {item.id: (str(llm.path), item.id, prompt.digest, types, *how.values()) for item, prompt, _ in asked}
        missing = {item.id: (item, prompt) for item, prompt, _ in asked if keys[item.id] not in self.known}
        if missing:
            with pykvc.LLM(llm.path, n_ctx=llm.n_ctx, type_k=types[0], type_v=types[1], **how) as full:
                for head, of_head in itertools.groupby(missing.values(), key=lambda one: one[1].head):
                    full.reset()
                    n_head = full.prefill(head) if head else 0
                    for item, prompt in of_head:
                        full.truncate(n_head)
                        full.prefill(prompt.tail)
                        first, ids = full.logits(), _answer(full, item, prompt, types, n_tokens, out)
                        self.known[keys[item.id]] = ids, self._saved(first, full.evaluate(ids[:-1]))
        return {item: self.known[key] for item, key in keys.items()}

    def _saved(self, first: np.ndarray, rest: np.ndarray) -> np.ndarray:
        path = Path(self.folder.name)/f"{len(self.known)}.npy"
        array = np.lib.format.open_memmap(path, "w+", np.float32, (1 + len(rest), len(first)))
        end = 0
        for part in log_probabilities(first, rest):
            array[end:(end := end + len(part))] = part
        array.flush()
        return np.load(path, mmap_mode="r")


def _answer(full: pykvc.LLM, item: Item, prompt: Prompt, types: Types, n: int, out: Path | None) -> list[int]:
    """From the end of its prompt, and back there."""
    n_prompt = full.n_tokens
    if item.gold:
        return full.tokenize(item.gold, add_special=False)[:n]
    with store.Rows(out/f"{full.path.stem}.references.jsonl") if out else nullcontext() as kept:
        row = {**dict.fromkeys(store.KEY, ""), "item": item.id, "type_k": types[0], "type_v": types[1],
               "prompt": prompt.digest}
        known = kept.rows.get(store.key(row)) if kept else None
        if known and known["prompt"] == prompt.digest:
            return known["tokens"]
        ids = full.generate(reset=False, max_tokens=n).tokens
        full.truncate(n_prompt)
        if kept:
            kept.append({**row, "tokens": ids})
        return ids


def log_probabilities(first: np.ndarray, rest: np.ndarray) -> Iterator[np.ndarray]:
    """Of logits [n_vocab] and [n, n_vocab], one after the other, some at once: F32 [<= N_AT_ONCE, n_vocab]."""
    for part in (first[None], *(rest[a:a + N_AT_ONCE] for a in range(0, len(rest), N_AT_ONCE))):
        yield log_softmax(part.astype(np.float64), axis=1).astype(np.float32)


# -- in place of answers --------------------------------------------------------------------------------------------

REFERENCES = References()


def ask(llm: pykvc.LLM, asked: Sequence[Asked], protocol: str, how: dict[str, Any],
        out: Path | None = None) -> Iterator[tuple[Item, dict[str, Any]]]:
    """For each token the KL divergence and whether the first choice is the same, as JSON. As evals/ask.py evaluates and
    evicts. how: Plan.how, for the whole cache. out: what that answers is kept there, so that a run that goes on,
    perhaps elsewhere, has the same answers."""
    item, _, case = asked[0]
    types = ("f16", "f16") if item.id.endswith("/f16") else (case.type_k, case.type_v)
    # not while ours is timed
    references = REFERENCES.of(llm, asked, types, item.max_tokens - SPARE, how, out)
    for case, item, prompt, before in contexts(llm, asked, protocol):
        begin = perf_counter()
        n_prompt, first = before.n_tokens + llm.prefill(prompt.tail, spans=()), llm.logits()
        prefill_ms, kept, n_evictions, evict_ms = before.prefill_ms + ms(begin), before.kept, 0, before.evict_ms
        if protocol == "question-in":
            kept, n_evictions, evict_ms = evict(llm, case)
        n_before = llm.stats()["n_evictions"]
        figures = _compare(llm, references[item.id], first) | {"bytes_allocated": allocated(llm, case)}
        yield item, {"n_context": before.n_tokens*(protocol == "question-out"), "n_prompt": n_prompt, "kept": kept,
                     "evictions": before.n_evictions + n_evictions + llm.stats()["n_evictions"] - n_before,
                     "prefill_ms": round(prefill_ms, 1), "evict_ms": evict_ms, **figures}


def _compare(llm: pykvc.LLM, reference: Reference, first: np.ndarray) -> dict[str, Any]:
    (ids, theirs), begin = reference, perf_counter()
    kl, same = [], []
    for q in log_probabilities(first, llm.evaluate(ids[:-1], generated=True)):
        p = theirs[len(kl):len(kl) + len(q)]
        kl += [round(float(x), 6) for x in np.maximum(0, (np.exp(p)*(p - q)).sum(axis=1))]
        same += [int(x) for x in p.argmax(axis=1) == q.argmax(axis=1)]
    stats = llm.stats()
    return {"n_predicted": len(kl),
            **{name: stats[name] for name in ("cells_allocated", "bytes_used", "bytes_full")},
            "decode_ms": ms(begin), "stop_reason": "length", "answer": json.dumps({"kl": kl, "same": same})}


def score(item: Item, answer: str) -> float:
    same = json.loads(answer)["same"] if answer else []
    return sum(same)/len(same) if same else 0.0


def extra(answer: str) -> dict[str, float]:
    """More columns of the report."""
    return {"kl": float(np.mean(json.loads(answer)["kl"]))}


def parts(answer: str, n: int) -> list[str]:
    """An answer's tokens in n parts of about one length, in order, without empty ones."""
    figures = json.loads(answer)
    cuts = [round(i*len(figures["kl"])/n) for i in range(n + 1)]
    return [json.dumps({name: of[a:b] for name, of in figures.items()}) for a, b in zip(cuts, cuts[1:]) if b > a]
