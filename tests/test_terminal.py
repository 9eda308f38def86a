"""`pykvc chat` in a terminal and with a pipe, `pykvc generate` in the model's template, the bar of a long prompt."""
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import pykvc
from pykvc import progress
from pykvc.cli import app
from pykvc.user_turn import user_turn
from tiny import write_chat

CHAT = [sys.executable, "-m", "pykvc.cli", "chat", "-t", "1", "-c", "512"]
CONTEXT = "Ann has three red apples and a dog. Bob has seven green pears and no dog at all. " * 4
LINE = re.compile(r"\[([0-9]+) tokens read, ([0-9]+) reused, ([0-9]+) answered at [0-9.]+ t/s; "
                  r"([0-9]+) cells, KV [0-9.]+ MiB(.*)\]")


def piped(tmp_path, lines: str | bytes, *args) -> subprocess.CompletedProcess:
    data = lines if isinstance(lines, bytes) else lines.encode()
    return subprocess.run([*CHAT, *map(str, args)], input=data, cwd=tmp_path, capture_output=True, timeout=300)


def invoke(*args, **how):
    return CliRunner().invoke(app, [str(arg) for arg in args], **how)


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, cwd, *args) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [*CHAT, *map(str, args)])
        self.seen = ""

    def until(self, pattern: str, seconds: float = 120) -> str:
        """What is printed up to a match, from the last one on."""
        begin = time.monotonic()
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() - begin < seconds, self.seen
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 4096).decode("utf-8", "replace")
        text, self.seen = self.seen[:found.end()], self.seen[found.end():]
        return text

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def status(self) -> int:
        """Its exit status, once it ends."""
        begin = time.monotonic()
        while time.monotonic() - begin < 60:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    os.read(self.fd, 4096)
                except OSError:  # nobody is at the other end
                    pass
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        pytest.fail("it does not end")


# -- chat --------------------------------------------------------------------------------------------------------------

def test_ctrl_c_stops_the_answer_and_not_the_program(model_path, tmp_path):
    terminal = Terminal(tmp_path, "-m", model_path, "-n", 400)
    assert "policy full" in terminal.until("> ")
    terminal.type("Tell me a long story about a cat.\n")
    terminal.until("cat.\r\n")
    terminal.until("[a-z]+ [a-z]+")  # it answers
    terminal.type("\x03")
    terminal.until("> ", 20)
    terminal.type("half a line")
    terminal.until("line", 20)
    time.sleep(0.2)  # until readline waits again: before, Python would hear of Ctrl-C only with the next key
    terminal.type("\x03")
    terminal.until("> ", 20)
    terminal.type("\n")
    assert "a message is a string that is not empty" in terminal.until("> ", 20)
    terminal.type("Say yes.\n")
    found = LINE.search(terminal.until(r"MiB.*\]"))
    assert int(found[2]) > 30 and int(found[3]) <= 400  # goes on from the answer that was stopped
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.status() == 0


def test_a_pipe(model_path, tmp_path):
    """Answers alone on stdout: those of LLM.chat()."""
    asked = ["Name a river.", "And a lake.", "And a hill."]
    lines = [*asked[:2], "/clear", asked[1], "/system You are a cat.", asked[2], "/exit", "no"]
    result = piped(tmp_path, "\n".join(lines), "-m", model_path, "-n", 8, "-sys", "Be brief.")
    with pykvc.LLM(model_path, n_ctx=512, n_threads=1) as llm:
        one, cat = llm.conversation("Be brief."), llm.conversation("You are a cat.")
        wanted = [one.ask(text, max_tokens=8).text for text in asked[:2]]
        one.clear()
        wanted += [one.ask(asked[1], max_tokens=8).text, cat.ask(asked[2], max_tokens=8).text]
    assert result.returncode == 0 and result.stdout.decode() == "".join(text + "\n" for text in wanted)
    lines = [LINE.fullmatch(line) for line in result.stderr.decode().splitlines()]
    assert len(lines) == 4 and all(lines) and [int(line[2]) > 0 for line in lines] == [False, True, True, True]
    assert "the answer was cut at -n" in lines[0][5]


