"""Many questions answered in one long generation: gsm8k, as LongGenBench has it. Evicts generated tokens too, with --decode-budget.

Paper: Liu et al. 2024, arXiv 2410.04199; data and examples: as gsm8k. The prompt has all example questions first and all example answers
after, so an example is two shots, which live or die apart. The score of an item is its share of right answers.
"""
import re

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
    shots = [f"Question_{i}: {row['question'].strip()}\n" + "\n"*(i == len(examples)) for i, row in enumerate(examples, 1)]
    shots += [f"Answer_{i}: {gsm8k.worked(row['answer'])}\n" + "\n"*(i == len(examples)) for i, row in enumerate(examples, 1)]
    return [_item(begin, found[begin:begin + per_item], shots, kind) for begin in range(0, len(found) - per_item + 1, per_item)][:options.n]


def _item(begin: int, asked: list[dict], shots: list[str], kind: str) -> Item:
    questions = "".join(f"Question_{i}: {row['question'].strip()}\n" for i, row in enumerate(asked, 1))
    return Item(id=f"{begin}+{len(asked)}/{kind}", lead=LEAD, shots=shots,
                question=f"The questions:\n\n{questions}\nAnswer_1:", cue="Answer_1:", query="Answer each question step by step.",
                gold=[gsm8k.number(row["answer"].split("####")[-1]) for row in asked], max_tokens=160*len(asked))


def score(item: Item, answer: str) -> float:
    said = {}
    for i, text in re.findall(r"Answer_(\d+):(.*?)(?=Answer_\d+:|\Z)", f"Answer_1: {answer}", re.DOTALL):
        if text.strip():
            said.setdefault(int(i), text)
    return sum(gsm8k.right(said.get(i, ""), gold) for i, gold in enumerate(item.gold, 1))/len(item.gold)
