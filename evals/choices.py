"""Multiple-choice questions as text, and the letter of an answer."""
import re
from typing import Sequence


CUE = "Answer:"


def block(question: str, labels: Sequence[str], texts: Sequence[str]) -> str:
    return question.strip() + "\n" + "".join(f"{label}. {text}\n" for label, text in zip(labels, texts, strict=True)) + CUE


def letter(answer: str, labels: str) -> str:
    """What "the answer is" names, else the first thing said; "" if neither is a label."""
    found = re.search(rf"answer is:?\s*\W{{0,3}}([{labels}])(?![\w'])", answer) or re.match(rf"[\s\W]*([{labels}])(?![\w'])", answer)
    return found[1] if found else ""
