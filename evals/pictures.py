"""Pictures of a report: a heat map where a task has something to lay out (niah: depth), else score against budget."""
from collections import defaultdict
from pathlib import Path
from typing import Sequence

from pykvc import _core

from . import palette
from .report import title
from .store import Row
from .tasks import task


def use_matplotlib() -> None:
    """Before anything is drawn, into files alone. ValueError: it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures need matplotlib: `pip install '.[evals]'`, or --no-pictures") from None
    matplotlib.use("Agg")


def draw(out: Path, rows: Sequence[Row], lines: Sequence[Row]) -> list[Path]:
    """PNG files, one for each model, task and protocol."""
    use_matplotlib()
    paths = []
    for name in dict.fromkeys(tuple(title(line)) for line in lines):
        path = file_of(out, *name)
        of_name = [row for row in rows if tuple(title(row)) == name and row["score"] is not None]
        tag = getattr(task(name[0]), "ACROSS", None)
        if of_name and tag:
            _heat_map(path, ", ".join(name), of_name, tag)
        elif of_name:
            _curves(path, ", ".join(name), [line for line in lines if tuple(title(line)) == name and line["n"]])
        paths += [path]*bool(of_name)
    return paths


def file_of(out: Path, *parts: str) -> Path:
    """A PNG's name of what it shows."""
    return out/("-".join(filter(None, parts)).replace(", ", "-").replace("/", "_").replace(" ", "_") + ".png")


def label(row: Row) -> str:
    """A configuration in short: only the parameters that are not the default."""
    name, _, given = row["policy"].partition(":")
    usual = _core.parse_spec(name).partition(":")[2].split(",")
    changed = ",".join(parameter for parameter in given.split(",") if parameter not in usual)
    parts = [f"{name}:{changed}" if changed else name, row["budget"], row["decode_budget"] and f"decode {row['decode_budget']}",
             row["cells"] and f"{row['cells']} cells", "" if row["type_k"] == row["type_v"] == "f16" else f"{row['type_k']}/{row['type_v']}"]
    return " ".join(part for part in parts if part)


def _heat_map(path: Path, heading: str, rows: Sequence[Row], tag: str) -> None:
    import matplotlib.pyplot as plt
    scores: dict[tuple, list[float]] = defaultdict(list)
    for row in rows:
        scores[label(row), row["tags"][tag]].append(row["score"])
    names, at = list(dict.fromkeys(name for name, _ in scores)), sorted({x for _, x in scores})
    values = [[sum(s)/len(s) if (s := scores.get((name, x))) else float("nan") for x in at] for name in names]
    figure, axes = plt.subplots(figsize=(2.6 + 0.62*len(at), 1.4 + 0.36*len(names)), layout="constrained")
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set(title=heading, xlabel=f"{tag}, %" if tag == "depth" else tag, xticks=range(len(at)), yticks=range(len(names)))
    axes.set_xticklabels([f"{x:g}" if isinstance(x, float) else str(x) for x in at])
    axes.set_yticklabels(names)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if value == value:
                axes.text(x, y, f"{100*value:.0f}", ha="center", va="center", fontsize=8, color="white" if value < 0.6 else "black")
    figure.colorbar(image, label="share of right answers")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curves(path: Path, heading: str, lines: Sequence[Row]) -> None:
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    curves: dict[str, list[Row]] = defaultdict(list)
    for line in lines:
        if line["policy"] == "full":
            axes.axhspan(line["score_low"], line["score_high"], color=palette.FULL, alpha=0.15)
            axes.axhline(line["score"], color=palette.FULL, linestyle="--", label=label(line))
        else:
            curves[label({**line, "budget": ""})].append(line)
    seen: dict[str, int] = defaultdict(int)
    for name, points in curves.items():
        style, policy = palette.look(name), name.partition(" ")[0].partition(":")[0]
        if seen[policy]:  # the same policy with other parameters
            style["markerfacecolor"] = "white"
        seen[policy] += 1
        points = sorted(points, key=lambda line: line["n_kept"])
        y = [line["score"] for line in points]
        error = [[line["score"] - line["score_low"] for line in points], [line["score_high"] - line["score"] for line in points]]
        axes.errorbar([line["n_kept"] for line in points], y, yerr=error, capsize=3, label=name, **style)
    axes.set(title=heading, xlabel=f"tokens kept in each layer, of {max(line['n_before'] for line in lines):.0f}", ylabel="share of right answers",
             xlim=(0, 1.05*max(line["n_before"] for line in lines)), ylim=(-0.02, 1.02))
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
