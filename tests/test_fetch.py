"""third_party/fetch.py: what it refuses to build from."""
import importlib.util
import subprocess
import tarfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def fetch():
    spec = importlib.util.spec_from_file_location("fetch", Path(__file__).parent.parent/"third_party"/"fetch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_directory_that_is_no_llama_cpp(fetch, tmp_path, monkeypatch):
    monkeypatch.setenv("PYKVC_LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match="is not a llama.cpp source tree"):
        fetch.main(tmp_path/"dest", [])
    assert not (tmp_path/"dest").exists()


def test_an_sdist_of_another_sha256(fetch, tmp_path, monkeypatch):
    def download(command, **_):  # as pip
        with tarfile.open(Path(command[command.index("--dest") + 1])/"llama_cpp_python.tar.gz", "w:gz"):
            return subprocess.CompletedProcess(command, 0, "")
    monkeypatch.delenv("PYKVC_LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("PYKVC_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch.subprocess, "run", download)
    with pytest.raises(SystemExit, match=f"expected {fetch.PIN['sha256']}"):
        fetch.pristine()
    assert not list((tmp_path/"src").iterdir())  # the next build fetches it again


def test_an_environment_without_pip(fetch, tmp_path, monkeypatch):
    """One of uv, without build isolation; with it pip is there, since pyproject.toml asks for it."""
    monkeypatch.delenv("PYKVC_LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("PYKVC_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="is fetched with pip, which .* does not have: build with isolation"):
        fetch.pristine()