def test_a_budget_alone_takes_the_policy_for_chats():
    from pykvc.terminal import with_policy
    given = {"kv_policy": None, "kv_budget": None, "kv_decode_budget": None, "kv_cells": "1024"}
    assert with_policy(given)["kv_policy"] == "snapkv"
    for own in ({"kv_policy": "keydiff"}, {"kv_cells": None}):
        assert with_policy({**given, **own}) == {**given, **own}


def test_a_conversation_goes_on_after_mistakes_and_at_n_ctx(model_path, tmp_path):
    long = "one two three four " * 100
    lines = f"Hi.\n\n{long}\n".encode() + b"Gr\xfc\xdfe\n" + b"What is it? Say something about it.\n" * 6 + b"Bye."
    result = piped(tmp_path, lines, "-m", model_path, "-n", 16, "-c", 256,
                   "--kv-policy", "snapkv:window=8", "--kv-budget", 64)
    says = result.stderr.decode().splitlines()
    assert result.returncode == 1 and len(says) == 10  # a line for each message, and none for the empty one
    assert "the message has" in says[1] and "n_ctx is 256" in says[1]
    assert says[2] == "the message is not UTF-8 text: its byte 2 is 0xfc"
    assert any("dropped at -c 256 and the rest was read again" in line for line in says)
    assert "without eviction)" in says[-1]


WRONG = """
import numpy as np, pykvc
class Wrong(pykvc.Policy):
    name = "wrong"
    def score(self, layer):
        return np.zeros(3)
"""


