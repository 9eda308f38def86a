"""The installed package: whole wherever it is copied, and with the licences of what is in it."""
import ast
import re
import shutil
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

from pykvc import _core

LOADED = """
import pathlib, sys
import _core
maps = pathlib.Path("/proc/self/maps")  # Linux
loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line} if maps.exists() else set()
print("CPU" in _core.system_info())
print(*sorted(path for path in loaded if path.rpartition("/")[2].startswith(("libllama", "libggml"))), sep="\\n")
"""


def test_libraries_are_found_beside_the_module(tmp_path):
    """A wheel is unpacked anywhere: no path of the machine that built it may be in it."""
    module = Path(_core.__file__)
    shutil.copy(module, tmp_path)
    shutil.copytree(module.parent/"lib", tmp_path/"lib")
    done = subprocess.run([sys.executable, "-c", LOADED], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    has_cpu, *loaded = done.stdout.split()
    assert has_cpu == "True"
    assert all(path.startswith(str(tmp_path.resolve())) for path in loaded)
    if sys.platform == "linux":
        names = {Path(path).name for path in loaded}
        assert {"libllama.so", "libggml.so", "libggml-base.so"} < names
        assert sum(name.startswith("libggml-cpu") for name in names) == 1  # of a portable build's variants the one that fits


def test_the_server_is_found_beside_its_libraries(tmp_path):
    shutil.copytree(Path(_core.__file__).parent/"lib", tmp_path/"lib")
    done = subprocess.run([tmp_path/"lib"/"llama-server", "--version"], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0 and "version" in done.stderr + done.stdout


def test_licences():
    texts = {path.name: path.read_text() for path in files("pykvc") if path.parent.name == "licenses"}
    assert "pykvc" in texts["LICENSE"]
    assert "The ggml authors" in texts["LICENSE.llama.cpp"]
    for name in ("cpp-httplib", "nlohmann-json", "xxhash", "sha256", "rotate-bits"):
        assert texts[f"LICENSE.{name}"].strip()


def declared(body):
    """{name: names of the arguments, of a property None, of a class what it declares} in a piece of the stub."""
    found = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = declared(node.body)
        elif isinstance(node, ast.FunctionDef):
            arguments = [a.arg for a in node.args.args + node.args.kwonlyargs if a.arg != "self"]
            found[node.name] = None if any(getattr(d, "id", "") == "property" for d in node.decorator_list) else arguments
    return found


def bound(owner):
    """The same of what is compiled: pybind11 writes the signature into the first line of the docstring."""
    found = {}
    for name, thing in vars(owner).items():
        if isinstance(thing, type):
            found[name] = bound(thing)
        elif isinstance(thing, property):
            found[name] = None
        elif name == "__init__" or not name.startswith("_") and callable(getattr(owner, name)):
            signature = getattr(owner, name).__doc__.partition("\n")[0]
            found[name] = [argument for argument in re.findall(r"[(,] ?(\w+): ", signature) if argument != "self"]
    return found


def test_the_stub_is_what_is_compiled():
    stub = declared(ast.parse(Path(_core.__file__).with_name("_core.pyi").read_text()).body)
    real = bound(_core)
    assert stub.keys() == real.keys()
    for name, own in stub.items():
        assert own == real[name], name


def test_a_checkout_says_what_to_do(tmp_path):
    """Its ./pykvc is the first that Python finds, and is not what was compiled. -S: nor is an editable install."""
    root = Path(__file__).parent.parent
    for name in ("CMakeLists.txt", "pykvc"):
        (tmp_path/name).symlink_to(root/name)
    done = subprocess.run([sys.executable, "-S", "-c", "import pykvc"], cwd=tmp_path, text=True, capture_output=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith(f"ImportError: {tmp_path} is a checkout") and "`make dev`" in last


def test_another_import_error_is_not_taken_for_that(tmp_path):
    """A module that is there and does not load, as one of another Python."""
    root = Path(__file__).parent.parent
    (tmp_path/"CMakeLists.txt").touch()
    shutil.copytree(root/"pykvc", tmp_path/"pykvc", ignore=shutil.ignore_patterns("_core*", "__pycache__"))
    (tmp_path/"pykvc"/"_core.py").write_text("raise ImportError('libllama.so: cannot open shared object file')\n")
    done = subprocess.run([sys.executable, "-S", "-c", "import pykvc"], cwd=tmp_path, text=True, capture_output=True)
    assert done.stderr.splitlines()[-1] == "ImportError: libllama.so: cannot open shared object file"
