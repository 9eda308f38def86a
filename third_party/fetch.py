"""python fetch.py DEST [PATCH ...]: DEST becomes llama.cpp's source with the patches applied.

The pristine source is $PYKVC_LLAMA_CPP_DIR, or the sdist pinned in llama_cpp.json, fetched once with pip and kept in
$PYKVC_CACHE (default ~/.cache/pykvc). Only files of DEST whose content differs are written, so a changed patch
recompiles what it touches and nothing else.
"""
import filecmp
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PIN = json.loads(Path(__file__).with_name("llama_cpp.json").read_text())
NAME = f"{PIN['package']}=={PIN['version']}"

# What a build reads, llama-server's and its web page's included. The rest (test models, docs) is 120 MB.
WANTED = ("CMakeLists.txt", "LICENSE", "cmake", "common", "ggml", "include", "licenses", "scripts", "src", "tools", "vendor")
UNWANTED = ("tools/ui/tests/",)
CHOICE = hashlib.sha256(repr((WANTED, UNWANTED)).encode()).hexdigest()[:4]  # another one is another folder of the cache


def wanted(path: str) -> bool:
    return path.split("/")[0] in WANTED and not path.startswith(UNWANTED)


def main(dest: Path, patches: list[Path]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source = pristine()
        patched = apply(source, patches, Path(scratch))
        sync(source, patched, dest)


# -- the pristine source --------------------------------------------------------------------------------------------

def pristine() -> Path:
    if given := os.environ.get("PYKVC_LLAMA_CPP_DIR"):
        source = Path(given)
        if not (source / "src/llama.cpp").is_file():
            sys.exit(f"PYKVC_LLAMA_CPP_DIR={given} is not a llama.cpp source tree (no src/llama.cpp in it).")
        return source

    cache = Path(os.environ.get("PYKVC_CACHE") or Path.home() / ".cache/pykvc") / "src"
    source = cache / f"{PIN['package']}-{PIN['version']}-{PIN['sha256'][:8]}-{CHOICE}"
    if not source.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        # Beside its final place, then renamed: of two builds at once the second finds a whole tree or makes its own.
        with tempfile.TemporaryDirectory(dir=cache) as tmp:
            extract(download(Path(tmp)), Path(tmp) / "tree")
            try:
                (Path(tmp) / "tree").rename(source)
            except OSError:
                if not source.is_dir():
                    raise
    return source


def download(tmp: Path) -> Path:
    if not importlib.util.find_spec("pip"):
        sys.exit(f"llama.cpp's source, the sdist of {NAME}, is fetched with pip, which {sys.executable} does not have: build with "
                 f"isolation (uv pip install .), or add it first (uv pip install pip), or set PYKVC_LLAMA_CPP_DIR to the "
                 f"{PIN['inside']} of an unpacked one.")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--no-binary", PIN["package"], "--dest", str(tmp), NAME]
    # pip prepares an sdist's metadata; with the build backend already here it needs no environment of its own.
    if importlib.util.find_spec("scikit_build_core"):
        command.insert(-1, "--no-build-isolation")
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    found = list(tmp.glob("*.tar.gz"))
    if done.returncode or len(found) != 1:
        sys.exit(f"{done.stdout}\nllama.cpp's source could not be fetched: give pip access to the sdist of {NAME}, or "
                 f"set PYKVC_LLAMA_CPP_DIR to the {PIN['inside']} of an unpacked one.")
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != PIN["sha256"]:
        sys.exit(f"The sdist of {NAME} has sha256 {digest}, expected {PIN['sha256']}.")
    return found[0]


def extract(archive: Path, to: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = member.name.partition(f"/{PIN['inside']}/")[2]
            if member.isfile() and wanted(inside) and ".." not in inside.split("/"):
                path = to / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as src, open(path, "wb") as dst:
                    shutil.copyfileobj(src, dst)
                path.chmod(member.mode & 0o755 | 0o600)


# -- the patched copy -----------------------------------------------------------------------------------------------

def apply(source: Path, patches: list[Path], scratch: Path) -> dict[str, Path | None]:
    """The files the patches touch, as they leave them in scratch; None: deleted."""
    texts = [patch.read_text() for patch in patches]
    touched = {name for text in texts for name in re.findall(r"^(?:---|\+\+\+) [ab]/([^\t\n]+)", text, re.M)}
    for name in touched:
        if (source / name).is_file():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, scratch / name)

    if shutil.which("git"):
        command = ["git", "apply", "--whitespace=nowarn", "-"]
    elif shutil.which("patch"):
        command = ["patch", "-p1", "--fuzz=0", "--no-backup-if-mismatch"]
    else:
        sys.exit("llama.cpp's source has to be patched: install git or patch.")
    # Inside a repository git apply would skip, silently, what lies outside of it.
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env["GIT_CEILING_DIRECTORIES"] = str(scratch.resolve().parent)
    for patch, text in zip(patches, texts):
        done = subprocess.run(command, cwd=scratch, env=env, input=text, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            sys.exit(f"{done.stdout}\n{patch.name} does not apply to {source} (the patches are for {NAME}).")
    return {name: scratch / name if (scratch / name).is_file() else None for name in touched}


def sync(source: Path, patched: dict[str, Path | None], dest: Path) -> None:
    names = [p.relative_to(source).as_posix() for top in WANTED for p in [source / top, *(source / top).rglob("*")] if p.is_file()]
    tree = {name: source / name for name in names if wanted(name)} | patched
    have = {p.relative_to(dest).as_posix() for p in dest.rglob("*") if p.is_file()}

    for name in have - {name for name, path in tree.items() if path}:
        (dest / name).unlink()
    for name, path in tree.items():
        if path and not (name in have and filecmp.cmp(path, dest / name, shallow=False)):
            (dest / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, dest / name)  # with a new mtime


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(p).resolve() for p in sys.argv[2:]])
