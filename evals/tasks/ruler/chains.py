"""vt of RULER, variable tracking: a number is assigned to a variable, that to another, five in all, in noise."""
import random
import string
from dataclasses import replace
from typing import Iterator

from ...items import Options
from .draft import Draft, different, longest, rng_of
from .needles import NOISE

NAMES = ("vt",)
N_VARIABLES = 5       # a chain of four hops
N_EXAMPLE = 500       # tokens of the worked example that stands in front
MAX_TOKENS = 30
OPENING = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


def drafts(name: str, n: int, options: Options) -> Iterator[Draft]:
    """n of them. ValueError: a length that cannot be had."""
    for i in range(n):
        rng = rng_of(name, i, options)
        short = replace(options, settings={**options.settings, "length": N_EXAMPLE, "announce": 1})
        shown = _draft(name, 3, OPENING, rng, short)
        example = f"{shown.context}{shown.question} {shown.prefix} {' '.join(shown.gold)}\n\n\n\n"
        yield _draft(name, 5, example + OPENING, rng, options)


def _draft(name: str, n_letters: int, opening: str, rng: random.Random, options: Options) -> Draft:
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
        return Draft(opening, text + "\n", question, prefix, variables, MAX_TOKENS)
    return longest(name, draw, len(chain) + 1, options)
