"""A conversation: it keeps its messages, and each turn goes on from what the cache holds.

    conv = llm.conversation(system="You are terse.")
    print(conv.ask("Name three rivers.").text)
    for piece in conv.ask("And three lakes?", stream=True):   # only these words are evaluated
        print(piece, end="")
    print(conv.messages)

It may be longer than the cache: with kv_cells the policy evicts whenever the cells are full. Where it reaches n_ctx,
its oldest turns are dropped and the rest is evaluated once more. One LLM holds one conversation at a time: where two
take turns, each is evaluated anew.
"""
import threading
import weakref
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generator, Literal, Sequence, overload

from . import chat, sampling
from .chat import Message
from .context import Mark

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .arguments import Chat
    from .generation import Generation, Stream
    from .llm import LLM

N_ANSWER = 512  # tokens, unless a caller says otherwise


class Conversation:
    """llm.conversation() makes it. messages: those that the model is shown, the oldest may have been dropped."""

    def __init__(self, llm: "LLM", system: str | None = None, messages: Sequence[Message] = (),
                 **template: Any) -> None:
        if system is not None and not isinstance(system, str):
            raise ValueError(f"system is a string, not {system!r}")
        if unknown := template.keys() - {"tools", "enable_thinking", "chat_template_kwargs"}:
            raise ValueError(f"a conversation has no {min(unknown)}: it takes tools, enable_thinking and "
                             "chat_template_kwargs")
        if llm.chat_template is None:
            chat.template_of(llm._session.model)
        head: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages = chat.check_messages([*head, *messages]) if head or messages else []
        self._llm, self._template = llm, template
        self._turn = threading.RLock()  # of threads that share it: one question after the other
        self._asked: weakref.ref[Generator[str, None, Generation]] | None = None

    @overload
    def ask(self, text: str, *, stream: Literal[False] = ..., **how: "Unpack[Chat]") -> "Generation": ...
    @overload
    def ask(self, text: str, *, stream: Literal[True], **how: "Unpack[Chat]") -> "Stream": ...
    @overload
    def ask(self, text: str, *, stream: bool, **how: "Unpack[Chat]") -> "Generation | Stream": ...

    def ask(self, text: str, *, stream: bool = False, **how: Any) -> "Generation | Stream":
        """Says something and has the model answer. how: max_tokens (512), temperature, stop, kv_budget ... as LLM.generate().

        Both become messages when the answer ends; one that is broken off (Ctrl-C, Stream.close()) as far as it came.
        A Generation's kv has, beside what LLM.chat() tells, `dropped`: turns that n_ctx had no room for any more.
        Turns are dropped until half of what a prompt may take is free again. Room is kept for max_tokens, at most half
        of n_ctx. ValueError, and nothing has changed: an empty message, one that n_ctx has no room for, or one that
        leaves more to be kept than kv_budget holds, which is found after the first token."""
        with self._turn:
            pieces = self._say(text, how)
            if stream:
                return pieces
            for _ in pieces:
                pass
            return pieces.result

    def _say(self, text: str, how: dict[str, Any]) -> "Stream":
        from .generation import Stream
        self.end()
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"a message is a string that is not empty, not {text!r}")
        if how.get("echo"):
            raise ValueError("echo: a conversation's answer is a message, which has no prompt in it")
        own = {name: how.pop(name) for name in sampling.NAMES & how.keys()}
        how["sampling_params"] = chosen = sampling.of_call(how.get("sampling_params"), own, max_tokens=N_ANSWER)
        asked, n_dropped = self._fitting([*self.messages, {"role": "user", "content": text}], chosen.max_tokens)
        before = Mark(self._llm._session, cells=False)
        inner = self._llm.chat(asked, stream=True, **self._template, **how)
        answer = self._answer(asked, inner, n_dropped, before, self._llm._turns.number)
        self._asked = weakref.ref(answer)
        return Stream(answer)

    def _answer(self, asked: list[Message], pieces: "Stream", n_dropped: int, before: Mark,
                number: int) -> Generator[str, None, "Generation"]:
        """before: the cache then; number: of the turn that the LLM gave."""
        said = []
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        except BaseException as error:  # what nobody answered was not said
            if isinstance(error, Exception) and self._llm._turns.number == number:
                self._take_back(before)
            elif said:
                self.messages = [*asked, _assistant("".join(said))]
            raise
        self.messages = [*asked, _assistant(pieces.result.text)]
        return replace(pieces.result, kv={**pieces.result.kv, "dropped": n_dropped})

    def _take_back(self, before: Mark) -> None:
        """A message that failed: its prompt could not be evicted, say. The cache is as it was, or empty where it cannot
        go back: then the next message has all evaluated anew."""
        with self._llm._turns:
            try:
                if before.n_tokens:
                    before.return_to()
                    return
            except ValueError:
                pass
            self._llm._session.clear()

    def end(self) -> None:
        """Breaks off an answer that is still being streamed."""
        answer = self._asked() if self._asked else None
        if answer is not None:
            with suppress(ValueError):  # another thread reads it just now, and the model's next call ends it
                answer.close()

    def clear(self) -> None:
        """Forgets all messages but the system's."""
        self.end()
        self.messages = [message for message in self.messages if message["role"] == "system"]

    # -- n_ctx ------------------------------------------------------------------------------------------------------

    def _fitting(self, messages: list[Message], max_tokens: int) -> tuple[list[Message], int]:
        """(messages that leave room for the answer, turns dropped)."""
        n_ctx, n_dropped = self._llm.n_ctx, 0
        n_most = n_ctx - max(min(max_tokens if max_tokens >= 0 else n_ctx//4, n_ctx//2), 1)
        n = self._count(messages)
        while n > (n_most//2 if n_dropped else n_most) and (fewer := without_oldest_turn(messages)):
            messages, n_dropped = fewer, n_dropped + 1
            n = self._count(messages)
        if n >= n_ctx:
            raise ValueError(f"the message has {n} tokens, with the template's and the system message, but n_ctx is "
                             f"{n_ctx} and the answer needs one")
        return messages, n_dropped

    def _count(self, messages: list[Message]) -> int:
        template = dict(self._template)
        variables = template.pop("chat_template_kwargs", None) or {}
        return len(self._llm.tokenize(self._llm.apply_chat_template(messages, **template, **variables)))


def without_oldest_turn(messages: list[Message]) -> list[Message] | None:
    """Without the first user's message and all up to the next one; None: there is only one."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if len(users) < 2:
        return None
    return [message for message in messages[:users[1]] if message["role"] == "system"] + messages[users[1]:]


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
