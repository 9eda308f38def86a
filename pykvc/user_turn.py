"""One user's turn in the model's template, cut where the question begins.

    <|im_start|>user
    The report ...        head: the template's beginning and the text, which may be evicted before the question is seen
    Who signed it?<|im_end|>
    <|im_start|>assistant
                          tail: the question and the template's end
"""
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Sequence

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


@dataclass(frozen=True)
class Asked:
    """A text and questions about it, as they are evaluated: head once, then one of tails for each question."""
    head: str
    tails: list[str]
    turn: Turn | None  # None: without a template

    def spans(self, own: list[Span]) -> list[Span]:
        """Character spans of the text as those of head."""
        return own if self.turn is None else self.turn.spans(own)


def asked(model: "_core.Model", text: str, questions: Sequence[str], system: str | None = None, raw: bool = False,
          template: str | None = None) -> Asked:
    """In the model's template, unless raw or without one: there a question follows the text as it is.

    ValueError: a system message without a template, or a template that writes the text in another way for each question."""
    if raw or not (template or chat.templates(model)):
        if system:
            raise ValueError("a system message is for a model with a chat template, and not for raw prompts")
        return Asked(text, list(questions), None)
    if not (text + "".join(questions)).strip():
        raise ValueError("the prompt is empty")
    apart = "\n\n" if text and not text[-1].isspace() else ""
    turns = [user_turn(model, text, apart + question, system, template) for question in questions]
    if not turns:
        turn = user_turn(model, text, None, system, template)
        return Asked(turn.head, [], turn)
    if len({turn.head for turn in turns}) > 1:
        raise ValueError("the chat template writes the text in another way for each question, so it cannot be evaluated once: ask it raw")
    return Asked(turns[0].head, [turn.tail for turn in turns], turns[0])


def answer_once(llm: "LLM", text: str, question: str | None, system: str | None, raw: bool, segment: str | None,
                kv_query: str | None, **how: Any) -> "Stream":
    """A text, or a question about it, as `pykvc generate` asks it."""
    session = llm._session
    if question is not None and session.probe.kind == "mean":
        kv_query = kv_query or question
    found = asked(session.model, text, [] if question is None else [question], system, raw)
    units: dict[str, Any] = {"segment": segment}
    if found.turn:
        segment = segment or ("sentence" if session.needs_spans else None)
        units = {"spans": found.spans(segment_spans(text, segment)) if segment else None, "span_unit": "chars"}
    if question is None:
        return llm.generate(found.head, kv_query=kv_query, stream=True, **units, **how)
    llm.prefill(found.head, kv_query=kv_query, **units)
    if session.has_budget:
        llm.compress()
    last: dict[str, Any] = {"spans": ()} if found.turn else {}
    return llm.generate(found.tails[0], reset=False, stream=True, **last, **how)
