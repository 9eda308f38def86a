"""Needle in a haystack: a sentence of its own somewhere in a long text, and a question that only it answers.

Method: https://github.com/gkamradt/LLMTest_NeedleInAHaystack (MIT); the magic numbers are worded as in RULER (arXiv
2404.06654, Apache 2.0). Text: any, in niah/haystack/*.txt of the data folder; needles: niah/needles.jsonl with id,
needle, question, answer. Three needles stand in one context, at different depths: a prefill serves three questions, and
each depth is asked once a needle.
"""
import bisect
import random
from pathlib import Path
from typing import Any

from pykvc.spans import sentence_spans

from ..data import rows, take
from ..items import Item, Options

SETTINGS = {"length": 8000, "depths": "0,11,22,33,44,56,67,78,89,100", "needles": 3}
ACROSS = "depth"  # of the picture
MAX_TOKENS = 48


def load(options: Options) -> list[Item]:
    depths = _depths(options["depths"])
    texts = haystacks("niah", options)
    needles = rows(options.data_dir, "niah/needles", None, ("id", "needle", "question", "answer"))
    take("--needles", needles, options["needles"])  # can there be so many?
    per_text = [_of_text(path, needles, depths, options) for path in texts]
    # any beginning has all texts and depths
    found = [item for of_round in zip(*per_text) for group in of_round for item in group]
    return found[:options.n]


def unit(item: str, tags: dict) -> str:
    """A text with its needles in one arrangement, at any length: its questions share one eviction."""
    text, *rest = item.split("/", 3)
    return f"{text}/{rest[1]}" if len(rest) == 3 else item


def score(item: Item, answer: str) -> bool:
    """The needle's answer stands in what was generated."""
    return _plain(item.gold) in _plain(answer)


def haystacks(name: str, options: Options) -> list[Path]:
    """Long texts, wherever they are from."""
    if options.data_dir is None:
        raise ValueError(f"{name} needs --data-dir, a folder with texts in niah/haystack/*.txt and, for niah, "
                         "niah/needles.jsonl")
    texts = sorted((options.data_dir/"niah"/"haystack").glob("*.txt"))
    if not texts:
        raise ValueError(f"{options.data_dir} has no niah/haystack/*.txt")
    return texts


def _plain(text: str) -> str:
    return " ".join(text.lower().replace(",", "").split())


def _depths(text: Any) -> list[float]:
    try:
        depths = [float(depth) for depth in str(text).split(",")]
    except ValueError:
        depths = []
    if not depths or not all(0 <= depth <= 100 for depth in depths):
        raise ValueError(f"--depths is a list of percentages, 0,50,100, not {text!r}")
    return depths


def _of_text(path: Path, needles: list[dict], depths: list[float], options: Options) -> list[list[Item]]:
    """Context i has needle j at depth i + j*step of the list (modulo), so that over all contexts every needle was at
    every depth."""
    rng = random.Random(f"{options.seed} {path.stem}")
    chosen = [needles[0], *rng.sample(needles[1:], options["needles"] - 1)]
    room = options["length"] - sum(options.count(needle["needle"]) + 1 for needle in chosen)
    text = _cut(path.read_text(encoding="utf-8"), room, options)
    step = max(1, len(depths)//len(chosen))
    unusual = [name for name in ("needles", "depths") if options[name] != SETTINGS[name]]  # they change the context
    others = "".join(f"/{name} {options[name]}" for name in unusual)
    groups = []
    for i in range(len(depths)):
        at = [depths[(i + j*step) % len(depths)] for j in range(len(chosen))]
        context = _insert(text, list(zip(at, (needle["needle"] for needle in chosen))))
        groups.append([Item(
            id=f"{path.stem}/{options['length']}/{i}/{needle['id']}@{depth:g}{others}", context=context + "\n\n",
            question=f"Question: {needle['question']}\nAnswer briefly, in the words of the text.",
            query=needle["question"], gold=needle["answer"], max_tokens=MAX_TOKENS,
            tags={"depth": depth, "length": options["length"], "needle": needle["id"], "text": path.stem})
            for depth, needle in zip(at, chosen)])
    return groups


def _cut(text: str, n_tokens: int, options: Options) -> str:
    """The longest beginning of whole sentences that has at most n_tokens."""
    ends = [end for _, end in sentence_spans(text)]
    n = bisect.bisect_right(ends, n_tokens, key=lambda end: options.count(text[:end]))  # sentences that fit
    if n in (0, len(ends)):
        raise ValueError(f"a haystack of {options['length']} tokens cannot be cut from this text of "
                         f"{options.count(text)}")
    return text[:ends[n - 1]].rstrip()


def _insert(text: str, needles: list[tuple[float, str]]) -> str:
    """Each needle at the sentence boundary nearest to its depth, in percent of the characters."""
    spans = sentence_spans(text)
    cuts = [0, *(end for _, end in spans)]
    for depth, needle in sorted(needles, key=lambda pair: -pair[0]):  # from the end: what comes before keeps its place
        at = min(cuts, key=lambda cut: abs(cut - depth/100*len(text)))
        before, after = text[:at].rstrip(" "), text[at:]
        text = before + (" " if before and not before.endswith("\n") else "") + needle + (" " if after else "") + after
    return text
