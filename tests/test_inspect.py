"""pykvc inspect: what the page says is what the cache holds."""
import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from typer.testing import CliRunner

import pykvc
from pykvc import inspect
from pykvc.cli import app

SHOTS = [f"Q: {i} + {i}?\nA: {2*i}, naïve 🙂\n\n" for i in range(2, 14)]
PROMPT = "Add. <script>alert(1)</script></script><!-- &amp; \n\n" + "".join(SHOTS)
HOW = dict(n_ctx=1024, n_threads=2)


@pytest.fixture(scope="module")
def found() -> inspect.Inspection:
    return inspect.look(PROMPT, "Q: 3 + 4?\nA:", segment="re:^Q: ", kv_policy="shotkv:window=8,recent=8", kv_budget=0.5, **HOW)


class Page(HTMLParser):
    """What the browser would see: tags, and the data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.data = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][1].get("id") == "data":
            self.data += data


def test_counts_are_those_of_kept(found):
    with pykvc.LLM(kv_policy="shotkv:window=8,recent=8", kv_budget=0.5, **HOW) as llm:
        llm.prefill(PROMPT, segment="re:^Q: ")
        llm.compress()
        llm.prefill("Q: 3 + 4?\nA:", spans=())
        kept, spans = llm.kept(), llm._session.spans
        n = llm.n_tokens
    assert found.kept.shape == (len(kept), n) == found.mass.shape
    for il, layer in enumerate(kept):
        assert (found.kept[il] == [(layer == i).sum() for i in range(n)]).all()
    assert found.spans == spans and len(spans) == len(SHOTS) and found.n_prompt < n and "".join(found.pieces) == PROMPT + "Q: 3 + 4?\nA:"
    assert (found.kept[:, found.n_prompt:] == found.n_head_kv).all() and (found.kept[:, found.spans[0][0]:found.n_prompt] == 0).any()


def test_attention_sums_to_1_and_is_the_engines(found):
    assert found.mass.sum(axis=1) == pytest.approx(1, abs=1e-3) and ((0 < found.held) & (found.held <= 1.001)).all()
    with pykvc.LLM(kv_policy="snapkv:window=32,kernel=1", kv_budget="100%", **HOW) as llm:
        llm.prefill(PROMPT)
        llm.prefill("Q: 3 + 4?\nA:")
        theirs = np.stack(llm.scores()).mean(axis=1)[:, :-32]  # its window is always kept
    assert found.mass[:, :-32] == pytest.approx(theirs, abs=1e-4)


def test_full_holds_all_attention():
    found = inspect.look(PROMPT, **HOW)
    assert found.held == pytest.approx(1, abs=1e-3) and (found.kept_share == 1).all() and found.spans == [] and found.n_prompt == found.n_tokens


def test_parts_cover_every_token_once(found):
    names = [name for name, _ in found.parts()]
    assert names == ["before the spans", "spans", "question"]
    at = sorted(i for _, ranges in found.parts() for a, b in ranges for i in range(a, b))
    assert at == list(range(found.n_tokens))
    *rows, sinks = found.regions()
    assert sum(row["n_tokens"] for row in rows) == found.n_tokens and sum(row["mass"] for row in rows) == pytest.approx(1, abs=1e-3)
    assert sinks["n_tokens"] == 4 and found.regions(3)[1]["kept"] == pytest.approx(found.kept[3][found.spans[0][0]:found.spans[-1][1]].mean()/found.n_head_kv)


def test_the_page_is_one_file_and_the_prompt_no_html(found):
    text = inspect.page(found)
    page = Page(text)
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    assert not [attrs for _, attrs in page.tags for name in ("src", "href") if attrs.get(name, "data:").partition(":")[0] != "data"]
    assert not re.search(r"@import|url\(|https?://", text.replace(page.data, ""))
    data = json.loads(page.data)
    assert "".join(data["pieces"]).startswith(PROMPT) and "<" not in page.data
    assert [tuple(span) for span in data["spans"]] == found.spans and data["n_prompt"] == found.n_prompt
    kept = np.frombuffer(base64.b64decode(data["kept"]), "<u2").reshape(found.kept.shape)
    assert (kept == found.kept).all() and len(data["regions"]) == len(found.kept) + 1
    mass = np.frombuffer(base64.b64decode(data["mass"]), "<u2").reshape(found.mass.shape)/65535*data["mass_scale"]
    assert mass == pytest.approx(found.mass, abs=data["mass_scale"]/65535)


def test_heads_that_keep_different_numbers():
    found = inspect.look(PROMPT, kv_policy="adakv:window=8", kv_budget=64, **HOW)
    assert found.kept.sum(axis=1) == pytest.approx(64*found.n_head_kv)


def test_characters_of_several_tokens():
    assert inspect.texts([b"a", b"\xc3", b"\xbc!", b"\xff", b"\x00"]) == ["a", "ü", "!", "\\xff", "\\x00"]


def test_command_line_writes_page_and_picture(tmp_path):
    (tmp_path/"p.txt").write_text(PROMPT, encoding="utf-8")
    out = [str(tmp_path/name) for name in ("out.html", "out.png")]
    result = CliRunner().invoke(app, ["inspect", "-f", str(tmp_path/"p.txt"), "--kv-policy", "snapkv:window=8", "--kv-budget", "25%", "-c", "1024", "-t", "2",
                                      "-o", out[0], "-o", out[1]])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split() == out and (tmp_path/"out.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(Page((tmp_path/"out.html").read_text(encoding="utf-8")).data)["policy"].startswith("snapkv:window=8")


@pytest.mark.parametrize("args, says", [
    (["-p", "a", "-o", "out.gif"], ".html"), (["-p", "a", "-o", "nowhere/out.html"], "no such folder"), (["-p", "a"], "--output"), (["-o", "a.html"], "-p TEXT"),
    (["-p", "a b c", "-o", "a.html", "--kv-policy", "snapvk"], "snapkv"), (["-p", "a b c", "-o", "a.html", "--kv-policy", "snapkv"], "--kv-budget"),
    (["-p", "a b c", "-o", "a.html", "--segment", "re:("], "regular expression"), (["-p", "a b c", "-o", "a.html", "--window", "0"], "window"),
    (["-p", "a "*600, "-o", "a.html", "-c", "256"], "n_ctx"), (["-f", "nowhere.txt", "-o", "a.html"], "nowhere.txt")])
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["inspect", *args])
    assert result.exit_code == 2 and says in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())
