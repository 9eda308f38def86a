"""Prose made here, the same everywhere: long enough to evict from, varied enough that heads disagree."""
import random

NAMES = ["Ada", "Ben", "Clara", "Deniz", "Emil", "Fatou", "Goran", "Hana", "Ivo", "Jun"]
THINGS = ["lamp", "ladder", "kettle", "violin", "compass", "ledger", "anchor", "basket", "mirror", "saddle"]
PLACES = ["the harbour", "a quiet valley", "the old mill", "the railway station", "an orchard", "the museum", "the market"]
VERBS = ["carried", "sold", "repaired", "lost", "painted", "borrowed", "measured", "found"]


def prose(n_sentences: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    out = []
    for i in range(n_sentences):
        name, other = rng.sample(NAMES, 2)
        out.append(f"{name} {rng.choice(VERBS)} the {rng.choice(THINGS)} near {rng.choice(PLACES)}"
                   + rng.choice([f", and {other} paid {rng.randint(2, 99)} coins for it.", ".", f" while {other} slept.",
                                 f"; nobody asked {other} why.", f" before {other} came back in {rng.randint(1700, 1999)}."])
                   + ("\n\n" if i % 7 == 6 else " "))
    return "".join(out)
