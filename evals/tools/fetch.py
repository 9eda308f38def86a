"""What a table needs: `python -m evals fetch --task niah --data-dir data`, each file checked against its sha256.

A file that is there stays. One that --from FOLDER has is copied. Else it is made here (needles), taken out of the
installed lm-evaluation-harness (examples with reasons), or fetched from its source at one commit. What is neither in
the folder nor at a source that can be read file by file is named, with where it is from.
"""
import gzip
import hashlib
import json
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Callable, Iterator, NamedTuple, Optional, Sequence

from pykvc.flags import flag

from ..flags import end, existing, known_tasks

Rows = Iterator[dict[str, Any]]


class File(NamedTuple):
    sha256: str
    source: str     # a repository, at a commit where it is not fetched from there; "" of what is made


# -- made here -------------------------------------------------------------------------------------------------------

SAN_FRANCISCO = "eat a sandwich and sit in Dolores Park on a sunny day"  # gkamradt/LLMTest_NeedleInAHaystack, MIT
CITIES = {"Utrecht": 2763352, "Riga": 1770315, "Austin": 4805787, "Cork": 7739587, "Zagreb": 4883691, "Basel": 9704338,
          "Nantes": 5650443, "Hanoi": 8990515, "Denver": 7357098, "Lagos": 1327506, "Tromso": 2316275,
          "Nairobi": 2884117, "Porto": 6879487, "Leeds": 9167161, "Tunis": 2497192, "Kyoto": 7199514, "Quito": 7360941,
          "Bogota": 5374092, "Minsk": 8192109, "Lisbon": 9443167}


def needles() -> Rows:
    yield {"id": "needle-sf", "needle": f"The best thing to do in San Francisco is {SAN_FRANCISCO}.",
           "question": "What is the best thing to do in San Francisco?", "answer": SAN_FRANCISCO}
    for i, (city, number) in enumerate(CITIES.items()):  # worded as in RULER
        yield {"id": f"needle-{i}", "needle": f"One of the special magic numbers for {city} is: {number}.",
               "question": f"What is the special magic number for {city} mentioned in the provided text?",
               "answer": str(number)}


# -- of the installed harness ----------------------------------------------------------------------------------------

def _harness(path: str) -> str:
    package = find_spec("lm_eval")
    if package is None or package.origin is None:
        raise ValueError("it is in lm-evaluation-harness: `pip install '.[lm-eval]'` first")
    return (Path(package.origin).parent/"tasks"/path).read_text(encoding="utf-8")


def gsm8k_examples() -> Rows:
    import yaml
    task = yaml.load(_harness("gsm8k/gsm8k-cot.yaml"), yaml.BaseLoader)
    for i, sample in enumerate(task["fewshot_config"]["samples"]):
        yield {"id": f"wei2022-gsm8k-{i}", "question": sample["question"], "answer": sample["target"]}


def mmlu_examples() -> Rows:
    for subject, prompt in json.loads(_harness("mmlu/flan_cot_fewshot/_cot_prompts.json")).items():
        yield {"subject": subject, "prompt": prompt}


# -- of a repository -------------------------------------------------------------------------------------------------

def _github(repository: str, commit: str, path: str, n: int | None = None) -> Rows:
    """The first n rows of a file of JSON lines."""
    url = f"https://raw.githubusercontent.com/{repository}/{commit}/{path}"
    try:
        with urllib.request.urlopen(url, timeout=60) as reply:
            data = reply.read()
    except OSError as error:
        raise ValueError(f"{url} cannot be read: {getattr(error, 'reason', error)}") from None
    text = (gzip.decompress(data) if path.endswith(".gz") else data).decode()
    yield from map(json.loads, text.strip().split("\n")[:n])


def _gsm8k(split: str, n: int) -> Rows:
    found = _github("openai/grade-school-math", "3101c7d5072418e28b9008a6636bde82a006892c",
                    f"grade_school_math/data/{split}.jsonl", n)
    yield from ({"id": f"gsm8k-{split}-{i}", **row} for i, row in enumerate(found))


