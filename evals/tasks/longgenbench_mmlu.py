"""Many multiple-choice questions of a subject answered in one long generation: mmlu, as LongGenBench has it.

Paper: Liu et al. 2024, arXiv 2410.04199; data: as mmlu; examples: the subject's five with reasons of
lm-evaluation-harness (MIT), which LongGenBench takes, too: DATA/mmlu/cot_prompts.jsonl. Example questions come first,
example answers after. What is as in the original (longgenbench_MMLU_openai.py) and what is not, longgenbench says; here
the instruction names the subject, new questions begin at 6 after five examples, and the last A, B, C or D of an answer
counts, be it the first letter of a word, as there. Choices have a space between them, and what was not answered is not
asked again but wrong.
"""
import re

from ..data import rows, take
from ..items import Item, Options
from . import mmlu
from .longgenbench import item, share

SETTINGS = {"shots": 5, "questions": 20}
LEAD = ("Answer each question step by step, adhering to the format shown in the examples provided. Start each response "
        "with 'Answer_' . Do not repeat the question. Ensure that you respond to all the questions presented, "
        "regardless of their number. The following are multiple choice questions (with answers) about {}.\n\n")


def load(options: Options) -> list[Item]:
    examples = {row["subject"]: _examples(row["prompt"])
                for row in rows(options.data_dir, "mmlu/cot_prompts", None, ("subject", "prompt"))}
    n, items = options["questions"], []
    for subject, found in mmlu.by_subject("test", options).items():
        if subject not in examples:
            raise ValueError(f"mmlu/cot_prompts has no {subject}, which mmlu/test asks about")
        shown = take("--shots", examples[subject], options["shots"])
        asked = take("--questions", found, n)
        lead, gold = LEAD.format(subject.replace("_", " ")), [mmlu.LABELS[row["answer"]] for row in asked]
        items.append(item(f"{subject}/{n}/{len(shown)}", lead, shown, [_question(row) for row in asked], gold,
                          tags={"subject": subject}))
    return items[:options.n]


def unit(item: str, tags: dict) -> str:
    """The subject, however many of its questions are asked."""
    return item.partition("/")[0]


def score(item: Item, answer: str) -> float:
    return share(answer, item.gold, lambda text: (re.findall("A|B|C|D", text) or [""])[-1])


def _examples(prompt: str) -> list[tuple[str, str]]:
    """(question with its choices, answer with its reasons) of "Q: ...\nA: ..." blocks."""
    return [(question, answer)
            for question, _, answer in (block.partition("\nA: ") for block in re.split(r"(?:^|\n)Q: ", prompt)[1:])]


def _question(row: dict) -> str:
    return f"{row['question'].strip()}\n" + " ".join(f"({label}) {choice}"
                                                     for label, choice in zip(mmlu.LABELS, row["choices"]))
