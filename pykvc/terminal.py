"""`pykvc chat`: a conversation in the terminal, or with a pipe, one message a line.

Answers go to stdout. All else goes to stderr: what there is to type, a bar while a long prompt is read, a line after
each answer that says what it took, and mistakes, after which the conversation goes on.
"""
import sys
from typing import Any, Iterable

from rich.console import Console

from . import chat, command
from .conversation import Conversation
from .generation import Generation
from .llm import LLM
from .progress import prompt_bar
from .sampling import Sampler, SamplingParams
from .table import mebibytes

POLICY = "snapkv"  # each eviction comes after a message, whose words say what is needed: docs/guide.md, Chats
COMMANDS = ("/clear forgets the conversation, /system TEXT begins a new one, Ctrl-C stops an answer, "
            "/exit or Ctrl-D ends")


class Talk:
    """how: what Conversation.ask() takes beside the message. ValueError names a value that it does not take."""

    def __init__(self, llm: LLM, system: str | None, how: dict[str, Any]) -> None:
        if llm.chat_template is None and not chat.templates(llm._session.model):
            raise ValueError("this model has no chat template, so it cannot chat: `pykvc generate` goes on from a text")
        Sampler(llm._session.model, SamplingParams(**how), llm.seed)
        self.llm, self.how, self.conversation = llm, how, Conversation(llm, system)
        self.typed = sys.stdin.isatty()
        self.console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        self.n_refused = 0
        self.notes: list[str] = []  # after an answer, which they would stand in the middle of
        llm._session.tell = self.notes.append

    def run(self) -> None:
        if self.typed:
            try:
                import readline  # noqa: F401  input() edits lines with it, where there is one
            except ImportError:
                pass
            about = f"{self.llm.path.name}, n_ctx {self.llm.n_ctx}, policy {self.llm.policy}"
            self.console.print(f"{about}\n{COMMANDS}", style="dim")
        while True:
            try:
                line = self._read()
                if line is None or line.strip() == "/exit":
                    return
                self.take(line)
            except ValueError as error:
                self.n_refused += 1
                self.console.print(command.one_line(error))
            except KeyboardInterrupt:
                if not self.typed:
                    raise
                self.console.print()  # the answer, or what was typed, ends here

    def _read(self) -> str | None:
        """The next message; None at the end."""
        if self.typed:
            try:
                return input("> ")
            except EOFError:
                self.console.print()
                return None
        line = sys.stdin.buffer.readline()
        try:
            return line.decode().rstrip("\r\n") if line else None
        except UnicodeDecodeError as error:
            byte = f"{line[error.start]:#04x}"
            raise ValueError(f"the message is not UTF-8 text: its byte {error.start} is {byte}") from None

    def take(self, line: str) -> None:
        """A message, or a command."""
        command, _, rest = line.strip().partition(" ")
        if command == "/clear" and not rest:
            self.conversation.clear()
        elif command == "/system":
            self.conversation = Conversation(self.llm, rest.strip())
        elif self.typed or line.strip():
            self._ask(line)

    def _ask(self, line: str) -> None:
        with prompt_bar(self.llm._session):
            answer = self.conversation.ask(line, stream=True, **self.how)
            try:
                say(answer)
            finally:
                answer.close()  # Ctrl-C: what was said so far is part of the conversation
        print(flush=True)
        self.console.print("\n".join([told(answer.result, self.llm), *self.notes]), style="dim")
        self.notes.clear()


def say(pieces: Iterable[str]) -> None:
    """As they come. What was said of an answer that fails is a line of its own."""
    piece = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except ValueError:
        if piece:
            print(flush=True)
        raise


def with_policy(opening: dict[str, Any]) -> dict[str, Any]:
    """What LLM() takes, with the policy that is best in a chat where a budget or cells are given and no policy."""
    if opening["kv_policy"] is None and any(opening[name] for name in ("kv_budget", "kv_decode_budget", "kv_cells")):
        print(f"kv_policy: {POLICY}, the recommended one for a chat without a policy", file=sys.stderr)
        return {**opening, "kv_policy": POLICY}
    return opening


def told(answer: Generation, llm: LLM) -> str:
    """What an answer took, in one line."""
    kv, reused, kept = answer.kv, answer.kv["reused"], llm.stats()["kept"]
    speed = f"{answer.timings['decode_tps']:.1f} t/s"
    tokens = f"{answer.n_prompt} tokens read, {reused} reused, {answer.n_predicted} answered at {speed}"
    memory = mebibytes(kv["bytes_used"])
    if kv["bytes_used"] < kv["bytes_full"]:
        memory += f" ({mebibytes(kv['bytes_full'])} without eviction)"
    parts = [tokens, f"{sum(kept)/len(kept):.0f} cells, KV {memory}"]
    if answer.stop_reason == "length":
        parts.append("the answer was cut at -n")
    if answer.stop_reason == "context":
        parts.append(f"the answer was cut at -c {llm.n_ctx}")
    if kv["dropped"]:
        turns = "the oldest turn was" if kv["dropped"] == 1 else f"the {kv['dropped']} oldest turns were"
        parts.append(f"{turns} dropped at -c {llm.n_ctx} and the rest was read again")
    elif kv["anew"]:
        parts.append(f"all was read again: {kv['anew']}")
    return "[" + "; ".join(parts) + "]"
