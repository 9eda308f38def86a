"""What one conversation holds: the tokens that were evaluated, and what llama.cpp's cache kept of them.

`tokens` and the cache never disagree: whatever interrupts a call, afterwards tokens[i] is the token at position i.
"""
import sys
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Callable, Iterator

import numpy as np

from . import _core, state
from .chat import Message
from .policy import F32
from .probe import Probe
from .sampling import Sampler
from .spans import Span
from .turns import Turns

N_ANSWER = 32  # tokens of an answer between two evictions of a policy that asks, at least


@dataclass(frozen=True)
class Snapshot:
    """What a session is at a moment."""
    about: dict[str, Any]   # tokens, pending, spans, ...: what the header of a file holds
    logits: F32 | None      # [n_vocab] of the last token
    cells: bytes | None     # llama.cpp's state; None: the cache is not in it
    own: tuple[str, str, str] = ("", "", "")  # policy, kv_budget, kv_decode_budget instead of the context's; a file has none
    n_prompt: int = -1      # tokens when the last prompt ended, -1: it has not


@dataclass
class Work:
    """What was done for the next answer so far."""
    n_prompt: int = 0
    prefill_ms: float = 0.0
    evict_ms: float = 0.0
    probe_ms: float = 0.0
    n_before: int = 0  # evictions of the context before it


