"""Results to keep: the figures and scores of every answer, without what the model wrote and what was right.

OUT/NAME.answers.jsonl and .scores.jsonl become FOLDER/NAME.answers.jsonl.xz and .scores.jsonl.xz. `report` reads them;
unpacked with xz -d, a run goes on with them.
"""
import json
import lzma
from pathlib import Path
from typing import Annotated

import typer

from ..flags import OUT, Answers
from ..store import Row, read, scores_of, writing
from ..tasks import task

TEXTS = ("answer", "gold")


def pack(out: Path, folder: Path) -> list[Path]:
    """The files, which replace earlier ones. ValueError if `out` holds no answers, or an answer without a score."""
    if not (paths := sorted(out.glob("*.answers.jsonl"))):
        raise ValueError(f"{out} holds no answers")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return [written for path in paths for written in _pack(path, folder)]


def _pack(path: Path, folder: Path) -> list[Path]:
    other = scores_of(path)
    answers = {k: row for k, row in read(path).items() if "error" not in row}
    scores = {k: row for k, row in read(other).items() if "score" in row}
    if missing := [row for k, row in answers.items() if k not in scores]:
        raise ValueError(f"{path} has {len(missing)} answers without a score, the first to {missing[0]['item']}: "
                         "run it to the end first")
    return [_write(folder/f"{path.name}.xz", [_figures(row) for row in answers.values()]),
            _write(folder/f"{other.name}.xz", [scores[k] for k in answers])]


def _figures(row: Row) -> Row:
    """Without texts; `fidelity` writes figures as its answer."""
    writes_figures = hasattr(task(row["task"]), "extra")
    return {name: value for name, value in row.items() if writes_figures or name not in TEXTS}


def _write(path: Path, rows: list[Row]) -> Path:
    with writing(path):
        path.write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), preset=9))
    return path


def command(
    folder: Annotated[Path, typer.Argument(help="Where the archive's files go; `report --out` reads them there.")],
    out: Answers = OUT,
) -> None:
    """Keep the figures and scores of every answer, compressed, without the texts."""
    for path in pack(out, folder):
        print(f"{path}: {path.stat().st_size} bytes")
