"""Grade-school arithmetic, with worked examples in front (few-shot chain of thought); an example is a shot.

Paper: Cobbe et al. 2021, arXiv 2110.14168; data: openai/gsm8k (MIT). The eight examples are those of Wei et al. 2022
(arXiv 2201.11903), as carried by lm-evaluation-harness (MIT): gsm8k/cot_exemplars of the data folder. --exemplars train takes the
training split instead, for more shots than eight. Greedy; the number after "The answer is" counts, else the last number.
"""
import re
from decimal import Decimal, InvalidOperation

from ..data import rows, take
from ..items import Item, Options

SETTINGS = {"shots": 8, "exemplars": "cot"}
NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"


def load(options: Options) -> list[Item]:
    shots = [f"Q: {row['question'].strip()}\nA: {worked(row['answer'])}\n\n" for row in exemplars(options)]
    return [Item(id=f"{row.get('id', i)}/{options['shots']}-{options['exemplars']}", shots=shots, question=f"Q: {row['question'].strip()}\nA:",
                 query=row["question"].strip(), gold=number(row["answer"].split("####")[-1]), stop=["Q:"], max_tokens=320)
            for i, row in enumerate(rows(options.data_dir, "gsm8k/test", ("openai/gsm8k", "main", "test"), ("question", "answer"))[:options.n])]


def exemplars(options: Options) -> list[dict]:
    fields = ("question", "answer")
    if options["exemplars"] == "cot":
        return take("--shots", rows(options.data_dir, "gsm8k/cot_exemplars", None, fields), options["shots"])
    if options["exemplars"] == "train":
        return take("--shots", rows(options.data_dir, "gsm8k/train", ("openai/gsm8k", "main", "train"), fields), options["shots"])
    raise ValueError(f"--exemplars is cot (those of the paper on chain of thought, eight) or train, not {options['exemplars']!r}")


def score(item: Item, answer: str) -> bool:
    return right(answer, item.gold)


def right(answer: str, gold: str) -> bool:
    said = re.findall(rf"answer is:?\s*({NUMBER})", answer) or re.findall(NUMBER, answer)[-1:]
    return bool(said) and number(said[0]) == gold


def worked(answer: str) -> str:
    """Without the calculator's marks, and with the ending that is asked for."""
    steps, _, number = re.sub(r"<<.*?>>", "", answer).partition("####")
    return f"{steps.strip()} The answer is {number.strip()}." if number else steps.strip()


def number(text: str) -> str:
    """One spelling for a number: "1,200.0" and "1200" are the same."""
    try:
        return f"{Decimal(re.sub('[$,]', '', text.strip())).normalize():f}"
    except InvalidOperation:
        raise ValueError(f"gsm8k: {text.strip()!r} is no number") from None
