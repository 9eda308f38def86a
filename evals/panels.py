"""Pictures of a study: lines over any column of the table, side by side, with intervals; or points and the front of the best.

    x, y      columns of the table: ratio, n_kept, budget, shots, bytes_used; score, relative, difference, kl
    panel     columns whose values have a panel each; "method" is the policy without its parameters
    line      columns whose values have a line each; default: the policy
    file      columns whose values have a picture each, besides the model; default: the protocol
    marker    a column whose values have a marker each (points instead of lines)
    front     points that none beats in x (less) and y (more; kl: less) are joined
    only      {column: value}: these rows
"""
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any, Sequence

from pykvc import _core

from .pictures import file_of, label, use_matplotlib
from .report import CASE, as_asked
from .store import Row

MARKERS = "os^Dv*PX"
NOT_OF_FULL = {*CASE, "method"}
NAMES = {"ratio": "retained ratio", "n_kept": "tokens kept a layer", "shots": "shots", "bytes_used": "cache in use, MiB", "score": "score",
         "relative": "relative change", "difference": "difference to full", "kl": "KL divergence, nats", "budget": "budget"}


def draw(out: Path, blocks: Sequence[Row], lines: Sequence[Row]) -> list[Path]:
    """PNG files of the [[picture]] blocks."""
    use_matplotlib()
    paths = []
    for i, block in enumerate(blocks):
        x, y = block.get("x", "ratio"), block.get("y", "score")
        wanted = [line for line in lines if line.get(y, None) is not None or (y in ("relative", "difference") and line["policy"] == "full")]
        wanted = [line for line in wanted if line["n"] and all(line[name] == value for name, value in block.get("only", {}).items())]
        files: dict[tuple, list[Row]] = defaultdict(list)
        together = "model" in _names(block, "line", ["policy"])
        for line in wanted:
            files[("" if together else line["model"], *(str(line[name]) for name in _names(block, "file", ["protocol"])))].append(line)
        for parts, of_file in files.items():
            path = file_of(out, block.get("name", f"picture{i + 1}"), *parts)
            if _picture(path, ", ".join(filter(None, parts)), block, x, y, of_file):
                paths.append(path)
    return paths


def _names(block: Row, name: str, usual: list[str]) -> list[str]:
    value = block.get(name, usual)
    return [value] if isinstance(value, str) else value


