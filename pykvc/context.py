"""A context that is asked several times: evaluated once, compressed once for each policy and budget, and asked from there.

    ctx = llm.context(report, spans=[(0, 310), (310, 655)])
    ctx.compress(policy="kvzip", budget=0.25)
    print(ctx.ask("Who signed it?").text, ctx.ask("When?").text)
    ctx.compress(policy="keydiff", budget=0.25)   # from the whole context, without evaluating it again
    print(ctx.ask("Who signed it?").text)

Every question is asked from the same state, and does not see the others. Whatever else goes back to a state does so by
this file, too: evals, lm_eval, and generate_batch(), whose sequences begin with a copy of their prefix.
"""
import weakref
from typing import TYPE_CHECKING, Any, Literal, Sequence, overload

from . import _core, options
from .arguments import Budget
from .policy import Policy
from .session import Session
from .turns import Turns, queued

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .arguments import Question
    from .generation import Generation, Stream
    from .llm import LLM


PYTHON = "a policy written in Python is the LLM's own: make one with LLM(kv_policy=...), and name no policy here"


class Mark:
    """Where a session is now, to come back to. In memory, a copy of what the cache holds; a cache that is whole is cut instead, unless
    layers are recurrent."""

    def __init__(self, session: Session, cells: bool = True) -> None:
        """cells False: without a copy, to be cut back to or not at all."""
        self.session, self.n_tokens, self.moment = weakref.proxy(session), session.n_tokens, session.moment  # close() frees it at once
        self.n_cuts = session.n_cuts
        self.snapshot = session.snapshot(cells=cells and (session.evicts or session.ctx.pos_floor() > 0))

    def return_to(self, to_evict: bool = False) -> None:
        """to_evict: with its signals, too. What came after it has taken the place of its last queries, and has added to the
        sums of attention. ValueError: a whole cache was emptied since, or holds other tokens."""
        session, about = self.session, self.snapshot.about
        there = session.moment == self.moment and session.tokens[:self.n_tokens] == about["tokens"]
        untouched = (session.n_cuts, session.n_tokens) == (self.n_cuts, self.n_tokens)
        if there and (untouched or not to_evict or self.snapshot.cells is None) and session.cut(self.n_tokens):
            session.recall(self.snapshot)  # nothing was evicted since: what came after is all that is to go
        elif self.snapshot.cells is not None:
            session.restore(self.snapshot)
            self.moment, self.n_cuts = session.moment, session.n_cuts
        else:
            raise ValueError("the LLM was used for something else meanwhile, and a whole cache is not copied: make the context again")


class Fork:
    """What a sequence holds now, for others to begin with. In memory, a copy of its cells."""

    def __init__(self, ctx: "_core.Context", seq: int) -> None:
        self._ctx, self._cells = ctx, ctx.save_seq(seq)

    def begin(self, seq: int) -> None:
        """Has sequence `seq` hold it, instead of what it holds."""
        self._ctx.load_seq(self._cells, seq)


