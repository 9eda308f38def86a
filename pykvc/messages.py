"""Where the messages of a chat are in its prompt.

    <|im_start|>user\\nOne?<|im_end|>\\n      a message with the template's marks around it: a span
                     ----                  its content

A template is a program that says nothing of what it writes for which message. So it is asked again: chats of the same
shape, with a mark in the place of each content, show what stands between contents, and chats that end with a message
show what ends it.
"""
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Callable, Sequence

from .chat import Message
from .spans import Span

Render = Callable[[Sequence[Message]], str]  # ValueError: the template refuses these messages

MARK = re.compile("\ue000(\\d+)\ue001")  # a message's number, between characters that no text has


def message_spans(prompt: str, messages: Sequence[Message], render: Render, eos: str = "") -> list[Span]:
    """Character spans of the messages of a chat in its prompt, each with the template's marks around it.

    prompt: of all messages. render: the template of some, without the beginning of an answer. eos: what it may write
    in the place of that.

    In no span: system messages; the last message, which is the question; what the template itself puts first, as a
    default system prompt. A message whose marks cannot be told, since the template refuses a chat that ends with it,
    is a span without them. A message whose content the template rewrites or leaves out is in none."""
    chat, spans, last = _Chat(prompt, messages, render, eos), [], 0
    for i, message in enumerate(messages[:-1]):
        begin, end = chat.begin(i), chat.end(i)
        if message["role"] != "system" and begin is not None and end is not None and last <= begin < end:
            spans.append((begin, end))
            last = end
    return spans


@dataclass(frozen=True)
class _Chat:
    prompt: str
    messages: Sequence[Message]
    render: Render
    eos: str

    def begin(self, i: int) -> int | None:
        """Where message i begins: with its marks if they are known, else with its content. None: nobody knows."""
        content, known = self._contents[i], self._marks_begin(i)
        return content[0] if known is None and content else known

    def end(self, i: int) -> int | None:
        content, known = self._contents[i], self._ends[i]
        if known is None:
            return content[1] if content else self._marks_begin(i + 1)
        return known

    @cached_property
    def _ends(self) -> list[int | None]:
        return [self._marks_end(i) for i in range(len(self.messages))]

    @cached_property
    def _contents(self) -> list[Span | None]:
        """Where each content is. None: nowhere as it was given, or more than once."""
        before, *parts = MARK.split(self._text(_marked(self.messages)))
        found: dict[int, list[Span]] = {}
        at = len(before) if self.prompt.startswith(before) else -1
        for i, after in zip(map(int, parts[::2]), parts[1::2]):
            texts = _as_written(self.messages[i]["content"]) if at >= 0 else []
            text = next((text for text in texts if self.prompt.startswith(text + after, at)), None)
            if text is None:  # rewritten: the next one may be found again
                at = self.prompt.find(after, at) if after and at >= 0 else -1
            else:
                found.setdefault(i, []).append((at, at + len(text)))
            at = at + len(text or "") + len(after) if at >= 0 else -1
        spans = [found.get(i, []) for i in range(len(self.messages))]
        return [span[0] if len(span) == 1 and span[0][0] < span[0][1] else None for span in spans]

    def _marks_end(self, i: int) -> int | None:
        """Behind what the template writes last in a chat that ends with message i."""
        content = self._contents[i]
        before = [span[1] for span in self._contents[:i] if span and not content]
        after = [span[0] for span in self._contents[i + 1:] if span]
        at, least, most = content[1] if content else 0, max(before, default=0), min(after, default=len(self.prompt))
        for text in self._tails(self.messages[:i + 1]) if content else [self._text(self.messages[:i + 1])]:
            if self.prompt.startswith(text, at) and (text or content) and least <= at + len(text) <= most:
                return at + len(text)
        return None

    def _marks_begin(self, i: int) -> int | None:
        """Where the message before ends; else before the marks that a message of this role has in mid-chat."""
        ended, content = self._ends[i - 1] if i else None, self._contents[i]
        if ended is not None or content is None:
            return ended
        role = self.messages[i]["role"]
        other = [{"role": one, "content": "a"} for one in (role, "assistant", role)]
        between = (MARK.split(self._text(_marked(other))) + [""]*5)[4]
        before = self.prompt[:content[0]]
        for tail in self._tails(other[:2]):
            marks = between[len(tail):]
            if between.startswith(tail) and (before.endswith(marks) or marks.endswith(before)):
                return max(0, len(before) - len(marks))  # 0: a first message that has no BOS of its own
        return None

    def _tails(self, messages: Sequence[Message]) -> list[str]:
        """What the template writes after the last message's content, with and without eos; [] if it writes none."""
        *_, number, tail = ["", *MARK.split(self._text(_marked(messages)))]
        return [tail, tail.removesuffix(self.eos)] if number == str(len(messages) - 1) else []

    def _text(self, messages: Sequence[Message]) -> str:
        """"" if the template refuses them."""
        try:
            return self.render(messages)
        except ValueError:
            return ""


def _marked(messages: Sequence[Message]) -> list[Message]:
    texts = [isinstance(message.get("content"), str) and message["content"] for message in messages]
    return [{**m, "content": f"\ue000{i}\ue001"} if text else m for i, (m, text) in enumerate(zip(messages, texts))]


def _as_written(content: str) -> list[str]:
    """What templates make of a content: itself, without the white space around it, without its thoughts."""
    texts = content, content.rpartition("</think>")[2]
    return [cut for text in texts for cut in (text, text.lstrip("\n"), text.lstrip(), text.rstrip(), text.strip())]
