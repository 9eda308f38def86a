"""What generate(), chat() and generate_batch() take by name, for type checkers and help(); pykvc/llm.py says what it
means."""
import inspect
from dataclasses import fields
from typing import Any, Callable, Mapping, Sequence, TypedDict

from .chat import Tool
from .sampling import SamplingParams
from .spans import Span

Budget = int | float | str | None


class Sampling(TypedDict, total=False):
    """The fields of SamplingParams: tests/test_sampling.py compares."""
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    grammar: str | None
    json_schema: str | Mapping[str, Any] | None
    logprobs: int | None


class Common(Sampling, total=False):
    kv_query: str | None
    compress: bool | None


class Answer(Common, total=False):
    sampling_params: SamplingParams | None
    kv_budget: Budget
    kv_decode_budget: Budget
    echo: bool


class Question(Answer, total=False):
    tokens: Sequence[int] | None
    spans: Sequence[Span] | None
    span_unit: str
    segment: str | None


class Prompt(Question, total=False):
    shots: Sequence[str] | None
    question: str | None
    reset: bool


class Template(TypedDict, total=False):
    tools: Sequence[Tool] | None
    enable_thinking: bool | None
    chat_template_kwargs: dict[str, Any] | None


class Chat(Answer, Template, total=False):
    reset: bool | None


class Pipeline(Sampling, total=False):
    sampling_params: SamplingParams | None
    decode_budget: Budget
    system: str | None
    raw: bool
    spans: Sequence[Span] | None
    span_unit: str
    segment: str | None
    kv_query: str | None


class Batch(Common, total=False):
    sampling_params: SamplingParams | Sequence[SamplingParams] | None
    prefix: str | Sequence[str] | None
    shots: Sequence[str] | None
    spans: Sequence[Span] | Sequence[Sequence[Span] | None] | None
    span_unit: str
    segment: str | None
    compress_prefix: bool
    kv_budget: Budget | Sequence[Budget]
    kv_decode_budget: Budget | Sequence[Budget]


NAMES = frozenset({"stream"}.union(*(kind.__annotations__ for kind in (Prompt, Chat, Pipeline, Batch))))


def show(method: Callable[..., Any], like: Callable[..., Any], but: str = "") -> None:
    """What help(method) shows: its own arguments, those of `like` behind the first and without one of them, and
    SamplingParams' fields for the latter's **own."""
    signature, (self, *own) = inspect.signature(method), inspect.signature(method).parameters.values()
    given = [p for p in list(inspect.signature(like).parameters.values())[1:] if p.name != but]
    known = {p.name for p in given}
    shown = [p if p.kind == p.KEYWORD_ONLY else p.replace(kind=p.POSITIONAL_OR_KEYWORD)
             for p in (self, *given, *(p for p in own if p.name not in known)) if p.kind != p.VAR_KEYWORD]
    fields_of = [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
                 for f in fields(SamplingParams)]
    setattr(method, "__signature__", signature.replace(parameters=shown + fields_of))  # noqa: B010
