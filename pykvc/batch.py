"""Many answers at once: each prompt is evaluated in a sequence of its own, and all sequences decode together.

A sequence that is done makes room for the next prompt at once (continuous batching). A prefix that prompts share is
evaluated once, compressed once for each budget, and copied into their sequences.
"""
from collections import deque
from dataclasses import dataclass, field
from time import perf_counter
from typing import Generator

import numpy as np

from .context import Fork
from .generation import Generation, Request, timings_of
from .session import Session, Work
from .spans import Span
from .text import TextStream


@dataclass(frozen=True)
class Prefix:
    """What prompts begin with."""
    ids: list[int]
    spans: list[Span]
    query: list[int]
    compress: bool = True   # before the prompts; False: with each of them


@dataclass(frozen=True)
class Start:
    """An evaluated prefix, for sequences to begin with."""
    compressed: bool
    fork: Fork
    kept: list[int]         # [n_layer]
    n_evictions: int


@dataclass
class Running:
    """One answer under way in sequence `seq`."""
    index: int
    seq: int
    request: Request
    text: TextStream
    pieces: list[str]
    tokens: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)  # [n_layer] cells when decoding began
    work: Work = field(default_factory=Work)
    decode_ms: float = 0.0
    n_decoded: int = 0
    reason: str = ""
    start: Start | None = None

    def take(self, token: int, session: Session) -> None:
        """A sampled token."""
        if session.model.is_eog(token):
            self.reason = "eos"
            return
        self.tokens.append(token)
        self.pieces.append(self.text.push(session.model.piece(token)))
        n_tokens = session.ctx.pos_max(self.seq) + 2  # with this one, once it is evaluated
        self.reason = ("stop" if self.text.stopped else "length" if len(self.tokens) == self.request.max_tokens
                       else "context" if n_tokens > session.n_ctx else "")

    def generation(self, session: Session) -> Generation:
        self.pieces.append(self.text.push(b"", final=True))
        stats = session.ctx.seq_stats(self.seq)
        kv = {"cells": stats["cells"], "kept": self.kept, "evictions": stats["n_evictions"],
              "bytes_allocated": session.ctx.stats()["bytes_allocated"],  # by all sequences
              "bytes_used": stats["bytes_used"], "bytes_full": stats["bytes_full"]}
        if self.start is not None:
            kv |= {"prefix_kept": self.start.kept, "prefix_evictions": self.start.n_evictions}
        return Generation("".join(self.pieces), self.tokens, self.work.n_prompt, len(self.tokens), self.reason, kv,
                          timings_of(self.work, self.decode_ms, self.n_decoded), self.request.sampler.logprobs(len(self.tokens)))


def answers(session: Session, requests: list[Request], budgets: list[tuple[str, str] | None],
            prefixes: list[Prefix | None]) -> Generator[tuple[int, Generation], None, None]:
    """Yields (index of the request, answer) as they are done. budgets (kv_budget, kv_decode_budget), prefixes: of each request, None the context's
    own and none; neighbours that share a prefix have the same object.

    The conversation of the session is over. However this ends, the cache is empty afterwards; where it is left
    half-way, perhaps only at the next turn."""
    ctx, turn = session.ctx, session.turns.number
    session.clear()
    session.in_batch = True
    waiting = deque(enumerate(requests))
    running: list[Running] = []
    free, starts = list(range(ctx.n_seq_max))[::-1], Starts(session)
    try:
        while waiting or running:
            while waiting and free:
                prefix, budget = prefixes[waiting[0][0]], budgets[waiting[0][0]]
                if prefix and session.probe.kind != "none" and running and not starts.has(prefix, budget):
                    break  # a probe is evaluated in sequence 0, and the session's own
                start = None if prefix is None else starts.get(prefix, budget, free[-1])
                index, request = waiting.popleft()
                running.append(_begin(session, index, request, budget, free.pop(), start))
            for done in [r for r in running if r.reason]:
                running.remove(done)
                answer = done.generation(session)
                ctx.clear(done.seq)
                free.append(done.seq)
                yield done.index, answer
            if running:
                _step(session, running)
    except GeneratorExit:  # perhaps as garbage, in whatever thread: nobody is waited for
        if session.turns.number == turn and session.turns.take():
            session.end_batch()
            session.turns.__exit__()
        raise
    except BaseException:
        if session.turns.number == turn:
            session.end_batch()
        raise
    session.end_batch()


