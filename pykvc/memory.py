"""kv_cells="auto": how many bytes a cache may take where it lies."""
from pathlib import Path
from typing import Any

from . import _core

SHARE = 0.9             # of what is free
FOR_COMPUTING = 2**28   # bytes that stay free on each device, for llama.cpp's compute buffers


def for_cache(model: "_core.Model", where: dict[str, Any], offload_kqv: bool) -> int:
    """Bytes for the cache of all layers, once the weights are loaded. where: as options.devices().

    Layers on GPUs have theirs there, the others in main memory: what is filled first counts. ValueError: nothing is free, or no one
    can tell."""
    if where["rpc_servers"]:
        raise ValueError("kv_cells='auto' does not know what memory RPC servers have: give a number of cells, or bytes as "
                         "'512MiB'")
    gpus = [(free, total) for _, kind, free, total in _core.device_memory() if kind in ("GPU", "IGPU")] if offload_kqv else []
    if where["main_gpu"] >= 0:
        gpus = gpus[where["main_gpu"]:where["main_gpu"] + 1]
    n_layer, n_asked = model.n_layer, where["n_gpu_layers"]
    n_there = 0 if not gpus else n_layer if n_asked < 0 else min(n_asked, n_layer)
    limits = []
    if n_there:
        limits.append(sum(_usable(free) for free, _ in gpus)*n_layer//n_there)
    if n_there < n_layer:
        limits.append(_usable(available())*n_layer//(n_layer - n_there))
    if min(limits) < 2**20:
        raise ValueError("kv_cells='auto': there is no memory left for a cache; give a number of cells, or bytes as '512MiB'")
    return min(limits)


def _usable(free: int) -> int:
    return max(int(free*SHARE) - FOR_COMPUTING, 0)


def available() -> int:
    """Bytes of main memory that programs may still take, of this control group where it has a limit. ValueError: not
    Linux."""
    try:
        words = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(words["MemAvailable"].split()[0])*1024
    except (OSError, KeyError, ValueError):
        raise ValueError("kv_cells='auto' reads /proc/meminfo, which this system does not have: give a number of cells, or bytes as "
                         "'512MiB'") from None
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group/"memory.max").read_text())
        return max(min(free, limit - int((group/"memory.current").read_text())), 0)
    except (OSError, ValueError):  # no limit is "max"
        return free
