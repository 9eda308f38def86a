"""Rows in a JSONL file that is only ever appended to. What a killed run leaves is a whole row, or a torn last line.

A folder holds NAME.answers.jsonl, one row for each question, and NAME.scores.jsonl, written after the answer was; NAME
is the model's file name. Scores can be computed again from the answers alone.
"""
import fcntl
import json
import lzma
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Hashable, Iterable, Iterator, Sequence

import pandas as pd

Row = dict[str, Any]

KEY = ("task", "item", "protocol", "policy", "budget", "decode_budget", "cells", "type_k", "type_v", "n_ubatch", "chat",
       "seed")
IDENTITY = ("model_sha256", "commit")  # of all rows of a file


def values(row: Row, names: Sequence[str]) -> tuple:
    return tuple(row[name] for name in names)


def key(row: Row) -> tuple:
    return values(row, KEY)


def grouped(rows: Iterable[Row], by: Sequence[str] | Callable[[Row], Hashable]) -> dict[Any, list[Row]]:
    """Rows by their values of some columns, or by what a function says of them; groups and rows in their order."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(by(row) if callable(by) else values(row, by), []).append(row)
    return found


def write_table(out: Path, name: str, text: str, lines: Sequence[Row], title: str = "") -> str:
    """NAME.md, and NAME.csv with a column for each name that a line has, into the folder; the text."""
    heading = f"# {title}\n\n" if title else ""
    with writing(out/f"{name}.md"):
        (out/f"{name}.md").write_text(heading + text, encoding="utf-8")
        pd.DataFrame(lines, dtype=object).to_csv(out/f"{name}.csv", index=False)
    return text


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """OSError -> ValueError: its sentence."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error.strerror}") from None


def files(out: Path, kind: str) -> list[Path]:
    """OUT/NAME.KIND.jsonl, or .xz where there is no such plain file, of all models."""
    packed = (path for path in out.glob(f"*.{kind}.jsonl.xz") if not path.with_suffix("").is_file())
    return sorted([*out.glob(f"*.{kind}.jsonl"), *packed])


def scores_of(answers: Path) -> Path:
    return answers.with_name(answers.name.replace(".answers.", ".scores."))


def read(path: Path) -> dict[tuple, Row]:
    """The rows of a file, plain or .xz, by key(), a later one in place of an earlier one; none if there is no file, and
    no torn last line. ValueError if another line is damaged."""
    return _whole_lines(path)[0]


def _whole_lines(path: Path) -> tuple[dict[tuple, Row], int]:
    """(rows, bytes of their lines)"""
    data = path.read_bytes() if path.is_file() else b""
    if data and path.suffix == ".xz":
        data = lzma.decompress(data)
    data = data[:data.rfind(b"\n") + 1]
    found = {}
    for i, line in enumerate(data.splitlines(), 1):
        try:
            row = json.loads(line)
            found[key(row)] = row
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"line {i} of {path} is no row of evals: give another --out") from None
    return found, len(data)


class Rows:
    """One file, this process its only writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path} is being written by another run: wait for it, or give another --out") from None
        self.rows, self._whole = _whole_lines(path)

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

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()
