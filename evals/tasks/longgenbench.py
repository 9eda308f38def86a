"""Many questions answered in one long generation: gsm8k, as LongGenBench has it. --decode-budget evicts that, too.

Paper: Liu et al. 2024, arXiv 2410.04199; code: Dominic789654/LongGenBench, longgenbench_GSM8K_openai.py; data and
examples: as gsm8k. The prompt has all example questions first and all example answers after, so an example is two
shots, which live or die apart. The score of an item is its share of right answers.

The original's: the layout, the instruction's words, numbers of new questions that go on after the examples
(Question_9), where an answer begins and ends, and the score: the last number of each answer without its sign, by order,
whatever number stands before it.

Not the original's: the instruction stands in front of the user's turn instead of a system message; the answer is made
to begin with "Answer_9:"; white space; --questions is 20 where theirs is 35 (K) and room is 160 tokens each instead of
4,096 in all; the examples' reasons are one line; a question without an answer counts as wrong, where theirs does not
count it; "1,500" is right for 1,500, which theirs looks up as 500.
"""
import re
from typing import Any, Callable, Sequence

from ..data import of_draw, rows, take
from ..items import Item, Options
from . import gsm8k

SETTINGS = {"shots": 8, "exemplars": "auto", "order": 0, "draw": 0, "fresh": 0, "questions": 20}
LEAD = ("Answer each question step by step, adhering to the format shown in the examples provided. Start each response "
        "with 'Answer_' and introduce the final response with 'The answer is'. Do not repeat the question. Ensure that "
        "you respond to all the questions presented, regardless of their number.\n\n")


def load(options: Options) -> list[Item]:
    (kind, examples), per_item = gsm8k.exemplars(options), options["questions"]
    found = rows(options.data_dir, "gsm8k/test", ("openai/gsm8k", "main", "test"), gsm8k.FIELDS)
    take("--questions", found, per_item)  # are there so many?
    shown = [(row["question"], gsm8k.worked(row["answer"])) for row in examples]
    return [item(f"{begin}+{per_item}/{kind}", LEAD, shown, [row["question"] for row in asked],
                 [gsm8k.number(row["answer"].split("####")[-1]) for row in asked])
            for begin in of_draw(list(range(0, len(found) - per_item + 1, per_item)), options.n, options["fresh"],
                                 options["draw"])
            for asked in [found[begin:begin + per_item]]]


def unit(item: str, tags: dict) -> str:
    """The questions of one generation, whatever examples stand before them: "0+20". Those of 5 and those of 20
    questions are units apart though they share questions, so do not pool them in one line."""
    return item.partition("/")[0]


def item(id: str, lead: str, examples: Sequence[tuple[str, str]], questions: Sequence[str], gold: list[str],
         **more: Any) -> Item:
    """All questions at once. examples: question and answer; gold: an answer each."""
    shots = [f"{name}_{i}:\n{one[part].strip()}\n\n"
             for part, name in enumerate(("Question", "Answer")) for i, one in enumerate(examples, 1)]
    first = len(examples) + 1
    listed = "".join(f"Question_{i}:\n{text.strip()}\n\n" for i, text in enumerate(questions, first))
    cue = f"Answer_{first}:\n"
    return Item(id=id, lead=lead + "Examples:\n", shots=shots, question=f"Following Question:\n{listed}{cue}", cue=cue,
                query="Answer each question step by step.", gold=gold, max_tokens=160*len(gold), **more)


def answers(text: str) -> list[str]:
    """In their order, from what follows the cue, as LongGenBench's extract_ans() and process_question() find them: an
    answer stands between a line that ends with a colon and an empty line, or the next "Answer_"."""
    parts = "\n".join(f"Answer_:\n{text.lstrip()}".split("Answer_"))
    return [part.strip() for part in re.findall(r"(?<=:\n)(.*?)(?=\n\n|$)", parts, re.DOTALL)]


def share(text: str, gold: Sequence[str], last: Callable[[str], str]) -> float:
    """Of the gold answers, those that `last` finds in the answer of the same place."""
    return sum(last(said) == last(right) for said, right in zip(answers(text), gold))/len(gold)


def score(item: Item, answer: str) -> float:
    return share(answer, item.gold, _number)


def _number(text: str) -> str:
    """The last of a text."""
    return (re.findall(r"\d*\.?\d+", text.replace(",", "")) or [""])[-1]
