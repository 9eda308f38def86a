"""Loaded weights, one copy for all that have the same file open."""
import os
from weakref import WeakValueDictionary

from . import _core

_LOADED: "WeakValueDictionary[tuple, _core.Model]" = WeakValueDictionary()


def load(path: str | os.PathLike, n_gpu_layers: int = 0) -> "_core.Model":
    """Freed when the last one lets go of it. A file that changed since is loaded anew. ValueError: it is no GGUF of a known architecture."""
    found = os.stat(path)
    key = os.path.realpath(path), found.st_mtime_ns, found.st_size, n_gpu_layers
    model = _LOADED.get(key)
    if model is None:
        model = _LOADED[key] = _core.Model(str(path), n_gpu_layers=n_gpu_layers)
    return model
