"""How an answer's tokens are chosen, with llama.cpp's samplers, in their order and by their names.

    how = pykvc.SamplingParams(temperature=0.7, max_tokens=64, logprobs=3)
    answer = llm.generate("Once upon a time", sampling_params=how)
    answer = llm.generate("Name a city.", json_schema={"type": "object", "properties": {"city": {"type": "string"}}})
"""
import json
import math
from dataclasses import dataclass, fields
from itertools import accumulate
from numbers import Real
from typing import Any, Mapping, Sequence, cast

import numpy as np

from . import _core
from .options import checked_seed, nearest, number, whole
from .policy import F32
from .text import check_stop


@dataclass(frozen=True)
class SamplingParams:
    """What generate(), chat() and the others take by these names, to be kept and given again.

    ValueError names what is valid."""
    max_tokens: int = 128       # -1: until the context is full
    temperature: float = 0.0    # 0: the most likely token, and then top_k to min_p say nothing
    top_k: int = 40             # 0: off
    top_p: float = 0.95         # 1: off
    min_p: float = 0.05         # 0: off
    typical_p: float = 1.0      # 1: off
    repeat_penalty: float = 1.0     # 1: off; these three look at the last 64 tokens of the answer
    presence_penalty: float = 0.0   # 0: off
    frequency_penalty: float = 0.0  # 0: off
    logit_bias: Mapping[int, float] | None = None  # added to a token's logit, -inf: never
    seed: int | None = None     # None: the LLM's own; -1: a random one
    stop: str | Sequence[str] | None = None  # strings that end the answer and do not appear in it
    grammar: str | None = None  # GBNF with a rule named root, which the answer follows
    json_schema: str | Mapping[str, Any] | None = None  # of the JSON that the answer is; not beside a grammar
    logprobs: int | None = None  # log-probabilities of each token and of so many that were likelier, 0: of the token alone

    def __post_init__(self) -> None:
        whole("max_tokens", self.max_tokens, -1)
        number("temperature", self.temperature, 0, 1e6)
        whole("top_k", self.top_k, 0)
        for name, low in (("top_p", 1e-6), ("min_p", 0), ("typical_p", 1e-6)):
            number(name, getattr(self, name), low, 1)
        number("repeat_penalty", self.repeat_penalty, 1e-6, 1e6)
        for name in ("presence_penalty", "frequency_penalty"):
            number(name, getattr(self, name), -1e6, 1e6)
        if self.seed is not None:
            checked_seed(self.seed)
        check_stop(self.stop)
        _check_bias(self.logit_bias)
        if self.grammar is not None and (not isinstance(self.grammar, str) or not self.grammar.strip()):
            raise ValueError(f"grammar is GBNF text with a rule named root, not {self.grammar!r}")
        if self.grammar is not None and self.json_schema is not None:
            raise ValueError("give a grammar or a json_schema, not both")
        if self.logprobs is not None:
            whole("logprobs", self.logprobs, 0, 1000)

    def gbnf(self) -> str:
        """The grammar, or what llama.cpp makes of the schema; "" none. ValueError: it is no JSON schema."""
        if self.json_schema is None:
            return _not_deep("grammar", self.grammar or "")
        if not isinstance(self.json_schema, (str, Mapping)):
            raise ValueError(f"json_schema is a dict or JSON text, not {self.json_schema!r}")
        try:
            text = self.json_schema if isinstance(self.json_schema, str) else json.dumps(self.json_schema)
        except (TypeError, RecursionError) as error:
            raise ValueError(f"json_schema is no JSON: {error}") from None
        return _core.json_schema_to_grammar(_not_deep("json_schema", text))


def _not_deep(name: str, text: str) -> str:
    """llama.cpp reads brackets within brackets by recursion: very many end the process."""
    steps = (1 if c in "([{" else -1 for c in text if c in "()[]{}")
    if (n := max(accumulate(steps), default=0)) > MOST_BRACKETS:
        raise ValueError(f"{name} has brackets {n} deep, and {MOST_BRACKETS} is the most")
    return text


