"""Where the units of a prompt begin and end: text -> character spans -> token spans.

A span is a half-open pair (begin, end). Spans are ascending and disjoint; what lies outside every span (a system
prompt, the final question) is never evicted by a policy that works on spans.

    segment="sentence"     a sentence and the white space after it. It ends with . ! ? and what closes it before white space, with 。！？,
                           or with an empty line; a line break alone ends none. llama-server and the engine find the same (cpp/spans.h).
    segment="\\n\\n"         a separator; "sep:..." says the same and may be any string
    segment="re:^Q: "      a regular expression that matches where a unit begins (re.MULTILINE)
"""
import re
from typing import Callable, Sequence

from . import _core

Span = tuple[int, int]
Render = Callable[[Sequence[dict]], str]  # of a chat; ValueError: the template refuses it

MARK = re.compile("\ue000(\\d+)\ue001")  # stands for the content of a message, by its number, between characters that no text has


def check_spans(spans: Sequence[Span], n: int, what: str = "tokens") -> list[Span]:
    """The spans, ascending, as plain ints. ValueError where one is empty, leaves [0, n) or overlaps another."""
    try:
        ascending = sorted((int(begin), int(end)) for begin, end in spans)
    except (TypeError, ValueError):
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


def message_spans(prompt: str, messages: Sequence[dict], render: Render, eos: str = "") -> list[Span]:
    """Character spans of the messages of a chat in its prompt, each with the template's marks around it.

    prompt: of all messages. render: the template of some, without the beginning of an answer. eos: what it may write instead of that.
    In no span: system messages, the last message, which is the question, and what the template itself puts first (a default system prompt, tools).
    A message whose marks cannot be told, since the template refuses a chat that ends with it, is a span without them; one whose content the
    template rewrites or leaves out is in none."""
    found = _contents(prompt, messages, render)
    ends = [_end(prompt, messages, i, found, render, eos) for i in range(len(messages))]
    begins = [ends[i - 1] if i and ends[i - 1] is not None else _begin(prompt, message["role"], found[i], render, eos) for i, message in enumerate(messages)]
    spans: list[Span] = []
    for i, (message, content) in enumerate(zip(messages[:-1], found)):
        begin = content[0] if begins[i] is None and content else begins[i]
        end = ends[i] if ends[i] is not None else content[1] if content else begins[i + 1]
        last = spans[-1][1] if spans else 0
        if message["role"] != "system" and begin is not None and end is not None and last <= begin < end:
            spans.append((begin, end))
    return spans


def _contents(prompt: str, messages: Sequence[dict], render: Render) -> list[Span | None]:
    """Where each message's content is in the prompt; None: nowhere, or more than once. A chat of the same shape shows what is around it."""
    parts = MARK.split(_rendered(render, _marked(messages)) or "")  # what the template writes, a message's number, what it writes, a number ...
    spans: list[tuple[int, Span]] = []
    at = len(parts[0]) if prompt.startswith(parts[0]) else -1
    for i, after in zip(map(int, parts[1::2]), parts[2::2]):
        text = next((text for text in _as_written(messages[i]["content"]) if prompt.startswith(text + after, at)), None) if at >= 0 else None
        if text:
            spans.append((i, (at, at + len(text))))
        if text is None and at >= 0:  # rewritten: the next one may be found again
            at = prompt.find(after, at) if after else -1
        if at >= 0:
            at += len(text or "") + len(after)
    return [next((span for j, span in spans if j == i), None) if parts[1::2].count(str(i)) == 1 else None for i in range(len(messages))]


def _end(prompt: str, messages: Sequence[dict], i: int, found: Sequence[Span | None], render: Render, eos: str) -> int | None:
    """Where message i ends in the prompt, with its marks: behind what the template writes last in a chat that ends with it."""
    content, later = found[i], min((span[0] for span in found[i + 1:] if span), default=len(prompt))
    if content:
        at, texts = content[1], _tails(messages[:i + 1], render, eos)
    else:
        at, texts = 0, [_rendered(render, messages[:i + 1])]
    least = max(at, *(span[1] for span in found[:i] if span and not content), 0)
    return next((at + len(text) for text in texts if text is not None and prompt.startswith(text, at) and least <= at + len(text) <= later), None)


def _begin(prompt: str, role: str, content: Span | None, render: Render, eos: str) -> int | None:
    """Where a message begins: before the marks that one of its role has in the middle of a chat."""
    other = [{"role": one, "content": "a"} for one in (role, "assistant", role)]
    between = MARK.split(_rendered(render, _marked(other)) or "")[4:5]
    for tail in _tails(other[:2], render, eos) if content and between else []:
        marks, before = between[0][len(tail):], prompt[:content[0]]
        if between[0].startswith(tail) and (before.endswith(marks) or marks.endswith(before)):  # the first one lacks a BOS of its own
            return max(0, len(before) - len(marks))
    return None


def _marked(messages: Sequence[dict]) -> list[dict]:
    return [{**m, "content": f"\ue000{i}\ue001"} if isinstance(m.get("content"), str) and m["content"] else m for i, m in enumerate(messages)]


def _tails(messages: Sequence[dict], render: Render, eos: str) -> list[str]:
    """What the template writes after the last message's content, with and without eos; nothing if it refuses the messages, or writes no content."""
    *_, number, tail = ["", *MARK.split(_rendered(render, _marked(messages)) or "")]
    return [tail, tail.removesuffix(eos)] if number == str(len(messages) - 1) else []


def _rendered(render: Render, messages: Sequence[dict]) -> str | None:
    try:
        return render(messages)
    except ValueError:
        return None


def _as_written(content: str) -> list[str]:
    """What templates make of a content: itself, without the white space around it, without its thoughts."""
    answer = content.rpartition("</think>")[2]
    return [written for text in (content, answer) for written in (text, text.lstrip("\n"), text.lstrip(), text.rstrip(), text.strip())]


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
