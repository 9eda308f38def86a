"""What generate(), chat() and generate_batch() take by name, for type checkers; pykvc/llm.py says what it means."""
from typing import Any, Sequence, TypedDict

from .chat import Tool
from .spans import Span

Budget = int | float | str | None


class Common(TypedDict, total=False):
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int | None
    stop: str | Sequence[str] | None
    kv_query: str | None
    compress: bool | None


class Answer(Common, total=False):
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


class Batch(Common, total=False):
    prefix: str | Sequence[str] | None
    shots: Sequence[str] | None
    spans: Sequence[Span] | Sequence[Sequence[Span] | None] | None
    span_unit: str
    segment: str | None
    compress_prefix: bool
    kv_budget: Budget | Sequence[Budget]
    kv_decode_budget: Budget | Sequence[Budget]
