"""Grade-school arithmetic, with worked examples in front (few-shot chain of thought); an example is a shot.

Paper: Cobbe et al. 2021, arXiv 2110.14168; data: openai/gsm8k (MIT). --exemplars cot: the eight of Wei et al. 2022
(arXiv 2201.11903), as carried by lm-evaluation-harness (MIT), in gsm8k/cot_exemplars of the data folder. --exemplars
train: the training split, for more than eight. auto: cot where the folder has them, else train; an item's id says
which. --order N: the examples in another order, drawn with seed N; 0: as they are. --draw N: other examples of the
training split, drawn with seed N; with --fresh 1 each draw has questions of its own, too.

Scored as lm-evaluation-harness scores its gsm8k_cot, by both of its filters: `strict` takes the first number after "The
answer is", `flexible` the last number of the answer. `flexible` is the score: an evicted model that forgot the format
may still be right.
"""
import random
import re

from ..data import drawn, of_draw, rows, take
from ..items import Item, Options

SETTINGS = {"shots": 8, "exemplars": "auto", "order": 0, "draw": 0, "fresh": 0}
FIELDS = ("question", "answer")
# Of lm_eval/tasks/gsm8k/gsm8k-cot.yaml: the filters, and what comparing ignores, one after the other
STRICT = re.compile(r"The answer is (\-?[0-9\.\,]+).")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = ",", r"\$", r"(?s).*#### ", r"\.$"


def load(options: Options) -> list[Item]:
    kind, shown = exemplars(options, least=0)
    found = rows(options.data_dir, "gsm8k/test", ("openai/gsm8k", "main", "test"), FIELDS)
    shots = [f"Q: {row['question'].strip()}\nA: {worked(row['answer'])}\n\n" for row in shown]
    return [Item(id=f"{row.get('id', i)}/{kind}", shots=shots, question=f"Q: {row['question'].strip()}\nA:", cue="A:",
                 query=row["question"].strip(),
                 gold=number(row["answer"].split("####")[-1]), stop=["Q:"], max_tokens=320)
            for i, row in of_draw(list(enumerate(found)), options.n, options["fresh"], options["draw"])]


def exemplars(options: Options, least: int = 1) -> tuple[str, list[dict]]:
    """("8-cot", the examples)"""
    kind, n = options["exemplars"], options["shots"]
    if kind == "auto":
        kind = "cot" if options.data_dir and any(options.data_dir.glob("gsm8k/cot_exemplars.jsonl*")) else "train"
    if kind not in ("cot", "train"):
        raise ValueError("--exemplars is cot (the eight of the paper on chain of thought), train or auto, not "
                         f"{kind!r}")
    hub, name = (None, "gsm8k/cot_exemplars") if kind == "cot" else (("openai/gsm8k", "main", "train"), "gsm8k/train")
    if options["draw"] and kind == "cot":
        raise ValueError("--draw is for --exemplars train: of cot there are eight")
    chosen = take("--shots", drawn(rows(options.data_dir, name, hub, FIELDS), options["draw"]), n, least)
    if options["order"]:
        random.Random(options["order"]).shuffle(chosen)
    more = "".join(f"-{name}{options[name]}" for name in ("order", "draw") if options[name])
    return f"{n}-{kind}{more}", chosen


def score(item: Item, answer: str) -> bool:
    return verdicts(item, answer)["flexible"]


def verdicts(item: Item, answer: str) -> dict[str, bool]:
    """Of both filters."""
    strict, flexible = STRICT.search(answer), [found[0] for found in FLEXIBLE.finditer(answer)]
    return {"strict": strict is not None and number(strict[1]) == item.gold,
            "flexible": bool(flexible) and number(flexible[-1]) == item.gold}


def worked(answer: str) -> str:
    """Without the calculator's marks, and with the ending that is asked for."""
    steps, _, result = re.sub(r"<<.*?>>", "", answer).partition("####")
    return f"{steps.strip()} The answer is {result.strip()}." if result else steps.strip()


def number(text: str) -> str:
    """What is compared, of a number: "$1,200." and "1200" are the same, "1200.0" is another."""
    text = text.strip()
    for pattern in IGNORED:
        text = re.sub(pattern, "", text)
    return text
