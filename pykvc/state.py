"""The file of LLM.save(), and the bytes of save_state(): what the cache holds and what it belongs to.

    magic "PYKVC\\n" | u32 version | u32 bytes of header | u32 crc32 | header, JSON | logits, F32 [n_logits] | state of llama.cpp

Little endian. The header's "setup" must equal the reader's, field by field; "length" is that of all that follows the
header, and crc32 is of the header and of that. The file appears under its name only when it is whole.
"""
import json
import os
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any, Sequence

import numpy as np

MAGIC = b"PYKVC\n"
VERSION = 3


def fingerprint(path: Path) -> str:
    """Of a model's file: its size, and 64 pieces of 4 KB from its metadata to its end. Milliseconds, however large it
    is."""
    size, crc = path.stat().st_size, 0
    with open(path, "rb") as f:
        for i in range(64):
            f.seek(i*max(size - 4096, 0)//63)
            crc = zlib.crc32(f.read(4096), crc)
    return f"{size}-{crc:08x}"


def blocks(setup: dict[str, Any], session: dict[str, Any], logits: np.ndarray | None, state: bytes) -> list[bytes]:
    """What the file is made of. setup: what a reader must have the same of; session: what it gets back; logits: F32
    [n_vocab] or None."""
    row = b"" if logits is None else np.ascontiguousarray(logits, dtype="<f4").tobytes()
    header = json.dumps({"setup": setup, "session": session, "n_logits": len(row) // 4, "length": len(row) + len(state)}).encode()
    crc = zlib.crc32(state, zlib.crc32(row, zlib.crc32(header)))
    return [MAGIC, struct.pack("<III", VERSION, len(header), crc), header, row, state]


def write(path: str | os.PathLike, data: Sequence[bytes]) -> None:
    """At once or not at all. ValueError: the system says why not."""
    path = Path(path)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as f:
            try:
                for block in data:
                    f.write(block)
                f.close()
                os.replace(f.name, path)
            except BaseException:
                f.close()
                os.unlink(f.name)
                raise
    except OSError as error:
        raise ValueError(f"cannot write the state to {path}: {error.strerror}") from None


def read(path: str | os.PathLike) -> bytes:
    """ValueError: the system says why not."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the state {path}: {error.strerror}") from None


def parse(data: bytes, setup: dict[str, Any], name: object) -> tuple[dict[str, Any], np.ndarray | None, bytes]:
    """(session, logits, state). ValueError: not ours, damaged, or of another setup, naming the fields. name: what it
    calls the data."""
    if not data.startswith(MAGIC):
        raise ValueError(f"the state {name} is not a state of pykvc: it does not begin as those of save() do")
    try:
        version, n_header, crc = struct.unpack_from("<III", data, len(MAGIC))
        begin = len(MAGIC) + 12 + n_header
        if version != VERSION:
            raise ValueError(f"{name} is a state of version {version}, this pykvc reads version {VERSION}")
        header = json.loads(data[begin - n_header:begin]) if begin <= len(data) else {}
        there, session, length = header["setup"], header["session"], header["length"]
        n_row = 4 * header["n_logits"]
    except (struct.error, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"the state {name} is damaged: its header cannot be read") from None
    body = memoryview(data)[begin:]
    if len(body) != length:
        raise ValueError(f"the state {name} is truncated: {len(body)} of {length} bytes follow its header")
    if zlib.crc32(memoryview(data)[begin - n_header:]) != crc:
        raise ValueError(f"the state {name} is damaged: its checksum is wrong")
    different = [f"{key} is {there.get(key)!r} there and {value!r} here" for key, value in setup.items() if there.get(key) != value]
    if different:
        raise ValueError(f"the state {name} belongs to another set-up: {'; '.join(different)}")
    logits = np.frombuffer(body[:n_row], dtype="<f4").copy() if n_row else None
    return session, logits, bytes(body[n_row:])
