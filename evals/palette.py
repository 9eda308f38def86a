"""How a policy looks in every picture: six colours in all, which people who confuse red and green can tell apart.

A colour is a way to choose tokens; within it line and marker say which policy.
"""
from typing import Any

WAYS = {
    "#0072B2": ("snapkv", "pyramidkv", "criticalkv", "adakv", "defensive", "dropkv"),  # attention of the last queries
    "#E69F00": ("h2o", "tova", "pyramidinfer"),                                        # attention as it goes along
    "#009E73": ("shotkv", "chunkkv"),                                                  # of whole units
    "#D55E00": ("keydiff", "knorm", "vase", "rkv"),                                    # keys and values
    "#CC79A7": ("kvzip", "finch", "expected_attention"),                               # questions asked or expected
    "#56B4E9": ("streaming_llm", "random", "random_head", "random_shot"),              # without looking
}
COLOURS = tuple(WAYS)
# the whole cache; a policy that is not built in; what does not matter here
FULL, OTHER, QUIET = "#777777", "#000000", "#C8C8C8"
MARKERS = "osD^vP"
LINES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))

Look = dict[str, Any]  # color, linestyle, marker


def look(policy: str) -> Look:
    """Of a policy, with or without its parameters."""
    name = policy.partition(":")[0].partition(" ")[0]
    if name == "full":
        return {"color": FULL, "linestyle": "--", "marker": "o"}
    for colour, names in WAYS.items():
        if name in names:
            return {"color": colour, "linestyle": LINES[names.index(name)], "marker": MARKERS[names.index(name)]}
    return {"color": OTHER, "linestyle": "-", "marker": "X"}


def nth(i: int) -> Look:
    """Of what is no policy: a task, a model, a part. After six the colours come again, with another line."""
    turn = i//len(COLOURS) % len(LINES)
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[turn], "marker": MARKERS[turn]}
