"""A question of RULER as it is drawn, and how long its text may be."""
import bisect
import functools
import random
from dataclasses import dataclass, replace
from typing import Callable

from ...items import Options

FULL = 0.9  # of --length: what a draft has at least


@dataclass(frozen=True)
class Draft:
    """A prompt is opening, text, question and prefix, in this order."""
    opening: str          # what tells of the question before the text: an instruction, a worked example
    text: str             # with the white space that stands before the question
    question: str
    prefix: str           # the words with which the answer begins
    gold: list[str]       # what an answer is scored by
    max_tokens: int       # of the answer

    @property
    def context(self) -> str:
        return self.opening + self.text

    def n_tokens(self, options: Options) -> int:
        """With room for the answer, without a chat template."""
        return options.count(self.context) + options.count(f"{self.question} {self.prefix}") + self.max_tokens


@functools.cache
def english(*categories: str) -> list[str]:
    """All words of these categories (noun, adjective, verb), each once, of the package that RULER takes them from.
    ValueError: it is missing."""
    try:
        from wonderwords import RandomWord
    except ImportError:
        raise ValueError("ruler takes its words from a package that is missing: `pip install wonderwords`") from None
    return sorted(set(RandomWord().filter(include_categories=categories)))


def different(n: int, letters: str, length: int, rng: random.Random) -> list[str]:
    """n words of random letters."""
    found: dict[str, None] = {}
    while len(found) < n:
        found["".join(rng.choices(letters, k=length))] = None
    return list(found)


def rng_of(name: str, i: int, options: Options) -> random.Random:
    """Of item i. It does not depend on n, so more items are more of the same; nor on --announce, so both variants
    hide the same."""
    return random.Random(f"{options.seed} {name} {options['length']} {i}")


def announced(draft: Draft, options: Options) -> Draft:
    """The draft as it is, or with --announce 0 without its opening."""
    return draft if options["announce"] else replace(draft, opening="")


def longest(name: str, draw: Callable[[int], Draft], least: int, options: Options, most: int | None = None) -> Draft:
    """draw(n) of the largest n that fits in --length tokens, its opening left out where it is not wanted.

    draw(n) grows with n; there is none beyond `most`. ValueError: draw(least) does not fit, or draw(most) leaves more
    than a tenth of the length free."""
    def n_tokens(n: int) -> int:
        return announced(draw(n), options).n_tokens(options)

    if n_tokens(least) > options["length"]:
        raise ValueError(f"--length is {n_tokens(least)} or more for {name} here, not {options['length']}")
    high = least
    while high != most and n_tokens(high) <= options["length"]:
        high = min(2*high, most or 2*high)
    n = least + bisect.bisect_right(range(least, high + 1), options["length"], key=n_tokens) - 1
    while n > least and n_tokens(n) > options["length"]:  # one more word may be one token less
        n -= 1
    return checked(name, announced(draw(n), options), options)


def checked(name: str, draft: Draft, options: Options) -> Draft:
    """The draft itself. ValueError if there was not enough text for it."""
    if (n := draft.n_tokens(options)) < FULL*options["length"]:
        raise ValueError(f"{name} of --length {options['length']} needs more text than there is here, which gives "
                         f"{n} tokens")
    return draft