def _commonsense_qa(split: str, n: int) -> Rows:
    for row in _github("kojima-takeshi188/zero_shot_cot", "5ef330fcdeec0cd26aee27943504f91f8ec1c33c",
                       f"dataset/CommonsenseQA/{split}_rand_split.jsonl", n):
        asked = row["question"]
        choices = {name: [choice[name] for choice in asked["choices"]] for name in ("label", "text")}
        yield {"id": row["id"], "question": asked["stem"], "question_concept": asked["question_concept"],
               "choices": choices, "answerKey": row["answerKey"]}


FILES = {name: File(**known) for name, known in json.loads((Path(__file__).parent/"files.json").read_text()).items()}
MADE: dict[str, Callable[[], Rows]] = {
    "niah/needles.jsonl": needles, "gsm8k/cot_exemplars.jsonl": gsm8k_examples, "mmlu/cot_prompts.jsonl": mmlu_examples,
    "gsm8k/test.jsonl": lambda: _gsm8k("test", 200), "gsm8k/train.jsonl": lambda: _gsm8k("train", 64),
    "commonsense_qa/train.jsonl": lambda: _commonsense_qa("train", 32),
    "commonsense_qa/validation.jsonl": lambda: _commonsense_qa("dev", 200),
    "humaneval/test.jsonl": lambda: _github("openai/human-eval", "6d43fb980f9fee3c892a914eda09951f772ad10d",
                                            "data/HumanEval.jsonl.gz")}
FOLDERS = {  # of a task, where that is not its name alone
    "fidelity": ["niah", "gsm8k"], "ruler": ["niah", "squad", "longbench"], "longgenbench": ["gsm8k"],
    "longgenbench_mmlu": ["mmlu"]}


def fetch(data_dir: Path, tasks: Sequence[str], folder: Path | None, say: Callable[[str], None]) -> list[str]:
    """Puts what the tasks need (all: none given) into data_dir. folder: --from. Tells of each file; returns what could
    not be had, in sentences. ValueError: data_dir cannot be written to."""
    folders = {name for task in tasks for name in FOLDERS.get(task, [task])}
    problems = []
    for name, file in FILES.items():
        if tasks and name.partition("/")[0] not in folders:
            continue
        target = data_dir/name
        try:
            if target.is_file() and _sum(target.read_bytes()) == file.sha256:
                say(f"{name}: is there")
                continue
            data, how = _content(name, file, folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f"{target.name}.part")
            part.write_bytes(data)
            part.replace(target)
            say(f"{name}: {how}")
        except ValueError as error:
            problems.append(f"{name}: {error}")
        except OSError as error:
            raise ValueError(f"cannot write {target}: {error.strerror or error}") from None
    return problems


def _content(name: str, file: File, folder: Path | None) -> tuple[bytes, str]:
    """(bytes, how they came). ValueError says why there are none."""
    if folder is not None and (folder/name).is_file():
        data, how = (folder/name).read_bytes(), f"copied from {folder}"
    elif name not in MADE:
        raise ValueError(f"it is made of {file.source}: --from names a folder that has it")
    else:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in MADE[name]())
        data, how = "".join(lines).encode(), f"from {file.source}" if file.source else "made"
    if _sum(data) != file.sha256:
        raise ValueError(f"it has sha256 {_sum(data)[:12]}..., not {file.sha256[:12]}...: it is another file than the "
                         "one that published figures are from")
    return data, how


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def command(
    data_dir: Annotated[Path, flag("--data-dir",
                                   help="Where the files go, and the other commands read them.")] = Path("evals-data"),
    folder: Annotated[Optional[Path],
                      flag("--from", help="A folder that has them already: they are checked and copied.")] = None,
    tasks: Annotated[Optional[list[str]], flag("--task", help="Only what these need.")] = None,
) -> None:
    """Get or make the rows and texts that tasks need, each checked against its sha256."""
    end(fetch(data_dir, known_tasks(tasks), existing("--from", folder), print))
