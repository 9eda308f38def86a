"""Pictures of a report: a heat map where a task has something to lay out (niah: depth), else score against budget. Of
a study: lines over any column of the table, side by side, with intervals; or points and the front of the best.

    x, y      columns of the table: ratio, n_kept, budget, shots, bytes_used; score, relative, difference, kl
    panel     columns whose values have a panel each; "method" is the policy without its parameters
    line      columns whose values have a line each; default: the policy
    file      columns whose values have a picture each, besides the model; default: the protocol
    marker    a column whose values have a marker each (points instead of lines)
    front     points that none beats in x (less) and y (more; kl: less) are joined
    only      {column: value}: these rows
"""
import textwrap
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import pandas as pd

from pykvc import _core

from . import palette
from .report import CASE, COSTS, GROUP, as_asked, listed, title, types
from .store import Row, grouped
from .tasks import task

MARKERS = "os^Dv*PX"
NOT_OF_FULL = {*CASE, "method"}
NAMES = {"ratio": "share of the evictable tokens kept", "n_kept": "tokens kept in each layer",
         "shots": "worked examples in the prompt", "bytes_used": "cache in use, MiB", "score": "share of right answers",
         "relative": "score, change against the whole cache",
         "difference": "score, difference to the whole cache", "kl": "KL divergence from the whole cache, nats",
         "budget": "budget of the prompt"}
SETTINGS = {"tokens": "{} tokens", "of": "{}", "questions": "{} questions in one answer", "shots": "{} examples",
            "reference": "compared with {}", "exemplars": "examples {}"}


def use_matplotlib() -> None:
    """Before anything is drawn, into files alone. ValueError: it is not installed."""
    try:
        import matplotlib
        import seaborn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"pictures need {error.name}: `pip install '.[evals]'`, or --no-pictures") from None
    matplotlib.use("Agg")


def file_of(out: Path, *parts: str) -> Path:
    """A PNG's name of what it shows."""
    return out/("-".join(filter(None, parts)).replace(", ", "-").replace("/", "_").replace(" ", "_") + ".png")


def label(row: Row) -> str:
    """A configuration in short: only the parameters that are not the default."""
    name, _, given = row["policy"].partition(":")
    usual = _core.parse_spec(name).partition(":")[2].split(",")
    changed = ",".join(parameter for parameter in given.split(",") if parameter not in usual)
    parts = [f"{name}:{changed}" if changed else name, row["budget"],
             row["decode_budget"] and f"decode {row['decode_budget']}", row["cells"] and f"{row['cells']} cells",
             types(row)]
    return " ".join(filter(None, parts))


def check(where: str, block: Row) -> None:
    """ValueError if what a [[picture]] names is no column."""
    kinds, row, axes = {"x": str, "y": str, "marker": str, "only": dict}, (*GROUP, *CASE, "shots"), (*NAMES, *COSTS)
    valid = {"x": axes, "y": axes, "marker": row, "only": row, "file": row, "panel": (*row, "method"),
             "line": (*row, "method")}
    for key in filter(block.__contains__, valid):
        if not isinstance(block[key], kinds.get(key, (str, list))) or {*_names(block, key, [])} - {*valid[key]}:
            raise ValueError(f"{key} in {where} is of {', '.join(valid[key])}, not {block[key]!r}")


def draw(out: Path, blocks: Sequence[Row], lines: Sequence[Row]) -> list[Path]:
    """PNG files of the [[picture]] blocks."""
    use_matplotlib()
    paths = []
    for i, block in enumerate(blocks, 1):
        wanted = [line for line in lines if line.get(block.get("y", "score")) is not None
                  and all(line[name] == value for name, value in block.get("only", {}).items())]
        together = "model" in _names(block, "line", ["policy"])
        files = grouped(wanted, [*["model"]*(not together), *_names(block, "file", ["protocol"])])
        for parts, of_file in files.items():
            path = file_of(out, block.get("name", f"picture{i}"), *map(str, parts))
            if picture(path, listed(*map(str, parts)), block, of_file):
                paths.append(path)
    return paths


def draw_report(out: Path, rows: Sequence[Row], lines: Sequence[Row]) -> list[Path]:
    """PNG files, one for each model, task and protocol."""
    use_matplotlib()
    paths, of_lines = [], grouped(lines, title)
    for name, of_name in grouped((row for row in rows if row["score"] is not None), title).items():
        path, tag = file_of(out, name), getattr(task(of_name[0]["task"]), "ACROSS", None)
        if tag:
            _heat_map(path, name, of_name, tag)
        elif not picture(path, name, {"line": "configuration", "x": "n_kept"}, of_lines[name]):
            continue
        paths.append(path)
    return paths


