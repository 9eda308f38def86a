"""`pykvc serve`: becomes the llama-server of this package, which shares libllama with the Python module.

Its flags and environment are llama-server's own; only the model is found as the other commands find it.
"""
import os
import sys
from pathlib import Path
from typing import NoReturn, Sequence

from . import _core, models, options

MODEL = ("-m", "--model")
HUB = ("-hf", "-hfr", "--hf-repo")
# With one of these llama-server finds its model, or models, by itself, or needs none.
OTHERS = ("-mu", "--model-url", "-dr", "--docker-repo", "--models-dir", "--models-preset",
          "-h", "--help", "--usage", "--version", "--list-devices", "-cl", "--cache-list", "--completion-bash")
OTHERS_ENV = ("LLAMA_ARG_MODEL_URL", "LLAMA_ARG_DOCKER_REPO", "LLAMA_ARG_MODELS_DIR", "LLAMA_ARG_MODELS_PRESET")


def program() -> Path:
    """The llama-server of this package. ValueError says how to get it where it was left out."""
    path = Path(_core.__file__).parent/"lib"/"llama-server"
    if not path.is_file():
        raise ValueError("this build of pykvc is without llama-server: install it with `pip install . -C cmake.define.PYKVC_SERVER=ON` in a checkout")
    return path


def command(args: Sequence[str]) -> list[str]:
    """llama-server's command line: args with the model as a file."""
    args = list(args)
    policies = [args[i + 1] for i, arg in enumerate(args[:-1]) if arg == "--kv-policy"] or [os.environ.get("LLAMA_ARG_KV_POLICY", "")]
    if any(map(options.in_python, policies)):
        raise ValueError("--kv-policy: llama-server is a program of its own and cannot ask a policy written in Python; `pykvc policies` lists what it has")
    if any(arg in OTHERS for arg in args) or not any(arg in MODEL + HUB for arg in args) and any(map(os.environ.get, OTHERS_ENV)):
        return [str(program()), *args]
    given = [i for i, arg in enumerate(args) if arg in MODEL + HUB]
    if len(given) > 1:
        raise ValueError("give one -m or -hf")
    if given and given[0] + 1 == len(args):
        raise ValueError(f"{args[given[0]]} needs a value: a .gguf file, a name or user/repo[:quant] of Hugging Face")
    name = args[given[0] + 1] if given else os.environ.get("LLAMA_ARG_MODEL") or os.environ.get("LLAMA_ARG_HF_REPO")
    rest = args[:given[0]] + args[given[0] + 2:] if given else args
    server = program()
    return [str(server), "-m", str(models.resolve(name)), *rest]


def run(args: Sequence[str]) -> NoReturn:
    line = command(args)
    os.environ.pop("LLAMA_ARG_HF_REPO", None)  # -m is what it means
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(line[0], line)
