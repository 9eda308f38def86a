"""What the whole cache says, which fidelity compares with: an answer, and before each of its tokens the probabilities
of all."""
import tempfile
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np
from scipy.special import log_softmax

import pykvc

from .ask import Asked
from .items import Item
from .prompts import Prompt
from .store import KEY, Rows
from .store import key as key_of

Types = tuple[str, str]                 # of K and V
# an answer's tokens; log probabilities F32 [max(1, n_tokens), n_vocab], in a file
Reference = tuple[list[int], np.ndarray]
N_AT_ONCE = 64                          # rows of a vocabulary: a long answer's are gigabytes as doubles


class References:
    """As long as this process lives, in files that go with it: every case is compared with them."""

    def __init__(self) -> None:
        self.known: dict[tuple, Reference] = {}

    @cached_property
    def folder(self) -> "tempfile.TemporaryDirectory[str]":
        return tempfile.TemporaryDirectory(prefix="pykvc-fidelity-")

    def of(self, llm: pykvc.LLM, asked: Sequence[Asked], types: Types, n_tokens: int, n_threads: int | None,
           out: Path | None) -> dict[str, Reference]:
        """By item. Neighbours with one context evaluate it once. out: answers are kept there, so that a run that goes
        on has the same."""
        keys = {item.id: (str(llm.path), item.id, prompt.digest, types) for item, prompt, _ in asked}
        missing = {item.id: (item, prompt) for item, prompt, _ in asked if keys[item.id] not in self.known}
        if missing:
            with pykvc.LLM(llm.path, n_ctx=llm.n_ctx, n_threads=n_threads, type_k=types[0], type_v=types[1]) as full:
                for item, prompt in _in_turn(full, list(missing.values())):
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


def _in_turn(full: pykvc.LLM, wanted: Sequence[tuple[Item, Prompt]]) -> Iterator[tuple[Item, Prompt]]:
    """Leaves `full` at the end of each prompt."""
    head, n_head = None, 0
    for item, prompt in wanted:
        if prompt.head != head:
            full.reset()
            head, n_head = prompt.head, full.prefill(prompt.head) if prompt.head else 0
        full.truncate(n_head)
        full.prefill(prompt.tail)
        yield item, prompt


def _answer(full: pykvc.LLM, item: Item, prompt: Prompt, types: Types, n: int, out: Path | None) -> list[int]:
    """From the end of its prompt, and back there."""
    n_prompt = full.n_tokens
    if item.gold:
        return full.tokenize(item.gold, add_special=False)[:n]
    with Rows(out/f"{full.path.stem}.references.jsonl") if out else nullcontext() as kept:
        row = {**dict.fromkeys(KEY, ""), "item": item.id, "type_k": types[0], "type_v": types[1],
               "prompt": prompt.digest}
        known = kept.rows.get(key_of(row)) if kept else None
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
