"""The Python of README and docs runs as it stands, on SmolLM2; links and pages are there."""
import json
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

import pykvc
from evals.tools.served import Server

ROOT = Path(__file__).parent.parent
PAGES = [ROOT/"README.md", *sorted((ROOT/"docs").glob("*.md")), ROOT/"docs/results/README.md"]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
BLOCKS = [pytest.param(page, block, id=f"{page.stem}-{i}") for page in PAGES if page.stem not in ("server", "tutorial")
          for i, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))]
GIVEN = {  # what the blocks have from elsewhere
    "report": "The report was written in May. Ada Lovelace signed it. " * 6,
    "prompt": "".join(f"Q: {a} + 1?\nA: {a + 1}\n\n" for a in range(30)),
    "question": "Q: 7 + 1?\nA:",
    "prompts": ["One, two,", "Red, green,", "Rome is"],
    "questions": ["Q: 7 + 1?\nA:", "Q: 8 + 1?\nA:"],
    "examples": [f"Q: {a} + 1?\nA: {a + 1}\n\n" for a in range(10)],
    "documents": ["A cat sat on a mat. " * 4, "A dog sat on a log. " * 4],
}


@pytest.mark.parametrize("page,block", BLOCKS)
def test_it_runs(page, block, model_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"model.gguf").symlink_to(model_path)
    names = dict(GIVEN)
    exec(compile("import pykvc\n" + block, str(page), "exec"), names)
    if "kv_policy=\"shotkv\", kv_budget=\"25%\") as llm:  # no model" in block:  # whose output README shows
        shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
        assert all(line in page.read_text(encoding="utf-8") for line in shown) and "Rome" in shown[0]


NUMBER = re.compile(r"\d+(?:\.\d+)?")


def test_the_tutorial_prints_what_it_shows(model_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT/"docs/tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == len(BLOCK.findall(text)) > 4  # each has its output
    names = {}
    for block, shown in blocks:
        exec(compile(block, "docs/tutorial.md", "exec"), names)
        said = capsys.readouterr().out
        assert NUMBER.sub("#", said) == NUMBER.sub("#", shown)
        for a, b in zip(NUMBER.findall(said), NUMBER.findall(shown)):  # an answer may be longer on another CPU, which rounds differently
            assert abs(float(a) - float(b)) <= (24 if float(b) > 100 else 0), said


def test_the_notebook_runs(model_path, tmp_path):
    """And gives the answers it was committed with. To write its outputs anew:

        jupyter nbconvert --to notebook --execute --inplace docs/notebook.ipynb
    """
    notebook = nbformat.read(ROOT/"docs/notebook.ipynb", as_version=4)
    said = _printed(notebook)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert "WRONG" in said and _answers(_printed(notebook)) == _answers(said)
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(pictures) == 2


def _printed(notebook):
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def _answers(text):
    """Resident memory differs from run to run, and what a wrong answer invents from CPU to CPU."""
    return re.findall(r"right|WRONG|^\w+ +\d+%:", text, re.MULTILINE)


def server_block(word: str) -> str:
    return next(b for b in BLOCK.findall((ROOT/"docs/server.md").read_text(encoding="utf-8")) if word in b)


def here(block: str, server: Server) -> str:
    assert "127.0.0.1:8080" in block
    return block.replace("127.0.0.1:8080", f"127.0.0.1:{server.port}")


@pytest.mark.server
def test_the_openai_client_gets_what_the_page_shows(model_path, tmp_path, capsys):
    """Of the server that the page starts above it."""
    page = (ROOT/"docs/server.md").read_text(encoding="utf-8")
    command = "pykvc serve --kv-policy shotkv --kv-budget 25%"
    assert command in page
    with Server(tmp_path/"log", "-m", model_path, *command.split()[2:]).wait() as server:
        exec(compile(here(server_block("openai"), server), "docs/server.md", "exec"), {})
    assert f"    {capsys.readouterr().out}" in page


@pytest.mark.server
def test_the_servers_recipe_runs(model_path, tmp_path, capsys, monkeypatch):
    """docs/server.md: a document that is asked again and again."""
    how = ("-m", model_path, "-c", 4096, "-np", 1, "--kv-policy", "keydiff", "--kv-budget", "50%", "--slot-save-path", tmp_path)
    with Server(tmp_path/"log", *how).wait() as server:
        monkeypatch.chdir(ROOT)
        exec(compile(here(server_block("urllib"), server), "docs/server.md", "exec"), {})
        told = capsys.readouterr().out.splitlines()
        n_document = told[0].split()[0]
        assert [line.split()[0] for line in told if "tokens reused" in line] == [n_document, n_document]


@pytest.mark.parametrize("page", [*PAGES, ROOT/".github/CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        file = (page.parent/path).resolve() if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], target


def test_every_page_is_in_the_index():
    index = (ROOT/"docs/README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if page.name != "README.md" and f"({page.name})" not in index] == []


def test_every_public_name_is_in_the_reference():
    named = re.findall(r"^::: pykvc\.(\w+)$", (ROOT/"docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(set(pykvc.__all__) - set(named)) == ["__version__"]


def test_the_patches_have_as_many_hunks_as_the_page_says():
    hunks = {path.stem[:4]: len(re.findall(r"^@@ ", path.read_text(encoding="utf-8"), re.MULTILINE))
             for path in (ROOT/"third_party/patches").glob("*.patch")}
    said = re.search(r"changed in (\d+)\s+hunks .*?: (\d+) in\s+libllama, (\d+) in\s+llama-server, (\d+)\s+in ggml",
                     (ROOT/"docs/design.md").read_text(encoding="utf-8"), re.DOTALL)
    total, lib, server = sum(hunks.values()), hunks["0001"], hunks["0006"]
    assert said and [int(n) for n in said.groups()] == [total, lib, server, total - lib - server]


def test_the_notebook_is_kept_small():
    text = (ROOT/"docs/notebook.ipynb").read_text(encoding="utf-8")
    assert len(text) < 250_000 and all(cell.get("execution_count") for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
