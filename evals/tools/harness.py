"""Tasks of lm-evaluation-harness on the rows of a data folder, for machines that cannot reach Hugging Face.

    python -m evals harness --data-dir DATA --out tasks
    python -m pykvc.lm_eval --include_path tasks --tasks gsm8k_cot,commonsense_qa,mmlu --model pykvc --model_args ...

A file of `tasks` is the harness' own task with another source of rows: prompts, filters and metrics stay the harness'.
"""
import json
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from pykvc.flags import flag

from ..data import ENDS, rows
from ..flags import existing

# The harness' file, and our file of each of its splits
SIMPLE = {
    "gsm8k_cot": ("gsm8k/gsm8k-cot.yaml", {"test": "gsm8k/test"}, ("question", "answer")),
    "gsm8k": ("gsm8k/gsm8k.yaml", {"train": "gsm8k/train", "test": "gsm8k/test"}, ("question", "answer")),
    "commonsense_qa": ("commonsense_qa/default.yaml",
                       {"train": "commonsense_qa/train", "validation": "commonsense_qa/validation"},
                       ("question", "choices", "answerKey"))}
MMLU = {"dev": "mmlu/dev", "test": "mmlu/test"}
MMLU_FIELDS = ("question", "subject", "choices", "answer")


def write(data_dir: Path, out: Path) -> list[str]:
    """A file for each task whose rows the folder has, 57 of mmlu; their names. ValueError: no lm_eval, or no rows."""
    package = find_spec("lm_eval")
    if package is None or package.origin is None:
        raise ValueError("there is no lm-evaluation-harness: `pip install '.[lm-eval]'` first")
    theirs, names = Path(package.origin).parent/"tasks", []
    (out/"rows").mkdir(parents=True, exist_ok=True)
    for name, (path, splits, fields) in SIMPLE.items():
        if all(_there(data_dir, file) for file in splits.values()):
            found = {split: rows(data_dir, file, None, fields) for split, file in splits.items()}
            names.append(_task(out, name, theirs/path, found))
    if all(_there(data_dir, file) for file in MMLU.values()):
        by_subject: dict[str, dict[str, list[Any]]] = defaultdict(lambda: {split: [] for split in MMLU})
        for split, file in MMLU.items():
            for row in rows(data_dir, file, None, MMLU_FIELDS):
                by_subject[row["subject"]][split].append(row)
        names += [_task(out, f"mmlu_{subject}", theirs/"mmlu"/"default"/f"mmlu_{subject}.yaml", splits)
                  for subject, splits in by_subject.items()]
    if not names:
        raise ValueError(f"{data_dir} has rows of none of {', '.join(SIMPLE)}, mmlu")
    return names


def _there(data_dir: Path, name: str) -> bool:
    return any((data_dir/f"{name}{end}").is_file() for end in ENDS)


def _task(out: Path, name: str, original: Path, splits: dict[str, list[Any]]) -> str:
    if not original.is_file():
        raise ValueError(f"this lm-evaluation-harness has no {original.name}, so {name} cannot be made of it")
    files = {split: (out/"rows"/f"{name}.{split}.jsonl").resolve() for split in splits}
    for split, of_split in splits.items():
        files[split].write_text("".join(json.dumps(row) + "\n" for row in of_split), encoding="utf-8")
    task = {"include": str(original), "task": name, "dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}}}
    (out/f"{name}.yaml").write_text(json.dumps(task, indent=1) + "\n", encoding="utf-8")  # JSON is YAML
    return name


def command(
    data_dir: Annotated[Path, flag("--data-dir", help="Folder with TASK/*.jsonl[.gz].")],
    out: Annotated[Path, flag("--out", "-o",
                              help="Folder of the tasks' files, for --include_path.")] = Path("lm-eval-tasks"),
) -> None:
    """Write tasks of lm-evaluation-harness (gsm8k_cot, commonsense_qa, mmlu) that read their rows from a folder."""
    existing("--data-dir", data_dir)
    tasks = dict.fromkeys("mmlu" if name.startswith("mmlu_") else name for name in write(data_dir, out))
    print(f"python -m pykvc.lm_eval --include_path {out} --tasks {','.join(tasks)}")
