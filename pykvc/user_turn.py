"""One user's turn in the model's template, cut where the question begins.

    <|im_start|>user
    The report ...        head: the template's beginning and the text, which may be evicted before the question is seen
    Who signed it?<|im_end|>
    <|im_start|>assistant
                          tail: the question and the template's end
"""
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _core, chat
from .spans import Span, segment_spans

if TYPE_CHECKING:
    from .generation import Stream
    from .llm import LLM


@dataclass(frozen=True)
class Turn:
    head: str
    tail: str
    begin: int  # of the text in head; before `at` where the template strips white space
    at: int     # where the user's words begin and end
    end: int

    def spans(self, own: list[Span]) -> list[Span]:
        """Character spans of the text as those of head."""
        clipped = [(max(a + self.begin, self.at), min(b + self.begin, self.end)) for a, b in own]
        return [(a, b) for a, b in clipped if a < b]


def user_turn(model: "_core.Model", text: str, question: str | None = None, system: str | None = None,
              template: str | None = None) -> Turn:
    """question None: all of the prompt is head. ValueError: the model has no template, or it changes the text."""
    content = text + (question or "")
    head: list[chat.Message] = [{"role": "system", "content": system}] if system else []
    prompt = chat.prompt(model, [*head, {"role": "user", "content": content}], template)
    stripped = content if content in prompt else content.strip()  # as some templates do
    at = prompt.rfind(stripped)
    if at < 0 or not stripped:
        raise ValueError("the chat template changes the text, so nobody can tell where it is in the prompt")
    begin = at - content.index(stripped)  # of the content as it was
    cut = len(prompt) if question is None else max(at, begin + len(text))
    return Turn(prompt[:cut], prompt[cut:], begin, at, at + len(stripped))


def answer_once(llm: "LLM", text: str, question: str | None, system: str | None, raw: bool, segment: str | None,
                kv_query: str | None, **how: Any) -> "Stream":
    """A text, or a question about it, as `pykvc generate` asks it: in the model's template, unless raw or without one."""
    session = llm._session
    if question is not None and session.probe.kind == "mean":
        kv_query = kv_query or question
    units: dict[str, Any]
    last: dict[str, Any]
    if raw or not chat.templates(session.model):
        if system:
            raise ValueError("a system message is for a model with a chat template, and not for --raw")
        head, tail, units, last = text, question, {"segment": segment}, {}
    elif not (text + (question or "")).strip():
        raise ValueError("the prompt is empty")
    else:
        apart = "\n\n" if text and not text[-1].isspace() else ""
        turn = user_turn(session.model, text, None if question is None else apart + question, system)
        segment = segment or ("sentence" if session.needs_spans else None)
        own = turn.spans(segment_spans(text, segment)) if segment else None
        head, tail, units, last = turn.head, turn.tail, {"spans": own, "span_unit": "chars"}, {"spans": ()}
    if question is None:
        return llm.generate(head, kv_query=kv_query, stream=True, **units, **how)
    llm.prefill(head, kv_query=kv_query, **units)
    if session.has_budget:
        llm.compress()
    return llm.generate(tail, reset=False, stream=True, **last, **how)
