"""vt of RULER, variable tracking: a number is assigned to a variable, that to another, five in all, in noise. cwe and
fwe: which words are the most frequent in a list, and in a text of coded words."""
import math
import random
import string
from dataclasses import replace
from typing import Iterator

from ...items import Options
from .draft import Draft, different, english, longest, rng_of
from .needles import NOISE

N_VARIABLES = 5        # a chain of four hops
N_EXAMPLE = 500        # tokens of the worked example that stands in front
VT_OPENING = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
N_COMMON = 10          # words that cwe asks for
SHORT = 4096           # tokens: below, cwe has fewer repetitions
N_LETTERS = 6          # of a coded word
CWE_OPENING = ("Below is a numbered list of words. In these words, some appear more often than others. "
               "Memorize the ones that appear most often.\n")
CWE_QUESTION = "Question: What are the 10 most common words in the above list?"
CWE_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
FWE_OPENING = ("Read the following coded text and track the frequency of each coded word. "
               "Find the three most frequently appeared coded words. ")
FWE_QUESTION = ("Question: Do not provide any explanation. Please ignore the dots '....'. "
                "What are the three most frequently appeared words in the above coded text?")
FWE_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"


def drafts(name: str, n: int, options: Options) -> Iterator[Draft]:
    """n of them. ValueError: no list of words (cwe), or a length that cannot be had."""
    for i in range(n):
        yield NAMES[name](rng_of(name, i, options), options)


# -- vt ----------------------------------------------------------------------------------------------------------------

def _chain(rng: random.Random, options: Options) -> Draft:
    short = replace(options, settings={**options.settings, "length": N_EXAMPLE, "announce": 1})
    shown = _chain_behind(VT_OPENING, 3, rng, short)
    example = f"{shown.context}{shown.question} {shown.prefix} {' '.join(shown.gold)}\n\n\n\n"
    return _chain_behind(example + VT_OPENING, 5, rng, options)


def _chain_behind(opening: str, n_letters: int, rng: random.Random, options: Options) -> Draft:
    variables = different(N_VARIABLES, string.ascii_uppercase, n_letters, rng)
    value = str(rng.randrange(10000, 99999))
    chain = [f"VAR {variables[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in zip(variables, variables[1:]))]
    question = f"Question: Find all variables that are assigned the value {value} in the text above."
    prefix = ("Answer: According to the chain(s) of variable assignment in the text above, "
              f"{len(variables)} variables are assigned the value {value}, they are:")
    seed = rng.random()

    def draw(n: int) -> Draft:
        lines = [NOISE + "\n"]*n
        for at in sorted(random.Random(seed).sample(range(n), len(chain)), reverse=True):
            lines.insert(at, None)
        assignments = iter(chain)
        text = " ".join(line or next(assignments) for line in lines)
        return Draft(opening, text + "\n", question, prefix, variables, 30)
    return longest("vt", draw, len(chain) + 1, options)


# -- cwe ---------------------------------------------------------------------------------------------------------------

def _common(rng: random.Random, options: Options) -> Draft:
    short, words = options["length"] < SHORT, english("noun", "adjective", "verb")
    shown, answer = _list(rng.sample(words, 20 if short else 40), *((3, 1) if short else (10, 3)), rng.random())
    example = f"{CWE_OPENING}{shown}\n{CWE_QUESTION} {CWE_PREFIX}{_numbered(answer)}\n"
    drawn, seed = rng.sample(words, len(words)), rng.random()

    def draw(n: int) -> Draft:
        text, common = _list(drawn[:n], *((6, 1) if short else (30, 3)), seed)
        return Draft(example + CWE_OPENING, text + "\n", CWE_QUESTION, CWE_PREFIX, common, 120)
    return longest("cwe", draw, N_COMMON + 1, options, len(words))


def _list(words: list[str], n_common: int, n_other: int, seed: float) -> tuple[str, list[str]]:
    """(a list with the first ten words n_common times each and the others n_other times, these ten)"""
    entries = words[:N_COMMON]*n_common + words[N_COMMON:]*n_other
    random.Random(seed).shuffle(entries)
    return _numbered(entries), words[:N_COMMON]


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


# -- fwe ---------------------------------------------------------------------------------------------------------------

def _coded(rng: random.Random, options: Options) -> Draft:
    """Word k of n is there n/(k*k*zeta(2)) times; the most frequent one is dots, and is not asked for."""
    codes = different(max(5, options["length"]//50), string.ascii_lowercase, N_LETTERS, rng)
    words, seed = ["...", *codes[1:]], rng.random()

    def draw(n: int) -> Draft:
        entries = [word for k, word in enumerate(words, 1) for _ in range(int(n/(k*k*math.pi**2/6)))]
        random.Random(seed).shuffle(entries)
        return Draft(FWE_OPENING, " ".join(entries) + "\n", FWE_QUESTION, FWE_PREFIX, words[1:4], 50)
    return longest("fwe", draw, 100, options)  # from 100 on, the fourth word is more frequent than the fifth


NAMES = {"vt": _chain, "cwe": _common, "fwe": _coded}
