"""Rows in a JSONL file that is only ever appended to. What a killed run leaves is a whole row, or a torn last line.

A folder holds NAME.answers.jsonl, one row for each question, and NAME.scores.jsonl, written after the answer was; NAME
is the model's file name. Scores can be computed again from the answers alone.
"""
import fcntl
import json
import lzma
from pathlib import Path
from typing import Any, Callable, Hashable, Iterable, Iterator, Sequence

import pandas as pd

Row = dict[str, Any]

KEY = ("task", "item", "protocol", "policy", "budget", "decode_budget", "cells", "type_k", "type_v", "n_ubatch", "chat",
       "seed")
IDENTITY = ("model_sha256", "commit")  # of all rows of a file


def key(row: Row) -> tuple:
    return values(row, KEY)


def values(row: Row, names: Sequence[str]) -> tuple:
    return tuple(row[name] for name in names)


def grouped(rows: Iterable[Row], by: Sequence[str] | Callable[[Row], Hashable]) -> dict[Any, list[Row]]:
    """Rows by their values of some columns, or by what a function says of them; groups and rows in their order."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(by(row) if callable(by) else values(row, by), []).append(row)
    return found


def comma_separated(lines: Sequence[Row]) -> str:
    """CSV, with a column for each name that a line has."""
    return pd.DataFrame(lines, dtype=object).to_csv(index=False)


def read(path: Path) -> list[Row]:
    """The rows of a file, plain or .xz, without a torn last line; none if there is no file. ValueError if another line
    is damaged."""
    return [row for row, _ in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[Row, int]]:
    """(row, bytes up to its end)"""
    data, end = (path.read_bytes() if path.is_file() else b""), 0
    if data and path.suffix == ".xz":
        data = lzma.decompress(data)
    for i, line in enumerate(data.splitlines(keepends=True), 1):
        end += len(line)
        if not line.endswith(b"\n"):
            return
        try:
            row = json.loads(line)
            key(row)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"line {i} of {path} is no row of evals: give another --out") from None
        yield row, end


class Rows:
    """One file, this process its only writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab")
        except OSError as error:
            raise ValueError(f"cannot write to {path}: {error.strerror}") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path} is being written by another run: wait for it, or give another --out") from None
        lines = list(_lines(path))
        self.rows = {key(row): row for row, _ in lines}  # a later row replaces an earlier one
        self._whole = lines[-1][1] if lines else 0

    def check(self, identity: Row, any_commit: bool) -> None:
        """ValueError if the file's rows are of another model, or of another commit unless any_commit."""
        for row in self.rows.values():
            for name in IDENTITY:
                if row.get(name) != identity[name] and not (name == "commit" and any_commit):
                    hint = "; --any-commit goes on with it" if name == "commit" else ""
                    raise ValueError(f"{self.path} is of {name} {str(row.get(name))[:12]}, this run of "
                                     f"{str(identity[name])[:12]}: give another --out{hint}")

    def append(self, row: Row) -> None:
        """On the disk's side when this returns, whatever happens to the process."""
        if self._whole is not None:  # the torn line of a killed run
            self.file.truncate(self._whole)
            self._whole = None
        self.file.write(json.dumps(row).encode() + b"\n")
        self.file.flush()
        self.rows[key(row)] = row

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
