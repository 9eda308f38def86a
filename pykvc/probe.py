"""What policies that ask (needs.probe) are shown: texts evaluated after the context and taken out again.

"mean" (finch): the question, after each chunk of the context. "max" (kvzip, arXiv 2505.23416): each chunk once more. Before
it stand a request to repeat it, in the words of the authors' code, and what the model's chat template puts between the end of
the user's turn and the beginning of the answer, so that an instruct model answers.
"""
import math
import sys
import weakref
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from . import chat

if TYPE_CHECKING:
    from .session import Session

REPEAT = "\n\nRepeat the previous context exactly."
REPEAT_PART = "\n\nRepeat the part of the previous context exactly, starting with"
N_LEAD = 8           # tokens before the part that the request quotes
N_REPEAT_MIN = 64    # tokens of a chunk below which the request would outweigh it
N_REQUEST = 64       # cells to leave for a request, before it is known of the model: at most that many tokens
LIKELY_MIN = 0.1     # geometric mean of the probabilities of repeated tokens below which a model plainly does not repeat


class Probe:
    """Of one session. kind: "none" | "mean" | "max". window: queries that are looked at at once; chunk: tokens repeated by one probe."""

    def __init__(self, kind: str, window: int, chunk: int, session: "Session") -> None:
        self.kind, self.chunk, self.session = kind, chunk, weakref.proxy(session)  # no cycle: close() frees the model at once
        self.n_most = min(window, session.ctx.n_ubatch)
        self.ms = 0.0                       # spent with probes since the last reset
        self.log_prob, self.n_seen = 0.0, 0  # of repeated tokens that were looked at: sum in nats, number
        self.n_chunk = 0                    # tokens of the largest chunk since the last reset
        if kind == "max":
            encode = lambda text: list(session.model.tokenize(text.encode(), False))
            self.repeat, self.repeat_part, self.answer = encode(REPEAT), encode(REPEAT_PART), encode(self._turn_end(session))
            self.n_request = max(len(self.repeat), len(self.repeat_part) + N_LEAD) + len(self.answer)
            if session.setup["kv_cells"] and self.step < N_REPEAT_MIN//2:
                raise ValueError(f"kvzip with kv_cells shows a part of the context and a request of {self.n_request} tokens within half of n_ubatch: "
                                 f"give n_ubatch at least {self.n_request + N_REPEAT_MIN}")

    @staticmethod
    def _turn_end(session: "Session") -> str:
        if not chat.templates(session.model):
            print("kvzip: this model has no chat template, so a newline stands between the request and the repetition", file=sys.stderr)
        return chat.turn_end(session.model)

    def reset(self) -> None:
        self.ms, self.log_prob, self.n_seen, self.n_chunk = 0.0, 0.0, 0, 0

    def check(self, query: list[int]) -> None:
        if query and self.kind != "mean":
            raise ValueError("kv_query is what a policy that asks is given: finch")
        if len(query) > self.n_most//2:
            raise ValueError(f"kv_query has {len(query)} tokens: at most half of window (a parameter of finch) and of n_ubatch, {self.n_most//2}")

    def check_asked(self, query: object) -> None:
        """Before an eviction that is to go by it."""
        if self.kind == "mean" and not query:
            raise ValueError("finch keeps what a question attends to, and there is none: give kv_query")

    @property
    def asks(self) -> bool:
        return self.kind == "max" or (self.kind == "mean" and bool(self.session.query))

    @property
    def n_tokens(self) -> int:
        """Cells the longest probe takes, with kv_cells."""
        return len(self.session.query) if self.kind == "mean" else self.n_request + self.step

    @property
    def step(self) -> int:
        """With kv_cells: tokens of a chunk, so that the chunk and a probe fit into n_ubatch."""
        n_ubatch = self.session.ctx.n_ubatch
        return n_ubatch - len(self.session.query) if self.kind == "mean" else min((n_ubatch - self.n_request)//2, self.chunk)

    def ask(self) -> None:
        """Has every token of the context scored. ValueError where a repetition does not fit behind it."""
        session, begin_s = self.session, perf_counter()
        if self.kind == "mean":
            self._evaluate(session.query, 0, session.n_tokens)
        else:
            self._repeat()
        self.ms += 1e3*(perf_counter() - begin_s)

    def _repeat(self) -> None:
        session = self.session
        while session.n_probed < session.n_tokens:
            begin = session.n_probed
            end = min(begin + self._n_fits(), session.n_tokens)
            request = self.repeat_part + session.tokens[begin - N_LEAD:begin] if begin >= N_LEAD else self.repeat
            self._evaluate(request + self.answer + session.tokens[begin:end], begin, end)
            session.n_probed, self.n_chunk = end, max(self.n_chunk, end - begin)
        if self.likelihood is not None and self.likelihood < LIKELY_MIN:
            print(f"kvzip: this model repeats the context with a likelihood of {self.likelihood:.3f} a token, so what it attends to while it "
                  "does says little: prefer keydiff or expected_attention", file=sys.stderr)

    def _n_fits(self) -> int:
        """Tokens of the next chunk: at most what n_ctx leaves behind the context."""
        session = self.session
        if session.setup["kv_cells"]:
            return self.step
        n_left, n_todo = session.n_ctx - session.n_tokens - self.n_request, session.n_tokens - session.n_probed
        if n_left < min(N_REPEAT_MIN, n_todo):
            raise ValueError(f"kvzip repeats the context behind itself: {session.n_tokens} tokens leave {max(n_left, 0)} of n_ctx {session.n_ctx}, "
                             f"and it takes at least {min(N_REPEAT_MIN, n_todo)}; give n_ctx {session.n_tokens + self.n_request + self.chunk} "
                             "for whole chunks")
        return min(self.chunk, n_left)

    @property
    def likelihood(self) -> float | None:
        """Geometric mean of the probabilities that the model gave to tokens it was to repeat; None: nothing was repeated."""
        return math.exp(self.log_prob/self.n_seen) if self.n_seen else None

    def _evaluate(self, ids: list[int], begin: int, end: int) -> None:
        ctx = self.session.ctx
        ctx.make_room(len(ids))
        log_prob, n_seen = ctx.ask(np.asarray(ids, dtype=np.int32), begin=begin, end=end, n_repeated=end - begin if self.kind == "max" else 0)
        self.log_prob, self.n_seen = self.log_prob + log_prob, self.n_seen + n_seen