class Context:
    """llm.context() makes it; pykvc.LLM says what the arguments are. The conversation of the LLM is this context's until the LLM is used for
    something else: then an evicting one is restored at the next question, and a whole one is a ValueError."""

    def __init__(self, llm: "LLM", n_tokens: int) -> None:
        self._llm = llm
        self.n_tokens = n_tokens
        self.kept: list[int] = self._session._kept_now()  # [n_layer] cells a layer holds where questions are asked from
        self._whole = self._now = Mark(self._session)
        self._asked: Mark | None = None                   # once the policy's repetition (kvzip) has scored every cell

    @property
    def _session(self) -> Session:
        return self._llm._session

    @property
    def _turns(self) -> Turns:
        return self._llm._turns

    @queued
    def compress(self, policy: str | Sequence[str] | None = None, budget: Budget | Sequence[Budget] = None,
                 decode_budget: Budget = None) -> bool:
        """Evicts the whole context down to a budget; questions are then asked from there. False: nothing was over it.

        policy: another one, which needs no more signals than the LLM's own: "keydiff" or "snapkv" under LLM(kv_policy="kvzip"),
        "kvzip:share=layers" under "kvzip:share=all". Variants of kvzip share one repetition, but for softmax, plus and sinks.
        A list evicts by one after the other, each down to its own of a list of budgets (kvpress' ComposedPress):
        compress(["knorm", "snapkv"], [0.5, 0.25]) keeps a quarter, chosen by snapkv among the half that knorm chose.
        budget, decode_budget: as LLM's kv_budget and kv_decode_budget, whose own hold if they are None. ValueError names what is valid."""
        session = self._session
        if not session.evicts:
            raise ValueError("there is nothing to compress with: make the LLM with a kv_policy")
        steps = steps_of(session, policy, budget, decode_budget)
        check_asked(session, steps, self._whole.snapshot.about["query"])
        start = self._asked if self._asked and self._asks(steps[0][0]) else self._whole
        session.begin_turn()
        start.return_to(to_evict=True)
        try:
            evicted = [self._evict(*step, first=i == 0) for i, step in enumerate(steps)]
        except BaseException:
            self._now = start
            start.return_to()
            raise
        self.kept, self._now = session.kept, Mark(session)
        return any(evicted)

    def _asks(self, policy: str | None) -> bool:
        """Does it evaluate a probe, which needs what the LLM's own has?"""
        return self._session.probe.asks and (policy is None or options.needs(policy)["probe"] != "none")

    def _evict(self, policy: str | None, budget: tuple[str, str] | None, first: bool) -> bool:
        session = self._session
        if policy is not None:
            session.set_policy(policy, *_budgets(session, budget))
        elif budget:
            session.set_budget(*budget)
        if self._asks(policy) and not (first and self._asked):
            session.ask()
            if first and session.probe.kind == "max":
                self._asked = Mark(session)
        return session.compress(ask=False)

    @overload
    def ask(self, question: str | None = ..., *, stream: Literal[False] = ..., **how: "Unpack[Question]") -> "Generation": ...
    @overload
    def ask(self, question: str | None = ..., *, stream: Literal[True], **how: "Unpack[Question]") -> "Stream": ...

    @queued
    def ask(self, question: str | None = None, **how: Any) -> "Generation | Stream":
        """LLM.generate() from the context as it is now, whole or compressed. how: max_tokens, stop, stream, tokens=
        instead of a question ..."""
        self.go_back()
        return self._llm.generate(question, **{"spans": () if question is not None else None, **how, "reset": False, "compress": False})

    @queued
    def go_back(self, to_evict: bool = False) -> None:
        """Has the LLM hold the context as it is now, whole or compressed, and nothing after it.

        to_evict: for an eviction that follows, with the last queries and the sums of attention as they were. Otherwise
        those of the last question may have taken their place."""
        self._session.begin_turn()
        self._now.return_to(to_evict)

    @queued
    def stats(self) -> dict[str, Any]:
        """LLM.stats() of the context, without the last question."""
        self.go_back()
        return self._llm.stats()


def steps_of(session: Session, policy: str | Sequence[str] | None, budget: Any, decode_budget: Any) -> list[tuple[str | None, tuple[str, str] | None]]:
    """(canonical policy, budgets) of each eviction, one after the other; None: the context's own."""
    if policy is None or isinstance(policy, str):
        specs: list[Any] = [policy]
    else:
        listed = isinstance(policy, (list, tuple))
        specs = list(policy) if listed else [policy]
        if any(isinstance(spec, Policy) for spec in specs):
            raise ValueError(PYTHON)
        if not listed or not specs or not all(isinstance(spec, str) for spec in specs):
            raise ValueError(f"policy is a spec such as 'snapkv:window=32' or a list of them, not {policy!r}")
        if not isinstance(budget, (list, tuple)) or len(budget) != len(specs):
            raise ValueError(f"budget is a list of {len(specs)}, one for each policy, not {budget!r}")
    if any(spec is not None and options.in_python(spec) for spec in specs):
        raise ValueError(PYTHON)
    budgets = options.budgets(budget, decode_budget, len(specs), session)
    if not all(own and own[0] for own in budgets):
        session.check_compress()
    steps = [(None if spec is None else _core.parse_spec(spec), own) for spec, own in zip(specs, budgets)]
    for spec, own in steps:
        if spec is not None:
            session.ctx.check_policy(spec, *_budgets(session, own))
    return steps


def check_asked(session: Session, steps: Sequence[tuple[str | None, Any]], query: object) -> None:
    """ValueError: a step is finch, and nothing is asked."""
    if any(spec is None or options.needs(spec)["probe"] == "mean" for spec, _ in steps):
        session.probe.check_asked(query)


def _budgets(session: Session, own: tuple[str, str] | None) -> tuple[str, str]:
    """Of a policy of its own: a decode budget was not meant for it."""
    return own or (session.setup["kv_budget"], "")
