"""Everyday knowledge, five choices, four examples in front; an example is a shot.

Paper: Talmor et al. 2019, arXiv 1811.00937; data: tau/commonsense_qa (MIT), answers of its validation split.
--exemplars cot takes the seven of Wei et al. 2022 (arXiv 2201.11903) with their reasons: commonsense_qa/cot_exemplars
of the data folder. Without reasons the answer is one letter, which question-in samples before anything was evicted.
"""
from .. import choices
from ..data import rows, take
from ..items import Item, Options

SETTINGS = {"shots": 4, "exemplars": "train"}
LABELS = "ABCDE"
HUB = "tau/commonsense_qa"
FIELDS = ("question", "choices", "answerKey")


def load(options: Options) -> list[Item]:
    reasons = options["exemplars"] == "cot"
    if options["exemplars"] not in ("cot", "train"):
        raise ValueError(f"--exemplars is train (answers alone) or cot (with reasons), not {options['exemplars']!r}")
    shown = rows(options.data_dir, "commonsense_qa/cot_exemplars", None, (*FIELDS, "rationale")) if reasons else \
        rows(options.data_dir, "commonsense_qa/train", (HUB, None, "train"), FIELDS)
    shots = [f"{_block(row)} {_answer(row)}\n\n" for row in take("--shots", shown, options["shots"], least=0)]
    asked = rows(options.data_dir, "commonsense_qa/validation", (HUB, None, "validation"), FIELDS)
    return [Item(id=f"{row.get('id', i)}/{options['shots']}-{options['exemplars']}", shots=shots, question=_block(row),
                 cue=choices.CUE,
                 query=row["question"].strip(), gold=row["answerKey"], stop=["\n\n"], max_tokens=128 if reasons else 16)
                 for i, row in enumerate(asked[:options.n])]


def score(item: Item, answer: str) -> bool:
    return choices.letter(answer, LABELS) == item.gold


def _block(row: dict) -> str:
    return choices.block(row["question"], row["choices"]["label"], row["choices"]["text"])


def _answer(row: dict) -> str:
    return f"{row['rationale'].strip()} The answer is {row['answerKey']}." if "rationale" in row else row["answerKey"]
