"""Questions about long documents: five English sets of LongBench, with its prompts and metrics; a sentence is a shot.

Paper: Bai et al. 2023, arXiv 2308.14508; prompts and data: THUDM/LongBench (MIT; HotpotQA CC-BY-SA-4.0, 2WikiMultihopQA
Apache 2.0, MuSiQue and QASPER CC-BY-4.0, Wikipedia text CC-BY-SA). --sets names hotpotqa, 2wikimqa, musique, qasper,
passage_retrieval_en; --length N cuts a longer context in the middle, as LongBench does, to N tokens. Score: token F1,
or the share of right paragraph numbers.
"""
import hashlib
import re
import string
from collections import Counter

from ..data import rows
from ..items import Item, Options

HUB = "Xnhyacinth/LongBench"  # the same rows as files: the original is a script, which `datasets` runs no longer
SETTINGS = {"sets": "hotpotqa", "length": 0}
SPLIT = "set"
PASSAGES = ("Answer the question based on the given passages. Only give me the answer and do not output any other "
            "words.\n\n")
ARTICLE = ('Answer the question as concisely as you can, using a single phrase or sentence if possible. If the '
           'question cannot be answered based on the information in the article, write "unanswerable". If the question '
           'is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any explanation.\n\n')
QA = (PASSAGES + "The following are given passages.\n", "\n\n" + PASSAGES + "Question: {input}\nAnswer:", 32)
SETS = {  # before the context, after it, tokens of the answer
    "hotpotqa": QA, "2wikimqa": QA, "musique": QA,
    "qasper": ("You are given a scientific article and a question. " + ARTICLE + "Article: ",
               "\n\n " + ARTICLE.replace("Answer the question as", "Answer the question based on the above article as")
               + "Question: {input}\n\nAnswer:", 128),
    "passage_retrieval_en": (
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n",
        '\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that the abstract is '
        'from. The answer format must be '
        'like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is:', 32)}


def load(options: Options) -> list[Item]:
    items = []
    for name in str(options["sets"]).split(","):
        if name not in SETS:
            raise ValueError(f"--sets takes {', '.join(SETS)}, not {name!r}")
        lead, after, max_tokens = SETS[name]
        found = rows(options.data_dir, f"longbench/{name}", (HUB, name, "test"), ("input", "context", "answers"))
        items += [Item(id=f"{name}/{row.get('_id', i)}/{options['length']}", lead=lead,
                       context=_cut(row["context"], options),
                       question=after.replace("{input}", row["input"]), query=row["input"], gold=list(row["answers"]),
                       max_tokens=max_tokens,
                       tags={"set": name, "document": hashlib.sha256(row["context"].encode()).hexdigest()[:16]})
                  for i, row in enumerate(found[:options.n])]
    return items


def unit(item: str, tags: dict) -> str:
    """The document, at any length: its questions share one eviction. Old answers do not name it, so that there each
    question is a unit."""
    return tags.get("document") or item.rpartition("/")[0] or item


def score(item: Item, answer: str) -> float:
    if item.tags["set"] == "passage_retrieval_en":
        named = re.findall(r"\d+", answer)
        return named.count(re.search(r"\d+", item.gold[0])[0])/len(named) if named else 0.0
    return max(_f1(_words(answer), _words(gold)) for gold in item.gold)


def _words(text: str) -> list[str]:
    """As SQuAD compares: lower case, no punctuation, no articles."""
    return re.sub(r"\b(a|an|the)\b", " ", "".join(c for c in text.lower() if c not in string.punctuation)).split()


def _f1(said: list[str], gold: list[str]) -> float:
    n_same = sum((Counter(said) & Counter(gold)).values())
    return 2*n_same/(len(said) + len(gold)) if n_same else 0.0


def _cut(text: str, options: Options) -> str:
    """Its beginning and its end, together about `length` tokens; all of it if that is 0."""
    n = options.count(text) if options["length"] else 0
    if n <= options["length"]:
        return text
    half = int(len(text)*options["length"]/n/2)
    return text[:half] + text[-half:]