def test_an_error_after_the_first_token_has_a_line_of_its_own(model_path, tmp_path):
    """In chat and generate: that of an eviction comes once something was printed."""
    (tmp_path/"mine.py").write_text(WRONG)
    how = ["-m", model_path, "-n", 4, "--kv-policy", "mine:Wrong", "--kv-budget", 20]
    result = piped(tmp_path, "Name three rivers of Europe, please.\n/clear\nName two lakes.\n", *how)
    assert result.returncode == 1 and result.stdout.count(b"\n") == 2
    assert result.stderr.count(b"wrong.score() returns an array") == 2
    asked = [sys.executable, "-m", "pykvc.cli", "generate", "-c", "512", "-p", "Name three rivers of Europe."]
    result = subprocess.run([*asked, *map(str, how)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stdout.endswith("\n") and result.stderr.startswith("wrong.score() returns")


@pytest.mark.parametrize("args, says", [(["--temp", -1], "temperature"), (["-m", "no/such.gguf"], "does not exist"),
                                        (["-n", -2], "max_tokens"), (["--stop", ""], "stop is a string")])
def test_mistakes(model_path, args, says):
    result = invoke("chat", *(["-m", model_path] if "-m" not in args else []), *args)
    assert result.exit_code == 2 and not result.stdout
    assert says in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_model_without_a_template_does_not_chat(tmp_path):
    result = piped(tmp_path, "Hi\n", "-m", write_chat(tmp_path/"none.gguf", {}))
    assert result.returncode == 2 and result.stderr.startswith(b"this model has no chat template, so it cannot chat")


# -- generate ----------------------------------------------------------------------------------------------------------

def generated(*args) -> dict:
    result = invoke("generate", "-t", 1, "-c", 512, "--json", *args)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_generate_asks_in_the_template(model_path):
    asked = generated("-m", model_path, "-p", "What is the capital of France?", "-n", 12)
    raw = generated("-m", model_path, "-p", "The capital of France is", "-n", 4, "--raw")
    with pykvc.LLM(model_path, n_ctx=512, n_threads=1) as llm:
        said = [{"role": "user", "content": "What is the capital of France?"}]
        want = llm.chat(said, max_tokens=12)
        assert asked["tokens"] == want.tokens and asked["n_prompt"] == want.n_prompt
        want = llm.generate("The capital of France is", max_tokens=4)
        assert raw["tokens"] == want.tokens and raw["n_prompt"] == want.n_prompt
        system = generated("-m", model_path, "-p", said[0]["content"], "-n", 12, "-sys", "You are a cat.")
        cat = {"role": "system", "content": "You are a cat."}
        assert system["tokens"] == llm.chat([cat, *said], max_tokens=12).tokens


def test_generate_asks_a_question_of_a_text(model_path, tmp_path):
    """The question is in the same turn, and the eviction has not seen it."""
    (tmp_path/"context.txt").write_text(CONTEXT)
    answer = generated("-m", model_path, "-f", tmp_path/"context.txt", "--question", "What has Ann?", "-n", 8,
                       "--kv-policy", "shotkv:window=4", "--kv-budget", "60%", "--segment", "sentence")
    with pykvc.LLM(model_path, n_ctx=512, n_threads=1, kv_policy="shotkv:window=4", kv_budget="60%") as llm:
        turn = user_turn(llm._session.model, CONTEXT, "What has Ann?")
        assert turn.head.endswith(CONTEXT) and turn.tail.startswith("What has Ann?<|im_end|>")
        context = llm.context(turn.head, spans=turn.spans(pykvc.llm.units.sentence_spans(CONTEXT)), span_unit="chars")
        context.compress()
        assert answer["tokens"] == context.ask(turn.tail, max_tokens=8).tokens and answer["kv"]["kept"] == context.kept


def test_models_without_a_template_go_on_from_the_text(tmp_path):
    path = write_chat(tmp_path/"none.gguf", {})
    assert generated("-m", path, "-p", "abc", "-n", 2)["n_prompt"] == 3
    result = invoke("generate", "-m", path, "-p", "abc", "-sys", "S")
    assert result.exit_code == 2 and "a system message is for a model with a chat template" in result.stderr


def test_turns_of_templates_that_strip_or_change(tmp_path):
    strips = "[{{ messages[-1].content | trim }}] A:"
    with pykvc.LLM(write_chat(tmp_path/"a.gguf", {"default": strips}), n_ctx=256) as llm:
        turn = user_turn(llm._session.model, "  One. Two.\n")
        assert (turn.head, turn.tail) == ("[One. Two.] A:", "")
        assert [turn.head[a:b] for a, b in turn.spans([(0, 7), (7, 12)])] == ["One. ", "Two."]
        turn = user_turn(llm._session.model, " One.", "Why? ")
        assert (turn.head, turn.tail) == ("[One.", "Why?] A:")
        with pytest.raises(ValueError, match="the chat template changes the text"):
            user_turn(llm._session.model, "One", template="{{ messages[0].content | upper }}")


# -- progress ----------------------------------------------------------------------------------------------------------

def test_progress_changes_nothing(model_path):
    """It is told after each n_batch tokens."""
    told, text = [], CONTEXT
    finch = dict(kv_policy="finch:window=32", kv_cells=256, n_ubatch=64)
    for policy in ({}, dict(kv_policy="snapkv", kv_budget=48), finch):
        query = {"kv_query": "Who?"} if "finch" in str(policy) else {}
        with pykvc.LLM(model_path, n_ctx=512, n_batch=64, n_threads=1, **policy) as llm:
            silent = llm.generate(text, max_tokens=6, **query)
            logits, told[:] = llm.logits(), []
            llm._session.progress = lambda done, total: told.append((done, total))
            answer = llm.generate(text, max_tokens=6, **query)
            assert answer.tokens == silent.tokens and answer.kv["kept"] == silent.kv["kept"]
            assert (llm.logits() == logits).all()
            assert told[0] == (0, answer.n_prompt) and told[-1] == 2*(answer.n_prompt,) and len(told) > 2


def test_the_bar_shows_itself_for_a_long_prompt_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress, "perf_counter", lambda: now[0])
    for seconds, shows in ((0.1, False), (0.9, True)):
        bar = progress.PromptBar()
        bar(0, 1000)
        for done in (300, 600):
            now[0] += seconds
            bar(done, 1000)
            assert bool(bar._bars) == shows
        bar(1000, 1000)
        assert bar._bars is None
    with progress.prompt_bar(session := type("", (), {"progress": None})()):
        assert session.progress is None  # no terminal
