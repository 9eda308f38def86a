"""The device of tests/stock/counting.cpp: not the host, run by the CPU, and it counts the bytes that cross."""
import ctypes
import os
from contextlib import contextmanager
from pathlib import Path


class Device:
    """While it is there llama.cpp takes it for a GPU: n_gpu_layers puts layers and their caches into its memory."""

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL(str(path))
        for name in ("read", "written", "graphs", "allocated"):
            getattr(self._lib, f"counting_{name}").restype = ctypes.c_int64

    def __getattr__(self, name: str) -> int:
        """read, written: bytes to the host and from it since reset(); graphs: computed since; allocated: bytes of its
        buffers."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._lib, f"counting_{name}")()

    def reset(self) -> None:
        self._lib.counting_reset()

    @contextmanager
    def without(self, *ops: str):
        """A context made meanwhile does not get these ops of ggml run there."""
        for op in ops:
            self._lib.counting_lacks(op.encode())
        try:
            yield
        finally:
            self._lib.counting_lacks(None)


@contextmanager
def registered():
    stock = Path(os.environ.get("PYKVC_STOCK", ".build/stock/stock")).resolve()
    device = Device(stock.parent/"libcounting.so")
    device._lib.counting_register()
    try:
        yield device
    finally:
        device._lib.counting_unload()
