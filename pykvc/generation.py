"""The loop of an answer: prefill, sample, evict, decode on."""
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Generator

from . import history
from .sampling import Logprob, Sampler
from .session import Session, Work
from .text import TextStream
from .turns import Steps


@dataclass(frozen=True)
class Generation:
    """What generate() returns."""
    text: str
    tokens: list[int]         # the generated ones, without the end-of-text token
    n_prompt: int             # tokens evaluated for this answer since the one before it, prefill() included
    n_predicted: int          # len(tokens)
    stop_reason: str          # "eos" | "stop" | "length" (max_tokens) | "context" (n_ctx is full)
    kv: dict[str, Any]        # cells: in use now; kept: [n_layer] cells each layer had when decoding began;
                              # bytes_allocated, bytes_used, bytes_full (without eviction); evictions: of this answer and of the prompt it took;
                              # of a chat reused: tokens of its prompt that were there, anew: why none were, if some might have been
    timings: dict[str, float] # prefill_ms, probe_ms (of a policy that asks), evict_ms (at the prompt's end), decode_ms, prefill_tps, decode_tps
    logprobs: list[Logprob] | None = None  # one for each of tokens; None: not asked for


class Stream:
    """Pieces of text as they come, each of whole characters, none of a stop string. Afterwards `result` is there."""

    def __init__(self, pieces: Generator[str, None, Generation] | Steps[str]) -> None:
        self._pieces = pieces
        self._result: Generation | None = None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self._result = end.value or self._result
            raise StopIteration from None

    def close(self) -> None:
        """Ends the answer where it is; `result` will not come."""
        self._pieces.close()

    @property
    def result(self) -> Generation:
        """The whole answer. ValueError while pieces are still to come."""
        if self._result is None:
            raise ValueError("the stream has not ended: take all its pieces first")
        return self._result


@dataclass(frozen=True)
class Request:
    """A checked call of generate()."""
    ids: list[int]
    spans: list[tuple[int, int]]  # of ids
    reset: bool
    compress: bool | None         # None: once per prompt
    max_tokens: int               # -1: until the context is full
    stop: list[str]
    sampler: Sampler
    echo: str                     # text to begin with
    query: list[int] = field(default_factory=list)  # for a policy that asks; empty: as before
    budget: tuple[str, str] | None = None           # kv_budget, kv_decode_budget; None: as before
    chat: history.Chat | None = None                # goes on from what the cache holds of it; reset says nothing then


def answer(session: Session, request: Request) -> Generator[str, None, Generation]:
    """Yields the pieces of text; returns the Generation. Abandoned half-way, it leaves the session usable."""
    resumed = None
    if request.chat:
        resumed = history.resume(session, request, request.chat)
        request = resumed.request
    elif request.reset:
        session.clear()
    session.query = request.query or session.query
    if request.budget:
        session.set_budget(*request.budget)
    if request.ids or session.pending is not None:
        session.feed(request.ids, request.spans)

    text, pieces = TextStream(request.stop), [request.echo]
    tokens: list[int] = []
    decode_ms, n_decoded, reason, prompt_ended = 0.0, 0, "", False
    if request.echo:
        yield request.echo
    while not reason:
        if len(tokens) == request.max_tokens:
            reason = "length"
        elif tokens and session.n_tokens >= session.n_ctx:
            reason = "context"
        else:
            if tokens:
                begin = perf_counter()
                session.step(tokens[-1])
                decode_ms += 1e3*(perf_counter() - begin)
                n_decoded += 1
            token = session.sample(request.sampler)
            if session.model.is_eog(token):
                reason = "eos"
            else:
                tokens.append(token)
                session.pending = token
                pieces.append(text.push(session.model.piece(token)))
                reason = "stop" if text.stopped else ""
                if pieces[-1]:
                    yield pieces[-1]
        if not prompt_ended:  # only now: the first token did not wait for it
            session.end_prompt(request.compress)
            session.chat = list(request.chat.messages) if request.chat else []
            prompt_ended = True
    pieces.append(text.push(b"", final=True))
    if pieces[-1]:
        yield pieces[-1]

    work, session.work = session.work, session.new_work()
    stats = session.ctx.stats()
    kv = {"cells": int(stats["cells_used"][0]), "kept": list(session.kept), "evictions": stats["n_evictions"] - work.n_before,
          **{key: stats[key] for key in ("bytes_allocated", "bytes_used", "bytes_full")},
          **({"reused": resumed.reused, "anew": resumed.anew} if resumed else {})}
    return Generation("".join(pieces), tokens, work.n_prompt, len(tokens), reason, kv, timings_of(work, decode_ms, n_decoded),
                      request.sampler.logprobs(len(tokens)))


def timings_of(work: Work, decode_ms: float, n_decoded: int) -> dict[str, float]:
    return {"prefill_ms": work.prefill_ms, "probe_ms": work.probe_ms, "evict_ms": work.evict_ms, "decode_ms": decode_ms,
            "prefill_tps": _per_second(work.n_prompt, work.prefill_ms), "decode_tps": _per_second(n_decoded, decode_ms)}


def _per_second(n: int, ms: float) -> float:
    return 1e3*n/ms if ms > 0 else 0.0
