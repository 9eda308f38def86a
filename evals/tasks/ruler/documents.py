"""qa_1 and qa_2 of RULER: a question on one paragraph (SQuAD) or several (HotpotQA), among paragraphs on other things.

SQuAD 2.0: Rajpurkar et al. 2018, arXiv 1806.03822, CC-BY-SA-4.0; squad/validation of the data folder. qa_2 takes the
rows of three sets of LongBench, hotpotqa, 2wikimqa and musique, with their passages cut to the first paragraph, which
is what a document of HotpotQA is.
"""
import random
import re
from dataclasses import dataclass, field
from typing import Iterator

from ...data import Row, rows
from ...items import Options
from ..longbench import HUB
from .draft import Draft, announced, checked, rng_of

NAMES = ("qa_1", "qa_2")
SETS = ("hotpotqa", "2wikimqa", "musique")
FIELDS = ("input", "context", "answers")
MAX_TOKENS = 32
INSTRUCTION = ("Answer the question based on the given documents. "
               "Only give me the answer and do not output any other words.\n\n")
OPENING = INSTRUCTION + "The following are given documents.\n\n"


@dataclass(frozen=True)
class Question:
    text: str
    answers: list[str]
    documents: list[str]                               # that answer it, as far as one can tell
    others: list[str] = field(default_factory=list)    # on things near to it


def drafts(name: str, n: int, options: Options) -> Iterator[Draft]:
    """n of them, at most as many as there are questions. ValueError: no data, or not enough of it for the length."""
    questions = _squad(options) if name == "qa_1" else _multi_hop(options)
    pool = sorted({document for question in questions for document in (*question.documents, *question.others)})
    random.Random(options.seed).shuffle(questions)
    for i, question in enumerate(questions[:n]):
        yield _draft(name, question, pool, rng_of(name, i, options), options)


def _draft(name: str, question: Question, pool: list[str], rng: random.Random, options: Options) -> Draft:
    """With the question's own documents, then as many as fit of what is near to it, then of the others."""
    def draw(documents: list[str]) -> Draft:
        text = "".join(f"Document {i}:\n{document}\n\n" for i, document in enumerate(documents, 1))
        asked = f"{INSTRUCTION}Question: {question.text}"
        return announced(Draft(OPENING, text, asked, "Answer:", question.answers, MAX_TOKENS), options)

    chosen = list(question.documents)
    near = [document for document in question.others if document not in chosen]
    far = sorted(set(pool) - {*chosen, *near})
    rng.shuffle(near)
    rng.shuffle(far)
    n_tokens = draw(chosen).n_tokens(options)
    if n_tokens > options["length"]:
        raise ValueError(f"--length is {n_tokens} or more for {name} here, not {options['length']}")
    for document in near + far:
        n_more = options.count(f"Document 999:\n{document}\n\n") + 1
        if n_tokens + n_more <= options["length"]:
            chosen.append(document)
            n_tokens += n_more
    rng.shuffle(chosen)
    if len(chosen) == len(near) + len(far) + len(question.documents):  # there are no more
        return checked(name, draw(chosen), options)
    return draw(chosen)


# -- where questions come from -----------------------------------------------------------------------------------------

def _squad(options: Options) -> list[Question]:
    """Those that have an answer. Near: the other paragraphs of the same article."""
    found = rows(options.data_dir, "squad/validation", ("rajpurkar/squad_v2", None, "validation"),
                 ("title", "context", "question", "answers"))
    articles: dict[str, list[str]] = {}
    for row in found:
        articles.setdefault(row["title"], []).append(row["context"])
    return [Question(row["question"].strip(), list(row["answers"]["text"]), [row["context"]], articles[row["title"]])
            for row in found if row["answers"]["text"]]


def _multi_hop(options: Options) -> list[Question]:
    """Those that have documents."""
    questions = [_of_passages(row) for name in SETS
                 for row in rows(options.data_dir, f"longbench/{name}", (HUB, name, "test"), FIELDS)]
    questions = [question for question in questions if question.documents]
    if not questions:
        raise ValueError(f"qa_2 of ruler finds no answer in the first paragraphs of {', '.join(SETS)} of longbench")
    return questions


def _of_passages(row: Row) -> Question:
    """A passage has a title, and then paragraphs. LongBench does not say which ones are needed: here, those that have
    an answer, if there are any, and those that the question names. Where the answer is yes or no, the latter alone."""
    texts = re.split(r"(?:^|\n)Passage \d+:\n", row["context"])
    passages = [text.strip().split("\n", 2)[:2] for text in texts if text.strip()]
    documents = {"\n".join(passage): passage[0].partition(" (")[0].lower() for passage in passages}
    answers, asked = list(row["answers"]), row["input"].lower()
    needed = {document for document, title in documents.items() if title in asked}
    if not {answer.lower() for answer in answers} <= {"yes", "no"}:
        lower = [answer.lower() for answer in answers]
        answering = {document for document in documents if any(answer in document.lower() for answer in lower)}
        needed = needed | answering if answering else set()
    ordered = [document for document in documents if document in needed]
    return Question(row["input"].strip(), answers, ordered, list(documents))
