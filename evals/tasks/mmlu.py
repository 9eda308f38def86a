"""Knowledge in 57 subjects, multiple choice, five examples of the subject in front; an example is a shot.

Paper: Hendrycks et al. 2021, arXiv 2009.03300; data: cais/mmlu (MIT), configuration "all". The answer is one letter,
which question-in samples before anything was evicted: only question-out says what an eviction does to it. Items go
round the subjects, so that any beginning is balanced; the questions of a subject share their examples.
"""
import itertools

from .. import choices
from ..data import rows, take
from ..items import Item, Options
from ..store import Row, grouped

SETTINGS = {"shots": 5}
LABELS = "ABCD"
FIELDS = ("question", "subject", "choices", "answer")


def load(options: Options) -> list[Item]:
    shown, items = by_subject("dev", options), []
    for subject, of_subject in by_subject("test", options).items():
        shots = [f"{_block(row)} {LABELS[row['answer']]}\n\n"
                 for row in take("--shots", shown.get(subject, []), options["shots"], least=0)]
        items.append([Item(
            id=f"{row.get('id', f'{subject}/{i}')}/{options['shots']}", shots=shots, question=_block(row),
            cue=choices.CUE, query=row["question"].strip(),
            lead=f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n",
            gold=LABELS[row["answer"]], stop=["\n\n"], max_tokens=16, tags={"subject": subject})
            for i, row in enumerate(of_subject)])
    return [item for of_round in itertools.zip_longest(*items) for item in of_round if item][:options.n]


def by_subject(split: str, options: Options) -> dict[str, list[Row]]:
    return grouped(rows(options.data_dir, f"mmlu/{split}", ("cais/mmlu", "all", split), FIELDS),
                   lambda row: row["subject"])


def unit(item: str, tags: dict) -> str:
    """The subject: its questions share their examples, so one eviction. Where it is not known, the question."""
    return tags.get("subject") or item.rpartition("/")[0] or item


def score(item: Item, answer: str) -> bool:
    return choices.letter(answer, LABELS) == item.gold


def _block(row: dict) -> str:
    return choices.block(row["question"], LABELS, row["choices"])
