"""Rows of a data set: from a folder of JSONL files with the fields of the Hugging Face original, else from Hugging
Face."""
import gzip
import json
import logging
import random
from pathlib import Path
from typing import Any, Iterator, Sequence

from .store import Row

ENDS = ".jsonl", ".jsonl.gz"


def rows(data_dir: Path | None, name: str, hub: tuple[str, str | None, str] | None, fields: Sequence[str]) -> list[Row]:
    """name: "gsm8k/test", a file data_dir/gsm8k/test.jsonl or .jsonl.gz. hub: (data set, configuration, split), None if
    it is not there. ValueError: no such file, no JSON, or a row without one of the fields."""
    if data_dir is None:
        if hub is None:
            raise ValueError(f"{name} is not on Hugging Face: give --data-dir, a folder with {name}.jsonl")
        return _checked(_online(*hub), hub[0], fields)
    path = next(filter(Path.is_file, (data_dir/f"{name}{end}" for end in ENDS)), None)
    if path is None:
        raise ValueError(f"{data_dir} has no {' and no '.join(f'{name}{end}' for end in ENDS)}")
    return _checked(_lines(path), str(path), fields)


def _lines(path: Path) -> Iterator[Row]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        n_read = 0
        try:
            for line in file:
                yield json.loads(line)
                n_read += 1
        except (json.JSONDecodeError, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} cannot be read after line {n_read}: {error}") from None


def _online(name: str, configuration: str | None, split: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise ValueError("without --data-dir the data come from Hugging Face: `pip install datasets` first") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    try:
        yield from datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # whatever the library or the network has to say
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"Hugging Face does not give {name} ({reason}): --data-dir names a folder instead") from None


def _checked(found: Iterator[Row], where: str, fields: Sequence[str]) -> list[Row]:
    result = []
    for i, row in enumerate(found, 1):
        missing = [field for field in fields if not isinstance(row, dict) or field not in row]
        if missing:
            raise ValueError(f"row {i} of {where} has no {', '.join(missing)}: a row has {', '.join(fields)}")
        result.append(row)
    if not result:
        raise ValueError(f"{where} is empty")
    return result


def apart(found: list[Row], n: int, draw: int) -> tuple[list[Row], list[Row]]:
    """(rows to ask, n examples), of a set that has no other split: with examples the first half is asked, and they are
    of the other half, its first or, with a seed other than 0, drawn."""
    if not n:
        return found, []
    half = len(found)//2
    return found[:half], take("--shots", drawn(found[half:], draw), n)


def drawn(found: list[Row], draw: int) -> list[Row]:
    """In another order, with a seed other than 0."""
    return random.Random(draw).sample(found, len(found)) if draw else found


def of_draw(found: list[Any], n: int | None, fresh: int, draw: int) -> list[Any]:
    """The first n to ask; with --fresh those of this draw alone, after the n of each draw before."""
    if not fresh:
        return found[:n]
    if draw < 1 or n is None:
        raise ValueError("--fresh goes with --draw 1 or more, and --n")
    if draw*n > len(found):
        raise ValueError(f"--draw {draw} --fresh with --n {n} asks up to number {draw*n}, and there are {len(found)}")
    return found[(draw - 1)*n:draw*n]


def take(flag: str, found: list[Row], n: int, least: int = 1) -> list[Row]:
    """The first n. ValueError if there are fewer."""
    if not least <= n <= len(found):
        raise ValueError(f"{flag} is {least} to {len(found)} here, not {n}")
    return found[:n]
