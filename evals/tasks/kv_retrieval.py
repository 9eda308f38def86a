"""A value looked up in a long JSON object of random keys; a pair is a shot, which is either there or not.

Paper: Liu et al. 2023, arXiv 2307.03172; data: kv_retrieval_data of nelson-liu/lost-in-the-middle (MIT), not on Hugging
Face: kv_retrieval/kv75.jsonl of the data folder with ordered_kv_records, key, value. --pairs N takes the first N pairs.
Several keys of one object are asked, at depths that differ from object to object, so that one prefill serves them all.
"""
import json

from ..data import rows, take
from ..items import Item, Options

SETTINGS = {"pairs": 75, "questions": 3}
ACROSS = "depth"
LEAD = "Here is a JSON object. Look up the value of the key that is asked for.\n\n{"


def load(options: Options) -> list[Item]:
    items = [item for i, row in enumerate(rows(options.data_dir, "kv_retrieval/kv75", None,
                                               ("ordered_kv_records", "key", "value")))
             for item in _of_object(i, row, options)]
    return items[:options.n]


def _of_object(i: int, row: dict, options: Options) -> list[Item]:
    pairs, n_asked = take("--pairs", row["ordered_kv_records"], options["pairs"], least=2), options["questions"]
    if not 1 <= n_asked <= min(10, options["pairs"]):
        raise ValueError(f"--questions is 1 to {min(10, options['pairs'])} with --pairs {options['pairs']}, "
                         f"not {n_asked}")
    shots = [f"{json.dumps(key)}: {json.dumps(value)},\n " for key, value in pairs]
    shots[-1] = shots[-1].replace(",\n ", "}\n\n")
    items: list[Item] = []
    free = list(range(len(pairs)))
    for j in range(n_asked):
        tenth = (i + j*10//n_asked) % 10
        wanted = round((len(pairs) - 1)*tenth/9)
        place = min(free, key=lambda at: abs(at - wanted))  # noqa: B023  of few pairs two tenths may mean the same one
        free.remove(place)
        key, value = pairs[place]
        items.append(Item(id=f"{row.get('id', i)}/{options['pairs']}/{key}", lead=LEAD, shots=shots,
                          question=f'Key: "{key}"\nValue:', cue="Value:",
                          query=f'Key: "{key}"', gold=value, max_tokens=60, tags={"depth": round(100*tenth/9)}))
    return items


def unit(item: str, tags: dict) -> str:
    """The object, with any number of pairs: its questions share one eviction."""
    return item.rsplit("/", 2)[0]


def score(item: Item, answer: str) -> bool:
    return item.gold in answer.lower()