def _picture(path: Path, heading: str, block: Row, x: str, y: str, lines: Sequence[Row]) -> bool:
    import matplotlib.pyplot as plt
    of = _names(block, "panel", [])
    panels: dict[tuple[str, str], list[Row]] = defaultdict(list)  # by what full has, too, and by what only the others have
    full: dict[str, list[Row]] = defaultdict(list)
    for line in lines if x != "budget" else map(as_asked, lines):
        shared = _title(line, [name for name in of if name not in NOT_OF_FULL])
        if line["policy"] == "full" and NOT_OF_FULL & set(of):
            full[shared].append(line)  # stands in every such panel
        else:
            own = _title(line, [name for name in of if name in NOT_OF_FULL])
            panels[shared, own].append({**line, "decode_budget": ""} if "decode_budget" in of else line)
    if any(_number(line, x) is not None for of_panel in panels.values() for line in of_panel):  # no panels of full alone beside them
        panels = {name: of_panel for name, of_panel in panels.items() if any(_number(line, x) is not None for line in of_panel)}
    if not panels:
        return False
    n_across = min(len(panels), 3)
    n_down = -(-len(panels)//n_across)
    figure, axes = plt.subplots(n_down, n_across, figsize=(1.6 + 4.4*n_across, 1 + 3.4*n_down), layout="constrained", squeeze=False, sharey=True,
                                sharex=x in ("ratio", "budget", "shots"))
    colours: dict[str, Any] = {}
    for at, (name, of_panel) in zip(axes.flat, panels.items()):
        _panel(at, block, x, y, of_panel + full[name[0]], colours)
        at.set(xlabel=NAMES.get(x, x))
        at.set_title(textwrap.fill(", ".join(filter(None, name)), 48), fontsize=10)
        at.tick_params(labelbottom=True)
        at.grid(alpha=0.25)
    for at in axes[:, 0]:
        at.set_ylabel(NAMES.get(y, y))
    for at in list(axes.flat)[len(panels):]:
        at.axis("off")
    shown = {text: handle for at in axes.flat for handle, text in zip(*at.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(heading, x=0.01, ha="left", fontsize=11)  # the legend stands to the right
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _title(line: Row, names: list[str]) -> str:
    line = {**line, "method": line["policy"].partition(":")[0]}
    texts = {**{name: str(line[name]) for name in names}, "policy": label({**line, "budget": "", "type_k": "f16", "type_v": "f16"}),
             "decode_budget": f"decode {line['decode_budget'] or 'none'}"}
    return ", ".join(texts[name] for name in names if texts[name])


def _panel(at: Any, block: Row, x: str, y: str, lines: Sequence[Row], colours: dict[str, Any]) -> None:
    import matplotlib
    tab20 = matplotlib.colormaps["tab20"].colors
    palette = [tab20[i] for shade in (0, 1) for i in range(shade, 20, 2) if i // 2 != 7]  # without the grey of full
    by = _names(block, "line", ["policy"])
    curves: dict[str, list[Row]] = defaultdict(list)
    for line in lines:
        at_x = _number(line, x)
        if line["policy"] == "full" and y == "kl" and not block.get("front"):
            continue  # it is what the others diverge from
        if at_x is None and line["policy"] == "full" and y not in ("relative", "difference") and not block.get("front"):
            at.axhspan(line.get(f"{y}_low", line[y]), line.get(f"{y}_high", line[y]), color="grey", alpha=0.12)
            at.axhline(line[y], color="grey", linestyle="--", label="full")
        elif at_x is not None and line.get(y) is not None:
            curves[_title(line, by) or "all"].append(line)
    markers: dict[str, str] = {}
    across = [_number(p, x) for points in curves.values() for p in points]
    for i, (name, points) in enumerate(curves.items()):
        beside = (i - (len(curves) - 1)/2)*0.008*(max(across) - min(across))  # intervals at one x stand side by side
        colour = colours.setdefault(name, "grey" if name == "full" else palette[(len(colours) - ("full" in colours)) % len(palette)])
        points = sorted(points, key=lambda line: _number(line, x))
        style = dict(color=colour, label=name, linestyle="--" if name == "full" else "-", markersize=5)
        if "marker" not in block:
            at.errorbar([_number(p, x) + beside for p in points], [p[y] for p in points], yerr=_errors(points, y), marker="o", capsize=2, elinewidth=0.8, alpha=0.85,
                        **style)
            continue
        for value in dict.fromkeys(str(p[block["marker"]]) for p in points):
            mark = markers.setdefault(value, MARKERS[len(markers) % len(MARKERS)])
            of_value = [p for p in points if str(p[block["marker"]]) == value]
            at.errorbar([_number(p, x) for p in of_value], [p[y] for p in of_value], yerr=_errors(of_value, y) if y != "kl" else None, marker=mark, capsize=0, elinewidth=0.5,
                        alpha=0.8, **{**style, "linestyle": "none", "label": name if value == str(points[0][block["marker"]]) else None})
    for value, mark in markers.items():
        at.plot([], [], color="black", linestyle="none", marker=mark, label=value)
    if block.get("front"):
        best = front([(_number(p, x), p[y]) for p in lines if _number(p, x) is not None], less=y == "kl")
        at.step(*zip(*best), where="post", color="black", linewidth=1, label="front")
    if x == "bytes_used":
        at.set_xscale("log")
        at.xaxis.set_major_formatter("{x:g}")
        at.xaxis.set_minor_formatter("{x:g}")
        at.tick_params(axis="x", which="minor", labelsize=7)
    if y == "kl":
        at.set_yscale("symlog", linthresh=1e-3)
    elif y == "score":
        at.set_ylim(-0.02, 1.02)


def _number(line: Row, name: str) -> float | None:
    if name == "budget":  # as it was asked for
        if not line["budget"]:
            return None
        kind, amount = _core.parse_budget(line["budget"])
        return amount
    if line["policy"] == "full" and name in ("ratio", "n_kept"):
        return None  # a line across
    value = line.get(name)
    return None if value is None else value/2**20 if name == "bytes_used" else float(value)


def _errors(points: Sequence[Row], y: str) -> list[list[float]] | None:
    if all(f"{y}_low" not in p for p in points):
        return None
    ends = [(p.get(f"{y}_low", p[y]), p.get(f"{y}_high", p[y])) for p in points]  # a point may have no interval
    return [[max(0, p[y] - low) for p, (low, _) in zip(points, ends)],
            [max(0, high - p[y]) for p, (_, high) in zip(points, ends)]]


def front(points: Sequence[tuple[float, float]], less: bool = False) -> list[tuple[float, float]]:
    """Those that no other beats in both, from the smallest x on. less: the smaller y is better, too."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], p[1] if less else -p[1])):
        if not found or (y < found[-1][1] if less else y > found[-1][1]):
            found.append((x, y))
    return found
