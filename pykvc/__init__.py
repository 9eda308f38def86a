"""KV cache eviction inside llama.cpp. `pykvc.LLM` is where to begin; `pykvc --help` is the command line."""
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from ._core import policies
except ImportError as error:
    checkout = Path(__file__).parent.parent
    if error.name == "pykvc._core" and (checkout/"CMakeLists.txt").is_file():
        raise ImportError(f"{checkout} is a checkout, whose pykvc/ has no compiled half, and Python looks there first: start it in "
                          "another folder, with -P (3.11+) or -I, or make an editable install here with `make dev`") from None
    if "llama_cpp" not in sys.modules:
        raise
    raise ImportError("llama_cpp was imported before, on a libllama of its own: import pykvc first, or set "  # ours is then not loaded
                      f"LLAMA_CPP_LIB_PATH={Path(__file__).parent/'lib'}") from error
from .context import Context
from .conversation import Conversation
from .generation import Generation, Stream
from .llm import LLM
from .policy import Layer, LayerPlan, Policy, Request
from .sampling import Logprob, SamplingParams

try:
    __version__ = version("pykvc")
except PackageNotFoundError:  # run from a source tree
    __version__ = "0+unknown"

__all__ = ["LLM", "Context", "Conversation", "Generation", "Stream", "SamplingParams", "Logprob", "Policy", "Layer", "LayerPlan", "Request", "policies", "__version__"]
