"""docs/architectures.md: all that the pinned llama.cpp knows, and what its contexts say when they are created."""
import re
import sys
from pathlib import Path

import pytest

import tiny
from pykvc import _core

ROOT = Path(__file__).parent.parent
PAGE = (ROOT/"docs/architectures.md").read_text(encoding="utf-8")
VERDICTS = dict(re.findall(r"^\| `(\S+)` \| (.*) \|$", PAGE, re.MULTILINE))


def test_every_name_is_there():
    assert sorted(_core.architectures()) == list(VERDICTS)


def test_the_tables_are_what_the_source_says(monkeypatch):
    """A newer pin shows what is new."""
    monkeypatch.syspath_prepend(ROOT/"third_party")
    sys.modules.pop("architectures", None)
    import architectures
    import fetch
    source = fetch.pristine()
    assert "\n".join(architectures.table(source)) in PAGE
    assert "\n".join(architectures.costs()) in PAGE


@pytest.mark.parametrize("arch", [a for a in tiny.ARCHS if a not in ("openelm", "deci")])  # whose layers have different numbers of KV heads here
def test_the_page_says_what_happens(tmp_path, arch):
    model = _core.Model(str(tiny.write(tmp_path/"model.gguf", arch, n_layer=7 if arch == "gemma3" else None)))
    says = VERDICTS[arch]
    try:
        c = _core.Context(model, n_ctx=256, n_threads=1, policy="keydiff", budget="64")
    except ValueError as e:
        assert says.startswith("refused: "), e
        assert re.search(says.removeprefix("refused: ").partition(",")[0], str(e))
    else:
        assert says.startswith("evicts")
        full = _core.Context(model, n_ctx=256, n_threads=1, policy="full")
        grows = len(c.kept()) if says.startswith("evicts its") else tiny.N_LAYER.get(arch, 3)
        assert len(c.kept()) == len(full.kept()) == grows
