"""The eight needle tasks of RULER: sentences that give a key's magic number, in noise, in essays, among their kind."""
import random
import uuid
from dataclasses import dataclass
from typing import Iterator

from pykvc.spans import sentence_spans

from ...items import Options
from ..niah import haystacks
from .draft import Draft, english, longest, rng_of

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = [round(100*i/39) for i in range(40)]  # percent of the sentences of an essay
MAX_TOKENS = 128


@dataclass(frozen=True)
class Kind:
    haystack: str          # repeat: NOISE; essay; needle: other needles
    keys: str = "words"
    values: str = "numbers"
    n_keys: int = 1
    n_values: int = 1      # of each key
    n_asked: int = 1       # keys


NAMES = {
    "niah_single_1": Kind("repeat"),
    "niah_single_2": Kind("essay"),
    "niah_single_3": Kind("essay", values="uuids"),
    "niah_multikey_1": Kind("essay", n_keys=4),
    "niah_multikey_2": Kind("needle"),
    "niah_multikey_3": Kind("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Kind("essay", n_values=4),
    "niah_multiquery": Kind("essay", n_keys=4, n_asked=4)}


def drafts(name: str, n: int, options: Options) -> Iterator[Draft]:
    """n of them. ValueError: no essays, no list of words, or a length that cannot be had."""
    kind = NAMES[name]
    essay = _essay(options) if kind.haystack == "essay" else []
    for i in range(n):
        yield _draft(name, kind, essay, rng_of(name, i, options), options)


def _draft(name: str, kind: Kind, essay: list[str], rng: random.Random, options: Options) -> Draft:
    keys = [_random(kind.keys, rng) for _ in range(kind.n_keys)]
    values = {key: [_random(kind.values, rng) for _ in range(kind.n_values)] for key in keys}
    needles = [NEEDLE.format(kind=kind.values, key=key, value=value) for key in keys for value in values[key]]
    rng.shuffle(needles)
    asked = rng.sample(keys, kind.n_asked)
    opening, question, prefix = _wording(kind, ", ".join(asked[:-1]) + ", and "*(len(asked) > 1) + asked[-1])
    depths, begin = sorted(rng.sample(DEPTHS, len(needles))), rng.randrange(len(essay) or 1)
    seed, at = rng.random(), rng.random()
    turned = essay[begin:] + essay[:begin]

    def draw(n: int) -> Draft:
        if kind.haystack == "essay":
            text = _between_sentences(" ".join(turned[:n]), needles, depths)
        else:
            text = _between_lines(_lines(kind, n, random.Random(seed)), needles[0], at)
        gold = [value for key in asked for value in values[key]]
        return Draft(opening, text + "\n", question, prefix, gold, MAX_TOKENS)
    return longest(name, draw, 40 if essay else 2, options, len(essay) or None)


def _random(kind: str, rng: random.Random) -> str:
    if kind == "words":
        return f"{rng.choice(english('adjective'))}-{rng.choice(english('noun'))}"
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _wording(kind: Kind, query: str) -> tuple[str, str, str]:
    """(opening, question, prefix), in the singular where one value is the answer."""
    one = kind.n_values*kind.n_asked == 1
    some, what, verb = ("A", "What is", "is") if one else ("Some", "What are all", "are")
    things = kind.values[:-1] if one else kind.values
    opening = (f"{some} special magic {things} {verb} hidden within the following text. Make sure to memorize it. "
               f"I will quiz you about the {things} afterwards.\n")
    return (opening, f"{what} the special magic {things} for {query} mentioned in the provided text?",
            f"The special magic {things} for {query} mentioned in the provided text {verb}")


# -- haystacks ---------------------------------------------------------------------------------------------------------

def _essay(options: Options) -> list[str]:
    """The words of all texts, one after the other."""
    return [word for path in haystacks("ruler", options) for word in path.read_text(encoding="utf-8").split()]


def _lines(kind: Kind, n: int, rng: random.Random) -> list[str]:
    if kind.haystack == "repeat":
        return [NOISE]*n
    return [NEEDLE.format(kind=kind.values, key=_random(kind.keys, rng), value=_random(kind.values, rng))
            for _ in range(n)]


def _between_lines(lines: list[str], needle: str, at: float) -> str:
    """at: from 0, before the first line, to less than 1, before the last."""
    i = int(at*len(lines))
    return "\n".join([*lines[:i], needle, *lines[i:]])


def _between_sentences(text: str, needles: list[str], depths: list[int]) -> str:
    sentences = [text[a:b].strip() for a, b in sentence_spans(text)]
    cuts = [0, *(len(sentences)*depth//100 for depth in depths), len(sentences)]
    parts = [" ".join(sentences[a:b]) for a, b in zip(cuts, cuts[1:])]
    return " ".join(part for both in zip(parts, [*needles, ""]) for part in both if part)