def _names(block: Row, name: str, usual: Sequence[str]) -> Sequence[str]:
    value = block.get(name, usual)
    return [value] if isinstance(value, str) else value


def picture(path: Path, heading: str, block: Row, lines: Sequence[Row]) -> bool:
    """One file, a panel for each value of block["panel"]. False: there is nothing to show, and no file."""
    import matplotlib.pyplot as plt
    x, y, of = block.get("x", "ratio"), block.get("y", "score"), _names(block, "panel", [])
    shared, own = [name for name in of if name not in NOT_OF_FULL], [name for name in of if name in NOT_OF_FULL]
    lines = [as_asked(line) for line in lines] if x == "budget" else lines
    everywhere = [line for line in lines if own and line["policy"] == "full"]  # in each panel of its other values
    panels = grouped((line for line in lines if line not in everywhere),
                     lambda line: (_title(line, shared), _title(line, own)))
    # no panels of full alone beside them
    panels = {name: of_panel for name, of_panel in panels.items()
              if any(_number(line, x) is not None for line in of_panel)} or panels
    if not panels:
        return False
    n_across = min(len(panels), 3)
    n_down = -(-len(panels)//n_across)
    figure, axes = plt.subplots(n_down, n_across, figsize=(1.6 + 4.4*n_across, 1 + 3.4*n_down), layout="constrained",
                                squeeze=False, sharey=True, sharex=x in ("ratio", "budget", "shots"))
    looks: dict[str, palette.Look] = {}
    for at, (name, of_panel) in zip(axes.flat, panels.items()):
        if "decode_budget" in of:  # the title says it
            of_panel = [{**line, "decode_budget": ""} for line in of_panel]
        _panel(at, block, x, y, of_panel + [line for line in everywhere if _title(line, shared) == name[0]], looks)
        at.set(xlabel=NAMES.get(x, x))
        at.set_title(textwrap.fill(listed(*name), 48), fontsize=10)
        at.tick_params(labelbottom=True)
        at.grid(alpha=0.25)
    for at in axes[:, 0]:
        at.set_ylabel(NAMES.get(y, y))
    for at in axes.flat[len(panels):]:
        at.axis("off")
    shown = {text: handle for at in axes.flat for handle, text in zip(*at.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(heading, x=0.01, ha="left", fontsize=11)  # the legend stands to the right
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _heat_map(path: Path, heading: str, rows: Sequence[Row], tag: str) -> None:
    import matplotlib.pyplot as plt
    import seaborn
    scores = pd.DataFrame({"method": [label(row) for row in rows], tag: [row["tags"][tag] for row in rows],
                           "score": [100*row["score"] for row in rows]})
    table = scores.pivot_table(index="method", columns=tag, values="score", sort=False).sort_index(axis=1)
    figure, axes = plt.subplots(figsize=(2.6 + 0.62*table.shape[1], 1.4 + 0.36*len(table)), layout="constrained")
    seaborn.heatmap(table, vmin=0, vmax=100, cmap="viridis", annot=True, fmt=".0f", annot_kws={"fontsize": 8}, ax=axes,
                    cbar_kws={"label": "right answers, %"})
    axes.set(title=heading, xlabel=f"{tag}, %" if tag == "depth" else tag, ylabel="")
    axes.set_xticklabels([f"{x:g}" if isinstance(x, float) else str(x) for x in table.columns])
    axes.tick_params(axis="y", rotation=0)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _title(line: Row, names: list[str]) -> str:
    texts = {**{name: str(line.get(name, "")) for name in names}, "method": line["policy"].partition(":")[0],
             "policy": label({**line, "budget": "", "type_k": "f16", "type_v": "f16"}),
             "configuration": label({**line, "budget": ""}), "budget": _amount(line["budget"]),
             "decode_budget": _of_answer(line["decode_budget"]), "settings": _settings(str(line["settings"]))}
    return listed(*(texts[name] for name in names))


def _amount(budget: str) -> str:
    kind, amount = _core.parse_budget(budget)
    return "" if kind == "none" else f"{100*amount:g} % kept" if kind == "ratio" else f"{amount:.0f} tokens kept"


def _of_answer(budget: str) -> str:
    if not budget:
        return "the answer stays"
    return "the answer evicted alike" if budget == "same" else f"of the answer {_amount(budget)}"


def _settings(text: str) -> str:
    """"tokens 600, of longgenbench": 600 tokens, longgenbench."""
    found = [part.partition(" ") for part in filter(None, text.split(", "))]
    return ", ".join(SETTINGS.get(name, f"{name} {{}}").format(value) if name != "decode" else _of_answer(value)
                     for name, _, value in found)


def _panel(at: Any, block: Row, x: str, y: str, lines: Sequence[Row], looks: dict[str, palette.Look]) -> None:
    from matplotlib.ticker import LogLocator
    by = _names(block, "line", ["policy"])
    curves: dict[str, list[Row]] = {}
    for line in lines:
        point = {**line, "x": _number(line, x), "y": line[y], "low": line.get(f"{y}_low", line[y]),
                 "high": line.get(f"{y}_high", line[y])}  # a point may have no interval
        if line["policy"] == "full" and y == "kl" and not block.get("front"):
            continue  # it is what the others diverge from
        if point["x"] is not None:
            name = _title(line, by) or "all"
            looks.setdefault(name, palette.look(line["policy"]) if by[0] in ("policy", "method", "configuration")
                             else palette.nth(len(looks)))
            curves.setdefault(name, []).append(point)
        elif line["policy"] == "full" and not block.get("front"):
            at.axhspan(point["low"], point["high"], color=palette.FULL, alpha=0.12)
            at.axhline(line[y], color=palette.FULL, linestyle="--", label="full")
    if block.get("front"):
        _front(at, block.get("marker"), y, curves, looks)
    else:
        _curves(at, curves, looks, apart=x != "bytes_used")
    if x == "bytes_used":
        at.set_xscale("log")
        at.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        at.xaxis.set_major_formatter("{x:g}")
        at.xaxis.set_minor_formatter("")
    elif x == "ratio" or x == "budget" and all(point["x"] <= 1 for points in curves.values() for point in points):
        at.xaxis.set_major_formatter(lambda share, _: f"{100*share:g} %")
    if y == "kl":
        at.set_yscale("symlog", linthresh=1e-3)
    elif y == "score":
        at.set_ylim(-0.02, 1.02)
        at.yaxis.set_major_formatter(lambda share, _: f"{100*share:g} %")


def _curves(at: Any, curves: dict[str, list[Row]], looks: dict[str, palette.Look], apart: bool) -> None:
    """apart: intervals at one x stand side by side."""
    across = [point["x"] for points in curves.values() for point in points]
    for i, (name, points) in enumerate(curves.items()):
        beside = apart*(i - (len(curves) - 1)/2)*0.008*(max(across) - min(across))
        xs, ys, lows, highs = np.array(sorted((p["x"], p["y"], p["low"], p["high"]) for p in points)).T
        arms = np.maximum(0, [ys - lows, highs - ys])
        at.errorbar(xs + beside, ys, yerr=arms if arms.any() else None, label=name, markersize=5, capsize=2,
                    elinewidth=0.8, alpha=0.85, **looks[name])


def _front(at: Any, marker: str | None, y: str, curves: dict[str, list[Row]], looks: dict[str, palette.Look]) -> None:
    """All points, grey; those that none beats joined, in their colours and with their names."""
    points = [(p["x"], p["y"], name, str(p[marker]) if marker else "") for name, of in curves.items() for p in of]
    best = front([point[:2] for point in points], less=y == "kl")
    at.step(*zip(*best), where="post", color="black", linewidth=1, label="none is better with less", zorder=1)
    marks = {kind: MARKERS[i % len(MARKERS)] for i, kind in enumerate(sorted({point[3] for point in points}))}
    for at_x, at_y, name, kind in points:
        on = (at_x, at_y) in best or name == "full"
        at.plot(at_x, at_y, marks[kind], color=looks[name]["color"] if on else palette.QUIET, markersize=6 if on else 4,
                zorder=3 if on else 2)
    names = [next(name for *where, name, _ in points if tuple(where) == spot) for spot in best]
    for i, (spot, name) in enumerate(zip(best, names)):
        if name not in names[max(0, i - 1):i]:  # of neighbours with the same name the first
            at.annotate(name, spot, xytext=(4, -9 if i % 2 else 5), textcoords="offset points", fontsize=7,
                        color=looks[name]["color"])
    for kind, mark in marks.items():
        if kind:
            at.plot([], [], mark, color=palette.FULL, label=f"{kind} cache")


def _number(line: Row, name: str) -> float | None:
    """Where it stands from left to right. None: a line across."""
    if name == "budget":  # as it was asked for
        return _core.parse_budget(line["budget"])[1] if line["budget"] else None
    value = line.get(name)
    if value is None or (line["policy"] == "full" and name in ("ratio", "n_kept")):
        return None
    return value/2**20 if name == "bytes_used" else float(value)


def front(points: Sequence[tuple[float, float]], less: bool = False) -> list[tuple[float, float]]:
    """Those that no other beats in both, from the smallest x on. less: the smaller y is better, too."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], p[1] if less else -p[1])):
        if not found or (y < found[-1][1] if less else y > found[-1][1]):
            found.append((x, y))
    return found