MOST_BRACKETS = 500
NAMES = frozenset(f.name for f in fields(SamplingParams))


def of_call(given: SamplingParams | None, own: Mapping[str, Any], **default: Any) -> SamplingParams:
    """given, or the defaults, with what a call says by name."""
    if given is not None and not isinstance(given, SamplingParams):
        raise ValueError(f"sampling_params is a pykvc.SamplingParams, not {given!r}")
    if unknown := own.keys() - NAMES:
        from .arguments import NAMES as valid
        raise TypeError(f"there is no argument {min(unknown)!r}{nearest(min(unknown), valid)}")
    before = {name: getattr(given, name) for name in NAMES} if given else default
    return SamplingParams(**{**before, **own})


def of_each(given: SamplingParams | Sequence[SamplingParams] | None, own: Mapping[str, Any], n: int) -> list[SamplingParams]:
    """of_call() for n prompts: the same for all, or a list of one for each."""
    if not isinstance(given, (list, tuple)):
        return [of_call(given, own)]*n  # type: ignore[arg-type]
    if len(given) != n:
        raise ValueError(f"sampling_params is one or a list of {n}, one for each prompt, not of {len(given)}")
    return [of_call(each, own) for each in given]


@dataclass(frozen=True)
class Logprob:
    """A token of an answer, as the model saw it: before penalties, temperature and grammar."""
    token: int
    text: str           # bytes that are no UTF-8 by themselves become U+FFFD
    logprob: float      # natural logarithm of its probability
    top: list["Logprob"]  # the likeliest tokens, the likeliest first; their own top is empty


class Sampler:
    """Of one answer: chooses its tokens one after another, and keeps their log-probabilities if they are asked for."""

    def __init__(self, model: "_core.Model", how: SamplingParams, seed: int) -> None:
        """seed: where `how` has none."""
        self._model, self._n_top = model, how.logprobs
        self._chain = _core.Sampler(
            model, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, min_p=how.min_p, typical_p=how.typical_p,
            repeat_penalty=how.repeat_penalty, presence_penalty=how.presence_penalty, frequency_penalty=how.frequency_penalty,
            seed=checked_seed(seed if how.seed is None else how.seed), logit_bias=dict(how.logit_bias or {}), grammar=how.gbnf())
        self._seen: list[Logprob] = []

    def sample(self, ctx: "_core.Context", row: int = -1) -> int:
        """From a row of logits of the last decode."""
        token = self._chain.sample(ctx, row)
        if self._n_top is not None:
            self._keep(token, ctx.logits()[row])
        return token

    def sample_row(self, logits: F32) -> int:
        """From logits [n_vocab] that were kept."""
        token = self._chain.sample_row(logits)
        if self._n_top is not None:
            self._keep(token, logits)
        return token

    def logprobs(self, n: int) -> list[Logprob] | None:
        """Of the first n tokens; None: nobody asked."""
        return None if self._n_top is None else self._seen[:n]

    def _keep(self, token: int, logits: F32) -> None:
        wide = logits.astype(np.float64)
        log_sum = float(np.logaddexp.reduce(wide))
        n = min(self._n_top or 0, len(wide))
        top = np.argpartition(-wide, n - 1)[:n] if n else np.empty(0, int)
        likeliest = sorted(top.tolist(), key=lambda t: (-wide[t], t))
        self._seen.append(self._one(token, wide, log_sum, [self._one(t, wide, log_sum, []) for t in likeliest]))

    def _one(self, token: int, logits: np.ndarray, log_sum: float, top: list[Logprob]) -> Logprob:
        text = self._model.piece(token, True).decode("utf-8", "replace")
        return Logprob(token, text, float(logits[token]) - log_sum, top)


def _check_bias(bias: Any) -> None:
    if bias is None:
        return
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias is a dict of token: number, not {bias!r}")
    for token, value in bias.items():
        whole("a token of logit_bias", token, 0)
        if isinstance(value, bool) or not isinstance(value, Real) or not -math.inf <= cast(float, value) <= 3e38:
            raise ValueError(f"logit_bias of token {token} is a number or -inf, not {value!r}")
