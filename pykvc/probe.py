"""What policies that ask (needs.probe) are shown: texts evaluated after the context and taken out again.

"mean" (finch): the question, after each chunk of the context. "max" (kvzip): each chunk once more, with a request to
repeat it before it, in the words of the authors' code.
"""
import weakref
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .session import Session

REPEAT = "\n\nRepeat the previous context exactly."
REPEAT_PART = "\n\nRepeat the part of the previous context exactly, starting with "
N_LEAD = 8  # tokens before the part that the request quotes


class Probe:
    """Of one session. kind: "none" | "mean" | "max"."""

    def __init__(self, kind: str, window: int, session: "Session") -> None:
        self.kind, self.session = kind, weakref.proxy(session)  # no cycle: close() frees the model at once
        self.n_most = min(window, session.ctx.n_ubatch)
        if kind == "max":
            self.repeat, self.repeat_part = (session.model.tokenize(text.encode(), False) for text in (REPEAT, REPEAT_PART))
            self.n_request = max(len(self.repeat), len(self.repeat_part) + N_LEAD)
            if self.n_most < 4*self.n_request:
                raise ValueError(f"kvzip's repetitions have at most window and n_ubatch tokens: give both at least {4*self.n_request}")

    def check(self, query: list[int]) -> None:
        if query and self.kind != "mean":
            raise ValueError("kv_query is what a policy that asks is given: finch")
        if len(query) > self.n_most//2:
            raise ValueError(f"kv_query has {len(query)} tokens: at most half of window (a parameter of finch) and of n_ubatch, {self.n_most//2}")

    @property
    def asks(self) -> bool:
        return self.kind == "max" or (self.kind == "mean" and bool(self.session.query))

    @property
    def n_tokens(self) -> int:
        """Cells the longest probe takes."""
        return len(self.session.query) if self.kind == "mean" else self.n_request + self.step

    @property
    def step(self) -> int:
        """Tokens of a chunk, so that the chunk and a probe fit into n_ubatch."""
        n_ubatch = self.session.ctx.n_ubatch
        return n_ubatch - len(self.session.query) if self.kind == "mean" else min((n_ubatch - self.n_request)//2, self.n_most - self.n_request)

    def ask(self) -> None:
        """Has every token of the context scored."""
        session = self.session
        if self.kind == "mean":
            self._evaluate(session.query, 0, session.n_tokens)
            return
        while session.n_probed < session.n_tokens:
            begin, end = session.n_probed, min(session.n_probed + self.step, session.n_tokens)
            request = self.repeat_part + session.tokens[begin - N_LEAD:begin] if begin >= N_LEAD else self.repeat
            self._evaluate(request + session.tokens[begin:end], begin, end)
            session.n_probed = end

    def _evaluate(self, ids: list[int], begin: int, end: int) -> None:
        self.session.ctx.make_room(len(ids))
        self.session.ctx.ask(np.asarray(ids, dtype=np.int32), begin=begin, end=end)
