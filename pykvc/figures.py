"""Samples of `pykvc bench` as figures, and what memory the process takes."""
import ctypes
import math
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, Sequence

Row = dict[str, Any]


def rates(name: str, n_tokens: int, ns: Sequence[int]) -> Row:
    """As llama-bench names them, and the median."""
    ts = [1e9*n_tokens/t for t in ns]
    figures = {f"{what}_{unit}": fn(values) if values else None for unit, values in (("ns", ns), ("ts", ts))
               for what, fn in (("avg", mean), ("stddev", _stddev), ("median", median))}
    return {f"{name}_{key}": value for key, value in {**figures, "samples_ns": list(ns), "samples_ts": ts}.items()}


def _stddev(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def spread(name: str, values: Sequence[float]) -> Row:
    return {name: median(values) if values else None, f"{name}_min": min(values, default=None), f"{name}_max": max(values, default=None)}


def median_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Holds the true median 95 times of 100, whatever the distribution (order statistics); of less than 6 values, their range."""
    if not values:
        return None, None
    ranked, low = sorted(values), max(0, int(len(values)/2 - 0.98*math.sqrt(len(values))))
    return ranked[low], ranked[-1 - low]


def reset_peak_rss() -> bool:
    """Linux counts the peak from here on. False where that is not permitted, or no Linux."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed counts as resident until glibc gives it back
    except AttributeError:
        pass
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def peak_rss() -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024*int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
