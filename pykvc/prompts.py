"""What a caller gives as a prompt -> token ids and token spans. ValueError names what is valid."""
from typing import TYPE_CHECKING, Iterable, Sequence, cast

from . import _core, options
from .spans import Span, check_spans, piece_spans, segment_spans, token_lengths, token_spans

if TYPE_CHECKING:
    from .session import Session


def tokenize(model: "_core.Model", text: str, add_special: bool, parse_special: bool = True) -> list[int]:
    if not isinstance(text, str):
        tokens = "; token ids go as tokens=" if isinstance(text, Iterable) else ""
        raise ValueError(f"a prompt is a string, not {type(text).__name__}{tokens}")
    return list(model.tokenize(text.encode("utf-8", "surrogateescape"), add_special, parse_special))


def check_ids(model: "_core.Model", tokens: Sequence[int]) -> list[int]:
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        raise ValueError(f"tokens is a list of token ids, not {tokens!r}")
    n_vocab = model.n_vocab
    return [options.whole("a token id", token, 0, n_vocab - 1) for token in tokens]


def query(session: "Session", text: str | None) -> list[int]:
    """What the session's policy asks; none without a text."""
    ids = tokenize(session.model, text, add_special=False) if text else []
    session.probe.check(ids)
    return ids


def question_in(session: "Session", text: str) -> str:
    """What a policy that asks (finch) is given of a message: its end, where a question stands, as long as it takes."""
    model, n_most = session.model, session.probe.n_most//2
    ids = tokenize(model, text, add_special=False)
    if len(ids) <= n_most:
        return text
    ends = (model.detokenize(ids[-n:]).decode("utf-8", "replace").lstrip("\ufffd") for n in range(n_most, 0, -1))
    return next((end for end in ends if len(tokenize(model, end, False)) <= n_most), "")  # may be cut into more tokens


def join(shots: Sequence[str] | None, question: str | None) -> tuple[str, list[Span]]:
    """(prompt, character spans): every shot is a span, the question is in none."""
    if not isinstance(shots, Iterable) or isinstance(shots, str) or not isinstance(question, str):
        raise ValueError("shots is a list of strings and question a string: give both")
    shots = list(shots)
    spans = piece_spans(shots)
    return "".join(shots) + question, spans


def spans_of_each(spans: Sequence[Span] | Sequence[Sequence[Span] | None], n: int) -> list[Sequence[Span] | None]:
    """Of n prompts that have no prefix; encode() checks what is in them."""
    each = cast(Sequence[Sequence[Span] | None], spans)
    try:
        if len(each) == n and all(own is None or all(len(span) == 2 for span in own) for own in each):
            return list(each)
    except TypeError:  # something in it has no length
        pass
    raise ValueError(f"spans are those of the prefix, or without one a list of (begin, end) pairs for each of the {n} prompts")


def encode(model: "_core.Model", needs_spans: bool, text: str | None, tokens: Sequence[int] | None, spans: Sequence[Span] | None,
           span_unit: str, segment: str | None, first: bool) -> tuple[list[int], list[Span]]:
    """(ids, token spans of them) of a text or of tokens.

    spans, in span_unit "tokens" or "chars", or segment; neither: sentences where needs_spans, else none.
    first: the text begins the conversation, so BOS goes before it where the model wants one."""
    if (text is None) == (tokens is None):
        raise ValueError("give a prompt, or tokens, or shots and question: one of them")
    if spans is not None and segment is not None:
        raise ValueError("give spans or segment, not both")
    if span_unit not in ("tokens", "chars"):
        raise ValueError(f"span_unit is 'tokens' or 'chars', not {span_unit!r}")
    ids = tokenize(model, cast(str, text), first) if tokens is None else check_ids(model, tokens)
    if not ids:
        raise ValueError("the prompt is empty")
    if spans is not None and span_unit == "tokens":
        return ids, check_spans(spans, len(ids))
    if spans is None and segment is None and not needs_spans:
        return ids, []
    pieces = [model.piece(token, True) for token in ids]
    if first and model.add_bos and ids[0] == model.bos:
        pieces[0] = b""  # the tokenizer's, not the text's
    if text is None:  # bytes that are no UTF-8 go through as surrogates and come back the same
        text = b"".join(pieces).decode("utf-8", "surrogateescape")
    lengths = token_lengths(text.encode("utf-8", "surrogateescape"), pieces)
    if spans is None:
        spans = segment_spans(text, "sentence" if segment is None else segment)
    return ids, token_spans(text, spans, lengths)
