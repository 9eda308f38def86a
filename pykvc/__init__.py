"""KV cache eviction inside llama.cpp. `pykvc.LLM` is where to begin; `pykvc --help` is the command line."""
from importlib.metadata import PackageNotFoundError, version

from ._core import policies
from .generation import Generation, Stream
from .llm import LLM
from .policy import Layer, LayerPlan, Policy, Request

try:
    __version__ = version("pykvc")
except PackageNotFoundError:  # run from a source tree
    __version__ = "0+unknown"

__all__ = ["LLM", "Generation", "Stream", "Policy", "Layer", "LayerPlan", "Request", "policies", "__version__"]
