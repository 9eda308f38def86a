"""RULER: 13 tasks at any length, from needles in noise to variables that are traced and words that are counted.

Paper: Hsieh et al. 2024, arXiv 2404.06654; prompts, lengths and scores: github.com/NVIDIA/RULER (Apache 2.0). --sets
names the tasks, --length the tokens of a prompt and its answer together. The context is everything before the question.
It opens by announcing what will be asked; --announce 0 leaves that out. Score: the share of what is asked for that the
answer has; for qa_1 and qa_2 whether it has any of it. Essays: any texts in niah/haystack/*.txt of the data folder.
"""
import re

from ...items import Item, Options
from . import documents, needles, tracing
from .draft import Draft

MODULES = {name: module for module in (needles, tracing, documents) for name in module.NAMES}
SETTINGS = {"sets": ",".join(MODULES), "length": 4096, "announce": 1}
SPLIT = "set"
N_DEFAULT = 20  # items of each set


def load(options: Options) -> list[Item]:
    """Of each of --sets as many as options.n, fewer where the data of qa_1 and qa_2 have fewer questions."""
    names = str(options["sets"]).split(",")
    for name in names:
        if name not in MODULES:
            raise ValueError(f"--sets takes {', '.join(MODULES)}, not {name!r}")
    if options["announce"] not in (0, 1):
        raise ValueError(f"--announce is 1, or 0 for contexts that do not tell of the question, "
                         f"not {options['announce']}")
    return [_item(name, i, draft, options) for name in names
            for i, draft in enumerate(MODULES[name].drafts(name, options.n or N_DEFAULT, options))]


def _item(name: str, i: int, draft: Draft, options: Options) -> Item:
    return Item(id=f"{name}/{options['length']}/{i}" + "/unannounced"*(not options["announce"]), context=draft.context,
                question=f"{draft.question} {draft.prefix}", cue=draft.prefix, query=draft.question, gold=draft.gold,
                max_tokens=draft.max_tokens, tags={"set": name, "length": options["length"]})


def score(item: Item, answer: str) -> float:
    """string_match_all of RULER, and string_match_part for qa: a word counts wherever it stands, in any case."""
    said = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()
    found = [gold.lower() in said for gold in item.gold]
    return float(any(found)) if item.tags["set"] in documents.NAMES else sum(found)/len(found)