class Starts:
    """Of the prefix that neighbours share: evaluated in a free sequence, compressed for each of their budgets."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.prefix: Prefix | None = None
        self.whole: Start | None = None                             # before the eviction; none of a policy that probes
        self.known: dict[tuple[str, str] | None, Start] = {}        # by budget

    def has(self, prefix: Prefix, budget: tuple[str, str] | None) -> bool:
        return prefix is self.prefix and (budget if prefix.compress else None) in self.known

    def get(self, prefix: Prefix, budget: tuple[str, str] | None, seq: int) -> Start:
        if prefix is not self.prefix:
            self.prefix, self.whole, self.known = prefix, None, {}
        budget = budget if prefix.compress else None
        if budget not in self.known:
            self.known[budget] = (self._probed if self.session.probe.kind != "none" else self._evicted)(prefix, budget, seq)
        return self.known[budget]

    def _evicted(self, prefix: Prefix, budget: tuple[str, str] | None, seq: int) -> Start:
        ctx = self.session.ctx
        if self.whole is None:
            _evaluate(self.session, seq, prefix.ids, prefix.spans, 0)
            self.whole = self._take(prefix, seq)
        if not (prefix.compress and _can_evict(self.session, budget)):
            return self.whole
        self.whole.fork.begin(seq)
        if budget:
            ctx.set_budget(*budget, seq)
        ctx.evict(seq)
        return self._take(prefix, seq, self.whole.n_evictions)

    def _probed(self, prefix: Prefix, budget: tuple[str, str] | None, seq: int) -> Start:
        """In sequence 0, where a probe is evaluated."""
        session = self.session
        session.query = prefix.query
        if budget:
            session.set_budget(*budget)
        session.feed(prefix.ids, prefix.spans)
        if prefix.compress and _can_evict(session, budget):
            session.compress()
        start = self._take(prefix, 0)
        session.clear()
        return start

    def _take(self, prefix: Prefix, seq: int, n_evictions: int = 0) -> Start:
        ctx = self.session.ctx
        stats = ctx.seq_stats(seq)
        start = Start(prefix.compress, Fork(ctx, seq), stats["kept"], n_evictions + stats["n_evictions"])
        ctx.clear(seq)
        return start


def _can_evict(session: Session, budget: tuple[str, str] | None) -> bool:
    """Is there a policy, and a prompt budget: the request's or the context's?"""
    return session.evicts and bool(session.has_budget or budget and budget[0])


def _evaluate(session: Session, seq: int, ids: list[int], spans: list[Span], first: int) -> None:
    if session.needs_spans and (spans or first == 0):  # else those of the prefix stay
        session.ctx.set_spans([(begin + first, end + first) for begin, end in spans], seq)
    if session.evicts:
        session.ctx.begin_prompt(seq)
    session.ctx.decode(np.asarray(ids, dtype=np.int32), seq)


def _begin(session: Session, index: int, request: Request, budget: tuple[str, str] | None, seq: int, start: Start | None) -> Running:
    """Evaluates a prompt, samples the first token, evicts: in the order of generate()."""
    ctx, run = session.ctx, Running(index, seq, request, TextStream(request.stop), [request.echo], start=start)
    begin = perf_counter()
    if start is not None:
        start.fork.begin(seq)
    if budget:
        ctx.set_budget(*budget, seq)
    _evaluate(session, seq, request.ids, request.spans, ctx.pos_max(seq) + 1)
    run.work = Work(len(request.ids), 1e3*(perf_counter() - begin))
    if request.max_tokens == 0:
        run.reason = "length"
    else:
        run.take(request.sampler.sample(ctx), session)
    begin = perf_counter()
    compress = request.compress if request.compress is not None else start is None or not start.compressed
    if compress and _can_evict(session, budget):
        ctx.evict(seq)
    run.work.evict_ms = 1e3*(perf_counter() - begin)
    if session.evicts:
        ctx.end_prompt(seq)
    run.kept = ctx.seq_stats(seq)["kept"]
    if compress:
        session.tell_if_all_stay(ctx.pos_max(seq) + 1, run.kept, budget[0] if budget else "")
    return run


def _step(session: Session, running: list[Running]) -> None:
    """One token for every sequence. Neighbouring sequences share a ubatch, so they go in order."""
    running.sort(key=lambda r: r.seq)
    begin = perf_counter()
    session.ctx.decode_batch(np.array([r.tokens[-1] for r in running], dtype=np.int32), np.array([r.seq for r in running], dtype=np.int32))
    took = 1e3*(perf_counter() - begin)
    for row, r in enumerate(running):
        r.decode_ms += took
        r.n_decoded += 1
        r.take(r.request.sampler.sample(session.ctx, row), session)
