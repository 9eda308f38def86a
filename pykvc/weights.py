"""Loaded weights, one copy for all that have the same file open."""
import os
from typing import Any, NoReturn, Sequence
from weakref import WeakValueDictionary

from . import _core

_LOADED: "WeakValueDictionary[tuple, _core.Model]" = WeakValueDictionary()


def adapt(ctx: "_core.Context", adapters: Sequence[tuple[str, float]], weighs_outputs: bool) -> None:
    """LoRAs and their scales for what a context evaluates. ValueError: one is another model's, or the policy does not
    know what it changes."""
    if weighs_outputs:
        refuse_outputs(ctx.policy)
    loaded = [(_core.Adapter(ctx.model, path), scale) for path, scale in adapters]
    for (adapter, _), (path, _) in zip(loaded, adapters):
        if adapter.is_activated:
            raise ValueError(f"{path} is an aLoRA, which words of the prompt switch on: that is not supported")
    ctx.set_adapters([adapter for adapter, _ in loaded], [scale for _, scale in loaded])


def refuse_outputs(policy: Any) -> NoReturn:
    raise ValueError(f"{policy} weighs values by the model's output projection, which a LoRA may change: "
                     "take a policy without values=wo")


def uses(endpoint: str) -> bool:
    """Does a loaded model lie on this RPC server?"""
    return any(endpoint in of for key in list(_LOADED) for name, of in key[4:] if name == "rpc_servers")


def load(path: str | os.PathLike, n_gpu_layers: int = 0, **how: Any) -> "_core.Model":
    """Freed when the last one lets go of it. A file that changed since is loaded anew. how: _core.Model's, of hashable values.
    ValueError: it is no GGUF of a known architecture."""
    found = os.stat(path)
    key = os.path.realpath(path), found.st_mtime_ns, found.st_size, n_gpu_layers, *sorted(how.items())
    model = _LOADED.get(key)
    if model is None:
        model = _LOADED[key] = _core.Model(str(path), n_gpu_layers=n_gpu_layers, **how)
    return model
