"""Multiple-choice questions as text, and the letter of an answer.

The letter is found as MMLU-Pro finds it (TIGER-AI-Lab/MMLU-Pro, evaluate_from_local.py; Wang et al. 2024, arXiv
2406.01574): after the first "answer is", else after the last "nswer:" of a line, else the last label that is a word of
its own. MMLU-Pro's labels are A to J, here they are those of the question. Where there is none MMLU-Pro draws one, here
the answer is wrong. Three things are not as there, each since its rule misreads such an answer:

1. A letter has to be a word: "The answer is Denmark" does not choose D, "Answer: Both" not B.
2. Signs may stand before it: "The answer is: B. A is wrong", "the answer is **B**, not A", "$\\boxed{B}$".
3. What begins with a label and a sign, or has nothing else in its first line, means it: "C. A decrease in price".
"""
import re
from typing import Sequence


CUE = "Answer:"


def block(question: str, labels: Sequence[str], texts: Sequence[str]) -> str:
    return question.strip() + "\n" + "".join(f"{label}. {text}\n"
                                             for label, text in zip(labels, texts, strict=True)) + CUE


def letter(answer: str, labels: str) -> str:
    """The label that an answer chooses; "" if it names none."""
    said = rf"(?:\\\w+|[^\w\n])*\b([{labels}])\b(?!['’])"  # signs, then a label
    for pattern in (rf"answer is{said}", rf".*[aA]nswer:\s*{said}",
                    rf"\A\W*([{labels}])(?:[ \t]*(?:[^\w\s'’]|\n|\Z))", rf"(?s).*\b([{labels}])\b"):
        if found := re.search(pattern, answer):
            return found[1]
    return ""
