"""An item as text: what comes before the question, which may be evicted first, and the question."""
import hashlib
from dataclasses import dataclass
from functools import cached_property

from pykvc import _core, chat as chat_of
from pykvc.spans import Span
from pykvc.user_turn import user_turn

from .items import Item


@dataclass(frozen=True)
class Prompt:
    head: str            # the template's beginning and the context; "" if there is neither
    tail: str            # the question, and the template's end
    spans: list[Span]    # of head, in characters
    query: str           # for a policy that asks

    @cached_property
    def digest(self) -> str:
        """Of the text: an answer to another one is none to this."""
        return hashlib.sha256(f"{self.head}\0{self.tail}".encode()).hexdigest()[:16]


def render(item: Item, model: "_core.Model", chat: bool) -> Prompt:
    """chat: in the model's template where the item is for one, as a single user turn. ValueError if there is no
    template."""
    whole, query = item.whole, item.query or item.question
    if not (chat and item.chat):
        return Prompt(whole, item.question, item.spans, query)
    if not chat_of.templates(model):
        raise ValueError("this model has no chat template: --plain asks without one")
    question = item.question.removesuffix(item.cue).rstrip() if item.cue else item.question
    try:
        turn = user_turn(model, whole, question)
    except ValueError as error:
        raise ValueError(f"{item.id}: {error}; --plain asks without a template") from None
    return Prompt(turn.head, turn.tail + item.cue, turn.spans(item.spans) if whole else [], query)


_COUNTS: dict[tuple["_core.Model", bytes], int] = {}  # a text is counted for every configuration, but not kept for it


def count(model: "_core.Model", text: str) -> int:
    """Tokens of a text, without BOS."""
    data = text.encode()
    known = model, hashlib.blake2b(data, digest_size=16).digest()
    if known not in _COUNTS:
        _COUNTS[known] = len(model.tokenize(data, False, True))
    return _COUNTS[known]
