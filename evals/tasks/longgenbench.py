"""Many questions answered in one long generation: gsm8k, as LongGenBench has it. Evicts generated tokens too, with --decode-budget.

Paper: Liu et al. 2024, arXiv 2410.04199; data and examples: as gsm8k. The prompt has all example questions first and all example answers
after, so an example is two shots, which live or die apart. The score of an item is its share of right answers.
"""
import re
from typing import Any, Sequence

from ..data import rows
from ..items import Item, Options
from . import gsm8k

SETTINGS = {"shots": 8, "exemplars": "auto", "order": 0, "questions": 20}
LEAD = ("Answer each question step by step, in the format of the examples. Begin each answer with 'Answer_' and its number, and end it with "
        "'The answer is'. Do not repeat the questions. Answer all of them.\n\nExamples:\n\n")


def load(options: Options) -> list[Item]:
    (kind, examples), per_item = gsm8k.exemplars(options), options["questions"]
    found = rows(options.data_dir, "gsm8k/test", ("openai/gsm8k", "main", "test"), gsm8k.FIELDS)
    if not 1 <= per_item <= len(found):
        raise ValueError(f"--questions is 1 to {len(found)} here, not {per_item}")
    shots = numbered("Question", [row["question"] for row in examples]) + numbered("Answer", [gsm8k.worked(row["answer"]) for row in examples])
    return [item(f"{begin}+{per_item}/{kind}", shots, [row["question"] for row in asked],
                 [gsm8k.number(row["answer"].split("####")[-1]) for row in asked])
            for begin in range(0, len(found) - per_item + 1, per_item) for asked in [found[begin:begin + per_item]]][:options.n]


def unit(item: str, tags: dict) -> str:
    """The questions of one generation, whatever examples stand before them: "0+20". Those of 5 and those of 20 questions
    are units apart though they share questions, so do not pool them in one line."""
    return item.partition("/")[0]


def draw(item: str, tags: dict) -> str:
    """Which examples, in which order, whatever their number: "cot", "train-order1"."""
    return item.rpartition("/")[2].partition("-")[2]


def numbered(name: str, given: Sequence[str]) -> list[str]:
    """A shot each, and an empty line after the last."""
    return [f"{name}_{i}: {text.strip()}\n" + "\n"*(i == len(given)) for i, text in enumerate(given, 1)]


def item(id: str, shots: Sequence[str], questions: Sequence[str], gold: list[Any], **more: Any) -> Item:
    """All questions at once. gold: an answer each."""
    listed = "".join(f"Question_{i}: {text.strip()}\n" for i, text in enumerate(questions, 1))
    return Item(id=id, lead=LEAD, shots=shots, question=f"The questions:\n\n{listed}\nAnswer_1:", cue="Answer_1:",
                query="Answer each question step by step.", gold=gold, max_tokens=160*len(gold), **more)


def answers(text: str) -> dict[int, str]:
    """By number: the first that says something."""
    said: dict[int, str] = {}
    for i, one in re.findall(r"Answer_(\d+):(.*?)(?=Answer_\d+:|\Z)", f"Answer_1: {text}", re.DOTALL):
        if one.strip():
            said.setdefault(int(i), one)
    return said


def score(item: Item, answer: str) -> float:
    said = answers(answer)
    return sum(gsm8k.right(said.get(i, ""), gold) for i, gold in enumerate(item.gold, 1))/len(item.gold)
