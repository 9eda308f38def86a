"""What of a chat's prompt the cache holds already, so that only the rest is evaluated.

    [system | user | assistant] user assistant     the cache, with the answer that was generated last
    [system | user | assistant] user               the prompt: its first tokens are those of the cache

What is compared are tokens. Where an answer comes back other than it was generated (a template drops its thoughts or
its white space, a text is cut into other tokens), the cache is cut to what both begin with. An evicted cache cannot be
cut below its floor: then the answer's own tokens may stay if they are the same text, else everything is evaluated anew.
"""
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Sequence

from . import prompts
from .chat import Message
from .session import Session
from .spans import Span

if TYPE_CHECKING:
    from .generation import Request


@dataclass(frozen=True)
class Chat:
    """What a request is the rendering of. spans: of text, in characters."""
    messages: Sequence[Message]
    text: str
    spans: list[Span] | None


@dataclass(frozen=True)
class Resumed:
    request: "Request"  # with the tokens that are not in the cache
    reused: int         # tokens that are
    anew: str           # why none are, although the cache held a part of the chat; "" otherwise


def resume(session: Session, request: "Request", asked: Chat) -> Resumed:
    """Cuts the cache to what a chat's prompt, the request's, begins with, or empties it."""
    ids, spans = request.ids, request.spans
    reused, anew = _cut(session, asked, ids)
    if anew and (own := _own_tokens(session, asked)):
        reused, anew = own[1], ""
        ids, spans = own[0], prompts.encode(session.model, session.needs_spans, None, own[0], asked.spans,
                                            "chars", None, first=True)[1]
    if not reused:
        session.clear()
    else:
        session.work = session.new_work()
        if request.budget is None and any(session.own):
            session.set_budget(session.setup["kv_budget"], session.setup["kv_decode_budget"])
        session.spans, session.query = [], []  # of the whole prompt, which feed() counts from its own first token
        session.compressed = session.by_hand = False  # each turn is a prompt that ends
    ids, spans = ids[reused:], [(begin - reused, end - reused) for begin, end in spans]
    return Resumed(replace(request, ids=ids, spans=spans), reused, anew)


def _cut(session: Session, asked: Chat, ids: list[int]) -> tuple[int, str]:
    """(tokens that stay, "") or (0, why)."""
    held = _held(session)
    n = min(_common(held, ids), len(ids) - 1)  # at least one is evaluated, for its logits
    if session.own[0] or n <= 0:
        return 0, ""
    if session.floor and not _continues(session, asked):
        return 0, "these messages do not continue those that the cache was evicted for"
    if n == len(held):
        return n, ""
    n = min(n, session.n_tokens)
    if session.evicts:
        n = session.ctx.heard_from(n, len(ids))
    if n == 0:
        return 0, ""
    if session.floor > n or not (session.cut(n) or (session.floor and session.cut(session.floor))):  # a recurrent state goes back to the floor alone
        return 0, f"the history differs from what was evaluated at token {n}, and this cache cannot go back there"
    return session.n_tokens, ""


def _own_tokens(session: Session, asked: Chat) -> tuple[list[int], int] | None:
    """(tokens of the prompt, how many the cache holds) where the cache is the same text, cut into other tokens."""
    held = _held(session)
    if not _continues(session, asked) or not held:
        return None
    pieces = [session.model.piece(token, True) for token in held]
    if session.model.add_bos and held[0] == session.model.bos:
        pieces[0] = b""  # the tokenizer's, not the text's
    text, before = asked.text.encode("utf-8", "surrogateescape"), b"".join(pieces)
    if not text.startswith(before) or text == before:
        return None
    rest = list(session.model.tokenize(text[len(before):], False, True))
    return (held + rest, len(held)) if rest and len(held) + len(rest) < session.n_ctx else None


def _held(session: Session) -> list[int]:
    return session.tokens + ([] if session.pending is None else [session.pending])


def _continues(session: Session, asked: Chat) -> bool:
    n = len(session.chat)
    return 0 < n < len(asked.messages) and list(asked.messages[:n]) == session.chat


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
