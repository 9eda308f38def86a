"""Grade-school arithmetic, with worked examples in front (few-shot chain of thought); an example is a shot.

Paper: Cobbe et al. 2021, arXiv 2110.14168; data: openai/gsm8k (MIT). --exemplars cot: the eight of Wei et al. 2022 (arXiv 2201.11903), as
carried by lm-evaluation-harness (MIT), in gsm8k/cot_exemplars of the data folder. --exemplars train: the training split, for more than
eight. auto: cot where the folder has them, else train; an item's id says which. --order N: the examples in another order, drawn with
seed N; 0: as they are. The number after "The answer is" counts, else the last.
"""
import random
import re
from decimal import Decimal, InvalidOperation

from ..data import rows, take
from ..items import Item, Options

SETTINGS = {"shots": 8, "exemplars": "auto", "order": 0}
FIELDS = ("question", "answer")
NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"


def load(options: Options) -> list[Item]:
    kind, shown = exemplars(options, least=0)
    shots = [f"Q: {row['question'].strip()}\nA: {worked(row['answer'])}\n\n" for row in shown]
    return [Item(id=f"{row.get('id', i)}/{kind}", shots=shots, question=f"Q: {row['question'].strip()}\nA:", cue="A:", query=row["question"].strip(),
                 gold=number(row["answer"].split("####")[-1]), stop=["Q:"], max_tokens=320)
            for i, row in enumerate(rows(options.data_dir, "gsm8k/test", ("openai/gsm8k", "main", "test"), FIELDS)[:options.n])]


def exemplars(options: Options, least: int = 1) -> tuple[str, list[dict]]:
    """("8-cot", the examples)"""
    kind, n = options["exemplars"], options["shots"]
    if kind == "auto":
        kind = "cot" if options.data_dir and any(options.data_dir.glob("gsm8k/cot_exemplars.jsonl*")) else "train"
    if kind not in ("cot", "train"):
        raise ValueError(f"--exemplars is cot (the eight of the paper on chain of thought), train or auto, not {kind!r}")
    hub, name = (None, "gsm8k/cot_exemplars") if kind == "cot" else (("openai/gsm8k", "main", "train"), "gsm8k/train")
    chosen = take("--shots", rows(options.data_dir, name, hub, FIELDS), n, least)
    if options["order"]:
        random.Random(options["order"]).shuffle(chosen)
    return f"{n}-{kind}" + f"-order{options['order']}"*bool(options["order"]), chosen


def unit(item: str, tags: dict) -> str:
    """The question, whatever examples stand before it."""
    return item.rpartition("/")[0] or item


def draw(item: str, tags: dict) -> str:
    """Which examples, in which order, whatever their number: "cot", "train-order1"."""
    return item.rpartition("/")[2].partition("-")[2]


def score(item: Item, answer: str) -> bool:
    return right(answer, item.gold)


def right(answer: str, gold: str) -> bool:
    said = re.findall(rf"answer is:?\s*({NUMBER})", answer) or re.findall(NUMBER, answer)[-1:]
    return bool(said) and number(said[0]) == gold


def worked(answer: str) -> str:
    """Without the calculator's marks, and with the ending that is asked for."""
    steps, _, result = re.sub(r"<<.*?>>", "", answer).partition("####")
    return f"{steps.strip()} The answer is {result.strip()}." if result else steps.strip()


def number(text: str) -> str:
    """One spelling for a number: "1,200.0" and "1200" are the same."""
    try:
        return f"{Decimal(re.sub('[$,]', '', text.strip())).normalize():f}"
    except InvalidOperation:
        raise ValueError(f"gsm8k: {text.strip()!r} is no number") from None
