"""Where the units of a prompt begin and end: text -> character spans -> token spans.

A span is a half-open pair (begin, end). Spans are ascending and disjoint; what lies outside every span (a system
prompt, the final question) is never evicted by a policy that works on spans.

    segment="sentence"     a sentence and the white space after it. It ends with . ! ? and what closes it before white space, with 。！？,
                           or with an empty line; a line break alone ends none. llama-server and the engine find the same (cpp/engine/spans.h).
    segment="\\n\\n"         a separator; "sep:..." says the same and may be any string
    segment="re:^Q: "      a regular expression that matches where a unit begins (re.MULTILINE)
"""
import re
from typing import Sequence

from . import _core

Span = tuple[int, int]


def check_spans(spans: Sequence[Span], n: int, what: str = "tokens") -> list[Span]:
    """The spans, ascending, as plain ints. ValueError where one is empty, leaves [0, n) or overlaps another."""
    try:
        ascending = sorted((int(begin), int(end)) for begin, end in spans)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"spans is a list of (begin, end) pairs of {what}, not {spans!r}") from None
    last = 0
    for begin, end in ascending:
        if not 0 <= begin < end <= n:
            raise ValueError(f"span ({begin}, {end}) is empty or leaves the prompt, which has {n} {what}")
        if begin < last:
            raise ValueError(f"span ({begin}, {end}) overlaps the one before it, which ends at {last}")
        last = end
    return ascending


def sentence_spans(text: str) -> list[Span]:
    """Character spans of the sentences, each with the white space after it; they cover the text."""
    data = _bytes(text)
    return _characters(data, _core.sentence_spans(data))


def separator_spans(text: str, separator: str) -> list[Span]:
    """Character spans of the pieces, each with the separator that ends it. Pieces of white space alone are left out."""
    if not separator:
        raise ValueError('segment="sep:..." needs a separator after the colon')
    data = _bytes(text)
    return _characters(data, _core.separator_spans(data, _bytes(separator)))


def regex_spans(text: str, pattern: str) -> list[Span]:
    """Character spans from one match of the pattern to the next; what comes before the first match is in no span."""
    try:
        begins = [found.start() for found in re.finditer(pattern, text, re.MULTILINE)]
    except re.error as error:
        raise ValueError(f"segment=\"re:{pattern}\" is not a regular expression: {error}") from None
    if not begins:
        raise ValueError(f"segment=\"re:{pattern}\" matches nowhere in the prompt")
    return [(begin, end) for begin, end in zip(begins, [*begins[1:], len(text)]) if begin < end]


def piece_spans(pieces: Sequence[str]) -> list[Span]:
    """Character spans of pieces that stand one after the other, as shots do. Empty pieces are left out."""
    spans, begin = [], 0
    for piece in pieces:
        if not isinstance(piece, str):
            raise ValueError(f"shots is a list of strings, not of {type(piece).__name__}")
        if piece:
            spans.append((begin, begin + len(piece)))
        begin += len(piece)
    return spans


def segment_spans(text: str, segment: str) -> list[Span]:
    """Character spans of the units that `segment` describes (see the top of this file)."""
    if not isinstance(segment, str) or not segment:
        raise ValueError(f'segment is "sentence", a separator, "sep:..." or "re:...", not {segment!r}')
    if segment == "sentence":
        return sentence_spans(text)
    if segment == "message":
        raise ValueError('segment="message" is for chat(); a prompt has "sentence", a separator, "sep:..." or "re:..."')
    if segment.startswith("re:"):
        return regex_spans(text, segment[3:])
    separator = segment.removeprefix("sep:")
    if segment.isidentifier():  # "sentences", "shot": a misspelt word rather than a separator
        raise ValueError(f'segment is "sentence", a separator, "sep:{segment}" or "re:...", not {segment!r}')
    return separator_spans(text, separator)


def token_lengths(data: bytes, pieces: Sequence[bytes]) -> list[int]:
    """Bytes of `data` that each token stands for, given the tokens' own bytes.

    A token that the tokenizer added (BOS, the space SentencePiece puts in front) counts for the bytes of it that
    `data` has. ValueError if the tokens do not spell the data."""
    lengths, at = [], 0
    for piece in pieces:
        if data.startswith(piece, at):
            lengths.append(len(piece))
        elif piece[:1] == b" " and data.startswith(piece[1:], at):
            lengths.append(len(piece) - 1)
        else:
            lengths.append(0)
        at += lengths[-1]
    if at != len(data):
        raise ValueError("this model's tokenizer changes the text, so characters cannot be matched to tokens: "
                         "give spans in tokens")
    return lengths


def token_spans(text: str, spans: Sequence[Span], lengths: Sequence[int]) -> list[Span]:
    """Character spans -> token spans. A token belongs to the span in which its first byte lies.

    text: what was tokenized; lengths: its bytes by token, as token_lengths() gives them. A span in which no token
    begins vanishes. ValueError where spans overlap or leave the text."""
    spans = check_spans(spans, len(text), "characters")
    byte_at = [0]
    for char in text:
        byte_at.append(byte_at[-1] + len(char.encode("utf-8", "surrogateescape")))
    starts, at = [], 0
    for length in lengths:
        starts.append(at)
        at += length
    result, token = [], 0
    for begin, end in spans:
        # tokens of no bytes (BOS) begin where the next one does, but belong to no span
        while token < len(starts) and (starts[token] < byte_at[begin] or not lengths[token]):
            token += 1
        first = token
        while token < len(starts) and starts[token] < byte_at[end]:
            token += 1
        if first < token:
            result.append((first, token))
    return result


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # of any str, one character after the other


def _characters(data: bytes, spans: Sequence[Span]) -> list[Span]:
    """Spans of bytes, which do not cut a character -> of characters."""
    result, at, byte = [], 0, 0
    for begin, end in spans:
        first = at + len(data[byte:begin].decode("utf-8", "surrogatepass"))
        at, byte = first + len(data[begin:end].decode("utf-8", "surrogatepass")), end
        result.append((first, at))
    return result