class Session:
    """Sequence 0 of a context. setup: what a saved state must have the same of."""

    def __init__(self, model: "_core.Model", ctx: "_core.Context", setup: dict[str, Any], evicts: bool, needs_spans: bool,
                 probe: str, window: int, chunk: int, turns: Turns | None = None) -> None:
        self.model, self.ctx, self.setup, self.evicts, self.needs_spans = model, ctx, setup, evicts, needs_spans
        self.turns = turns or Turns()
        self.in_batch = False  # sequences hold what a batch has evaluated
        self._n_fresh = 0  # how often the cache was emptied or replaced
        self.n_cuts = 0    # and how often a tail was cut off
        self.progress: Callable[[int, int], None] | None = None  # told (tokens done, tokens in all) of a prompt
        self.tell: Callable[[str], None] = _tell  # what should not be silent, a sentence
        self._told = False
        self.probe = Probe(probe, window, chunk, self)
        self._forget()

    def _forget(self) -> None:
        self.tokens: list[int] = []           # evaluated, by position
        self.pending: int | None = None       # sampled, to be evaluated first
        self.spans: list[Span] = []           # by position
        self.query: list[int] = []            # what a policy that asks is given
        self.chat: list[Message] = []         # whose prompt ended last
        self.own = ("", "", "")               # policy, kv_budget, kv_decode_budget instead of the context's
        self.n_probed = 0                     # tokens that have repeated themselves
        self.probe.reset()
        self.compressed = False               # since the last clear()
        self.by_hand = False                  # and by the caller: what comes after is asked of it (question-out)
        self.unended = False                  # a prompt is being evaluated, its end has not come
        self.kept: list[int] = []             # [n_layer] cells when decoding began
        self.work = self.new_work()
        self._n_prompt = -1                   # tokens when the last prompt ended, -1: it has not
        self._fresh = False                   # the context has the logits of the last token
        self._logits: F32 | None = None       # [n_vocab], from a file

    def new_work(self) -> Work:
        return Work(n_before=self.ctx.stats()["n_evictions"])

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_ctx(self) -> int:
        return self.setup["n_ctx"]

    @property
    def moment(self) -> tuple[int, int]:
        """Another one where cells were evicted or replaced since, and not only added or cut from the end."""
        return self._n_fresh, self.ctx.n_evictions() if self.evicts else 0

    @property
    def floor(self) -> int:
        """Tokens below which the tail cannot be removed; 0 where nothing was evicted."""
        return self.ctx.pos_floor() if self.evicts else 0
    def begin_turn(self) -> int:
        """The streams of before are over."""
        self.settle()
        return self.turns.next()

    def settle(self) -> None:
        """What a batch evaluated goes, if that was left half-way."""
        if self.in_batch:
            self.turns.next()
            self.end_batch()

    def end_batch(self) -> None:
        self.in_batch = False
        self.clear()

    def clear(self) -> None:
        self.ctx.clear()
        self._n_fresh += 1
        self._forget()

    def check_room(self, n_new: int, n_before: int, spare: int) -> None:
        """ValueError if n_new tokens after n_before, and `spare` ones of the answer, are more than n_ctx."""
        self.check_fits(n_new, n_before + (n_before > 0 and self.pending is not None), spare)

    def check_fits(self, n_new: int, n_before: int, spare: int) -> None:
        if n_before + n_new + spare > self.n_ctx:
            there = f" after the {n_before} that are there" if n_before else ""
            raise ValueError(f"the prompt has {n_new} tokens{there}, but n_ctx is {self.n_ctx}"
                             f"{' and the answer needs one' if spare else ''}")

    def feed(self, ids: list[int], spans: list[Span]) -> None:
        """Appends prompt tokens, after the pending one."""
        pending = [] if self.pending is None else [self.pending]
        start = self.n_tokens + len(pending)
        self.spans = self.spans + [(begin + start, end + start) for begin, end in spans]
        self._set_spans()
        self._begin_prompt(ids)
        begin, probed_ms = perf_counter(), self.probe.ms
        self._decode_prompt(pending + ids)
        probed_ms = self.probe.ms - probed_ms
        self.work.prefill_ms += 1e3*(perf_counter() - begin) - probed_ms
        self.work.probe_ms += probed_ms
        self.work.n_prompt += len(ids)

    def _begin_prompt(self, ids: list[int]) -> None:
        if ids:
            self.unended, self._n_prompt = True, -1
        if ids and self.evicts:
            self.ctx.begin_prompt()

    def _decode_prompt(self, ids: list[int]) -> None:
        step = self.probe.step if self._asks_for_room else self.ctx.n_batch if self.progress else len(ids)
        if self.progress:
            self.progress(0, len(ids))
        for i in range(0, len(ids), max(step, 1)):
            chunk = ids[i:i + step]
            if self._asks_for_room:
                self._ask_for_room(len(chunk), len(chunk))
            self.decode(chunk)
            if self.progress:
                self.progress(i + len(chunk), len(ids))

    def step(self, token: int) -> None:
        """Evaluates a token of the answer."""
        if self._asks_for_room:
            self._ask_for_room(1, N_ANSWER)
        self.decode([token])

    def _steps(self) -> int:
        """step(), but for the token: how many of an answer can be evaluated at once as if one by one."""
        if not self.evicts:
            return self.ctx.n_ubatch
        n_probe = 0
        if self._asks_for_room:
            self._ask_for_room(1, N_ANSWER)
            n_probe = self.probe.n_tokens
        return max(1, self.ctx.n_until_eviction() - n_probe)

    @property
    def _asks_for_room(self) -> bool:
        return bool(self.setup["kv_cells"] and self.probe.asks)

    def _ask_for_room(self, n_new: int, n_free: int) -> None:
        """Where n_new tokens and a probe do not fit: what is to be evicted is asked for first, then room is made for
        n_free and a probe."""
        if not self.ctx.has_room(n_new + self.probe.n_tokens):
            self._fresh, self._logits = False, None  # the probe leaves its own
            self.probe.ask()
            self.ctx.make_room(min(n_free + self.probe.n_tokens, self.ctx.n_ubatch))

    def decode(self, ids: list[int], logits: str = "last") -> None:
        """Evaluates tokens, the pending one first. logits: of which ctx.logits() has rows, "last" | "all" (at most n_batch tokens)."""
        n_before, fresh = self.n_tokens, False
        self.tokens += ids
        try:
            self.ctx.decode(np.asarray(ids, dtype=np.int32), logits=logits)
            fresh = True
        finally:
            self._cut(self.ctx.pos_max() + 1, fresh)
            if self.n_tokens > n_before:
                self.pending = None

    def evaluate(self, ids: list[int], generated: bool = False) -> F32:
        """feed(), or with generated=True step() for each, and the logits after each token: [len(ids), n_vocab]."""
        if self.pending is not None:
            self.decode([self.pending])
        if generated:
            self.end_prompt(compress=False)
        else:
            self._begin_prompt(ids)
        return np.concatenate([np.empty((0, self.model.n_vocab), np.float32), *map(np.array, self.each_logits(ids, generated))])

    def each_logits(self, ids: list[int], generated: bool) -> Iterator[F32]:
        """[n, n_vocab] of as many tokens at once as can be; of an answer, between two evictions. Views, valid until the
        next."""
        n_most, done = min(self.ctx.n_batch, self.ctx.n_ubatch), 0
        while done < len(ids):
            n = min(n_most, self._steps()) if generated else n_most
            self.decode(ids[done:done + n], logits="all")
            done += n
            yield self.ctx.logits()

    def _set_spans(self) -> None:
        if self.needs_spans:
            self.ctx.set_spans(self.spans)  # none, too: what lies in no span stays

    def _cut(self, n_tokens: int, fresh: bool) -> None:
        del self.tokens[n_tokens:]
        if self.spans and self.spans[-1][1] > n_tokens:  # not for each token of an answer
            self.spans = [(begin, min(end, n_tokens)) for begin, end in self.spans if begin < n_tokens]
        self._fresh, self._logits = fresh, None

    # -- logits -----------------------------------------------------------------------------------------------------

    @property
    def can_sample(self) -> bool:
        return self._fresh or self._logits is not None

    def logits(self) -> F32:
        if not self.can_sample:
            raise ValueError("there are no logits: nothing was evaluated since the cache was emptied or truncated")
        return self._logits if self._logits is not None else np.array(self.ctx.logits()[-1])

    def sample(self, sampler: Sampler) -> int:
        return sampler.sample(self.ctx) if self._logits is None else sampler.sample_row(self._logits)

    # -- eviction ---------------------------------------------------------------------------------------------------

    def check_compress(self) -> None:
        if self.evicts and not self.has_budget:
            raise ValueError("there is nothing to compress to: give LLM(kv_budget=...)")

    def will_evict(self, compress: bool | None, own_budget: bool, by_hand: bool) -> bool:
        """Before or at the end of a prompt that is to come."""
        at_end = (own_budget or self.has_budget) and not by_hand
        return self.evicts and bool(self.setup["kv_cells"] or (at_end if compress is None else compress))

    @property
    def has_budget(self) -> bool:
        return bool(self.setup["kv_budget"] or self.setup["kv_cells"] or self.own[1])

    def set_budget(self, budget: str, decode_budget: str) -> None:
        """Checked ones, until the next clear()."""
        self.ctx.set_budget(budget, decode_budget)
        self.own = self.own[0], budget, decode_budget

    def set_policy(self, policy: str, budget: str, decode_budget: str) -> None:
        """Another policy, until the next clear(); "" the context's. ValueError: it needs signals that this context does not have."""
        self.ctx.set_policy(policy, budget, decode_budget)
        self.own = policy, budget, decode_budget

    def ask(self) -> None:
        """Has a policy that asks see what its probe attends to."""
        self._logits, self._fresh = self.logits() if self.can_sample else None, False  # the probe leaves its own
        self._n_fresh += 1  # and takes the place of the last queries
        probed_ms = self.probe.ms
        self.probe.ask()
        self.work.probe_ms += self.probe.ms - probed_ms

    def compress(self, ask: bool = True) -> bool:
        self.check_compress()
        if ask and self.probe.asks and self.n_tokens:
            self.ask()
        begin = perf_counter()
        evicted = bool(self.evicts and self.ctx.evict())
        self.work.evict_ms += 1e3*(perf_counter() - begin)
        self.compressed, self.kept = True, self._kept_now()
        self.tell_if_all_stay(self.n_tokens, self.kept, self.own[1])
        return evicted

    def tell_if_all_stay(self, n_tokens: int, kept: list[int], budget: str = "") -> None:
        """Says once that a budget had no effect: the prompt is not longer than what the policy always keeps. The engine
        refuses a number of tokens then, unless nothing of the prompt is in a span."""
        kind, share = _core.parse_budget(budget or self.setup["kv_budget"], "kv_budget")
        n_budget = max(1, int(share*n_tokens + 0.5)) if kind == "ratio" else share
        says = kind == "ratio" or kind == "tokens" and self.needs_spans
        if self.evicts and not self._told and says and kept and min(kept) >= n_tokens > n_budget:
            self._told = True
            policy = (self.own[0] or self.setup["kv_policy"]).partition(":")[0]
            self.tell(f"kv_budget {share:g}: all {n_tokens} tokens stay, since {policy} always keeps some of a prompt (its first or "
                      "last ones, or those in no span), and this one has no others; said once")

    def end_prompt(self, compress: bool | None) -> None:
        """compress None: if there is a prompt that ends, and a budget, and the caller has not compressed by hand."""
        if compress or (compress is None and self.unended and not self.by_hand and self.evicts and self.has_budget):
            self.compress()
        elif not self.compressed:
            self.kept = self._kept_now()
        self.unended = False
        if self.evicts:
            self.ctx.end_prompt()
            self._n_prompt = self.n_tokens

    def _kept_now(self) -> list[int]:
        return [int(n) for n in self.ctx.stats()["kept"]]

    def truncate(self, n_tokens: int) -> None:
        if n_tokens == 0:
            self.clear()
        elif not self.cut(n_tokens):
            why, floor = "the cache was compressed" if self.evicts else "this model has recurrent layers", self.ctx.pos_floor()
            raise ValueError(f"{why}: it can be truncated to {floor} tokens{' or more' if n_tokens < floor else ''}, or to 0, not to {n_tokens}")

    def cut(self, n_tokens: int) -> bool:
        """Removes the tail, down to at least one token. False: that is below what can be removed, and nothing has
        changed."""
        if n_tokens < self.n_tokens:
            if not self.ctx.remove_tail(n_tokens):
                return False
            self._cut(n_tokens, fresh=False)
            self.n_cuts += 1
            self.n_probed = min(self.n_probed, n_tokens)
        self.pending = None
        return True

    # -- states: of pykvc/context.py, and files ------------------------------------------------------------------------

    def snapshot(self, cells: bool = True) -> Snapshot:
        about = {"tokens": list(self.tokens), "pending": self.pending, "spans": list(self.spans), "compressed": self.compressed,
                 "by_hand": self.by_hand, "unended": self.unended, "kept": self.kept, "query": self.query,
                 "n_probed": self.n_probed}
        return Snapshot(about, self.logits() if self.can_sample else None, self.ctx.save() if cells else None, self.own,
                        self._n_prompt)

    def restore(self, there: Snapshot) -> None:
        """ValueError: llama.cpp cannot read its state; the cache is then empty."""
        self.clear()
        try:
            assert there.cells is not None, "a snapshot without the cache is for recall()"
            self.ctx.load(there.cells)
            if self.ctx.pos_max() + 1 != len(there.about["tokens"]):
                raise ValueError(f"it holds {self.ctx.pos_max() + 1} tokens, its header says {len(there.about['tokens'])}")
        except (ValueError, RuntimeError):
            self.clear()
            raise
        self.recall(there)

    def recall(self, there: Snapshot) -> None:
        """What is beside the cells, which are there."""
        self.tokens, self.pending, self._logits = list(there.about["tokens"]), there.about["pending"], there.logits
        self._fresh, self.work = False, self.new_work()
        self.spans = [tuple(span) for span in there.about["spans"]]
        self.compressed, self.kept = there.about["compressed"], there.about["kept"]
        self.by_hand = there.about.get("by_hand", self.compressed)  # an older file does not say
        self.unended = there.about.get("unended", not self.compressed)
        self.query, self.n_probed = there.about["query"], there.about["n_probed"]
        self._n_prompt = there.n_prompt
        if self.evicts and there.n_prompt == self.n_tokens:
            self.ctx.end_prompt()  # cut to its end, the engine takes the prompt for unfinished
        if there.own != self.own:
            policy, budget, decode_budget = there.own
            self.ctx.set_policy(policy, budget or self.setup["kv_budget"], decode_budget or self.setup["kv_decode_budget"])
            self.own = there.own
        self._set_spans()

    def state(self) -> list[bytes]:
        """What LLM.save() writes, block by block."""
        self.settle()
        now = self.snapshot(cells=False)
        return state.blocks(self.setup, now.about, now.logits, self.ctx.save())

    def load(self, data: bytes, name: object) -> None:
        there = Snapshot(*state.parse(data, self.setup, name))
        try:
            self.restore(there)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"the state {name} cannot be restored: {error}") from None


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr)
