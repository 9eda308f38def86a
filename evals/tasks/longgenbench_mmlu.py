"""Many multiple-choice questions of a subject answered, with reasons, in one long generation: mmlu, as LongGenBench has it.

Paper: Liu et al. 2024, arXiv 2410.04199; data: as mmlu; examples: the subject's five with reasons of lm-evaluation-harness (MIT), which
LongGenBench takes, too: DATA/mmlu/cot_prompts.jsonl. Example questions come first, example answers after; see longgenbench.
"""
import re
from collections import defaultdict

from ..data import rows, take
from ..items import Item, Options
from . import mmlu
from .longgenbench import answers, item, numbered

SETTINGS = {"shots": 5, "questions": 20}


def load(options: Options) -> list[Item]:
    examples = {row["subject"]: _examples(row["prompt"]) for row in rows(options.data_dir, "mmlu/cot_prompts", None, ("subject", "prompt"))}
    by_subject = defaultdict(list)
    for row in rows(options.data_dir, "mmlu/test", ("cais/mmlu", "all", "test"), mmlu.FIELDS):
        by_subject[row["subject"]].append(row)
    n, items = options["questions"], []
    for subject, found in by_subject.items():
        if subject not in examples:
            raise ValueError(f"mmlu/cot_prompts has no {subject}, which mmlu/test asks about")
        shown = take("--shots", examples[subject], options["shots"])
        shots = numbered("Question", [question for question, _ in shown]) + numbered("Answer", [answer for _, answer in shown])
        asked = take("--questions", found, n)
        items.append(item(f"{subject}/{n}/{len(shown)}", shots, [_question(row) for row in asked], [mmlu.LABELS[row["answer"]] for row in asked],
                          tags={"subject": subject}))
    return items[:options.n]


def unit(item: str, tags: dict) -> str:
    """The subject, however many of its questions are asked."""
    return item.partition("/")[0]


def score(item: Item, answer: str) -> float:
    said = answers(answer)
    return sum(_letter(said.get(i, "")) == gold for i, gold in enumerate(item.gold, 1))/len(item.gold)


def _examples(prompt: str) -> list[tuple[str, str]]:
    """(question with its choices, answer with its reasons) of "Q: ...\nA: ..." blocks."""
    return [(question, answer) for question, _, answer in (block.partition("\nA: ") for block in re.split(r"(?:^|\n)Q: ", prompt)[1:])]


def _question(row: dict) -> str:
    return f"{row['question'].strip()}\n" + " ".join(f"({label}) {choice}" for label, choice in zip(mmlu.LABELS, row["choices"]))


def _letter(text: str) -> str:
    """Of the last "answer is"."""
    return (re.findall(r"answer is:? *\(?([A-D])\b", text) or [""])[-1]
