"""A ratio of a prompt so short that the policy keeps all of it has no effect, and that is said: once."""
import pytest
from typer.testing import CliRunner

import pykvc
from pykvc.cli import app

SHORT, LONG = "The cat sat on the mat.", "The cat sat on the mat. The dog lay on the rug. "*12
SAYS = "tokens stay, since snapkv always keeps some of a prompt (its first or last ones, or those in no span)"


@pytest.fixture
def half(model_path):
    with pykvc.LLM(model_path, n_ctx=1024, n_threads=1, kv_policy="snapkv", kv_budget="50%") as llm:
        yield llm


def ask(llm, prompt, **how):
    return llm.generate(prompt, max_tokens=1, **how)


@pytest.mark.parametrize("call", [
    ask,
    lambda llm, prompt: list(llm.generate(prompt, max_tokens=1, stream=True)),
    lambda llm, prompt: llm.chat([{"role": "user", "content": "Hi"}], max_tokens=1),
    lambda llm, prompt: (llm.prefill(prompt), llm.compress()),
    lambda llm, prompt: llm.context(prompt).compress(),
    lambda llm, prompt: llm.generate_batch([prompt, prompt], max_tokens=1),
], ids=["generate", "stream", "chat", "compress", "context", "batch"])
def test_it_is_said_once(half, call, capfd):
    call(half, SHORT)
    said = capfd.readouterr().err
    assert said.startswith("kv_budget 0.5: all ") and SAYS in said and said.count("\n") == 1
    call(half, SHORT)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("prompt, budget", [(LONG, None), (SHORT, 1.0), (SHORT, 64)], ids=["long", "the whole", "tokens"])
def test_and_only_then(half, prompt, budget, capfd):
    ask(half, prompt, kv_budget=budget)
    assert capfd.readouterr().err == ""


def test_tokens_outside_every_span(model_path, capfd):
    """A chat of one message stays whole under shotkv (docs/server.md)."""
    with pykvc.LLM(model_path, n_ctx=512, n_threads=1, kv_policy="shotkv:window=8", kv_budget=50) as llm:
        assert llm.chat([{"role": "user", "content": LONG}], max_tokens=1).kv["evictions"] == 0
        assert "kv_budget 50: all " in capfd.readouterr().err


def test_a_prompt_that_grows_is_silent_once_it_is_evicted(half, capfd):
    assert set(ask(half, LONG).kv["kept"]) != {len(half.tokenize(LONG))}
    ask(half, SHORT, reset=False)
    assert capfd.readouterr().err == ""


def test_the_shell_says_it_after_the_answer(model_path):
    how = ["-m", model_path, "-t", 1, "--kv-policy", "snapkv", "--kv-budget", "50%", "-n", 2]
    result = CliRunner().invoke(app, [str(arg) for arg in ["generate", "--raw", "-p", SHORT, *how]])
    figures, note = result.stderr.splitlines()
    assert " t/s" in figures and SAYS in note and SAYS not in result.stdout

    result = CliRunner().invoke(app, [str(arg) for arg in ["chat", *how]], input="Hi\nHi again\n")
    line, note, second = result.stderr.splitlines()
    assert line.startswith("[") and SAYS in note and second.startswith("[") and SAYS not in result.stdout
