"""What evals/tools/attention.py saved, as tables and pictures."""
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from pykvc.table import grid

from .. import palette, stats
from ..panels import file_of, use_matplotlib
from ..report import changed, unit_of
from ..store import Row, files, grouped, read

PARTS = ("system", "shots", "context", "rest", "question")


def rows(out: Path) -> list[Row]:
    return [row for path in files(out, "attention") for row in read(path).values()]


def _groups(found: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    return grouped(found, lambda row: (row["model"],
                                       ", ".join(filter(None, [row["task"], changed(row["task"], row["settings"])]))))


def lines(found: Sequence[Row]) -> list[Row]:
    """A line for each model and task: means over units (report.unit_of()), and the interval of each, None of one
    unit."""
    table = []
    for (model, name), of_task in _groups(found).items():
        line: Row = {"model": model, "task": name, "n": len(of_task),
                     "tokens": float(np.mean([row["n_tokens"] for row in of_task]))}
        figures = [_figures(row) for row in of_task]
        for what in dict.fromkeys(what for of_row in figures for what in of_row):
            units, values = zip(*((unit_of(row), of_row[what]) for row, of_row in zip(of_task, figures)
                                  if what in of_row))
            means = np.clip(stats.unit_means(values, units), 0, 1)  # sums of shares, which are rounded
            low, high = stats.mean_interval(means) if len(means) > 1 else (None, None)
            line |= {what: float(np.mean(means)), f"{what}_low": low, f"{what}_high": high}
        table.append(line)
    return table


def _figures(row: Row) -> dict[str, float]:
    found = {"sinks": row["sinks"]}
    for end in ("", "_bare"):
        found |= {f"{part}{end}": row[f"mass{end}"][part] for part in PARTS if part in row[f"mass{end}"]}
        found |= {f"{what}{end}": row[f"{what}{end}"] for what in ("entropy", "tokens_90")}
    return found | {f"kept {policy} {part}": kept[part] for policy, kept in row["kept"].items() for part in PARTS
                    if part in kept}


def markdown(table: Sequence[Row]) -> str:
    shown = [part for part in PARTS if any(part in line for line in table)]
    mass = [["model", "task", "n", "tokens", "first 4", *shown, "entropy", "tokens for 90 %"]]
    for line in table:
        mass.append([line["model"], line["task"], str(line["n"]), f"{line['tokens']:.0f}", _percent(line, "sinks"),
                     *(f"{_percent(line, part)} / {_percent(line, part + '_bare')}" if part in line else ""
                       for part in shown),
                     f"{line['entropy']:.2f} / {line['entropy_bare']:.2f}",
                     f"{_percent(line, 'tokens_90')} / {_percent(line, 'tokens_90_bare')}"])
    text = ["## Mass by part, in % of the attention of the question's last queries; after the slash without the first "
            "4 tokens", "", grid(mass, 2)]
    policies = list(dict.fromkeys(name.removeprefix("kept ").rsplit(" ", 1)[0] for line in table for name in line
                                  if name.startswith("kept ") and not name.endswith(("_low", "_high"))))
    if policies:
        kept = [[line["model"], line["task"], f"`{policy}`",
                 *(_percent(line, f"kept {policy} {part}") for part in shown)]
                for line in table for policy in policies if any(f"kept {policy} {part}" in line for part in shown)]
        text += ["", "## Kept share by part, in % of tokens, mean over layers and heads", "",
                 grid([["model", "task", "policy", *shown], *kept], 3)]
    return "\n".join(text) + "\n"


def _percent(line: Row, name: str) -> str:
    return f"{100*line[name]:.1f}" if name in line else ""


# -- pictures -------------------------------------------------------------------------------------------------------

def draw(out: Path, found: Sequence[Row]) -> list[Path]:
    """For each model: cumulative mass and entropy of all tasks, and of each task's first item a heat map and what
    survives."""
    use_matplotlib()
    paths = []
    for model in dict.fromkeys(row["model"] for row in found):
        of_model = [row for row in found if row["model"] == model]
        arrays = {id(row): dict(np.load(out/row["arrays"])) for row in of_model}
        paths.append(_curves(out/f"attention-{model}.png", of_model, arrays))
        for (_, name), of_task in _groups(of_model).items():
            paths.append(_heat_map(file_of(out, "heat", model, name), f"{name}, {model}", of_task[0],
                                   arrays[id(of_task[0])]))
            if of_task[0]["kept"]:
                paths.append(_survivors(file_of(out, "survivors", model, name), f"{name}, {model}", of_task[0],
                                        arrays[id(of_task[0])]))
    return paths


def _curves(path: Path, found: Sequence[Row], arrays: dict[int, dict[str, np.ndarray]]) -> Path:
    import matplotlib.pyplot as plt
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for i, ((_, name), of_task) in enumerate(_groups(found).items()):
        line = {key: value for key, value in palette.nth(i).items() if key != "marker"}
        for end, style in (("", line), ("_bare", {**line, "alpha": 0.35})):
            mean = np.mean([arrays[id(row)][f"cumulative{end}"] for row in of_task], axis=0)
            left.plot(np.linspace(0, 100, len(mean)), 100*mean, label=name if not end else None, **style)
            entropies = np.mean([arrays[id(row)][f"entropy{end}"] for row in of_task], axis=0)
            middle.plot(entropies, **style)
    left.set(xlabel="% of tokens, most attended first", ylabel="% of the attention",
             title="how much attention the most attended tokens get", xlim=(0, 50))
    middle.set(xlabel="layer", ylabel="entropy, share of the greatest possible",
               title="evenness; pale: without the first 4 tokens", ylim=(0, 1))
    names, bottom = list(_groups(found)), np.zeros(len(_groups(found)))
    for i, part in enumerate(PARTS):
        values = np.array([np.mean([row["mass"].get(part, 0) for row in of_task])
                           for of_task in _groups(found).values()])
        if values.any():
            right.barh([name for _, name in names], 100*values, left=bottom, color=palette.COLOURS[i], label=part)
            bottom += 100*values
    sinks = [100*np.mean([row["sinks"] for row in of_task]) for of_task in _groups(found).values()]
    right.plot(sinks, [name for _, name in names], "k|", markersize=14, label="first 4 tokens")
    right.invert_yaxis()
    right.set(xlabel="% of the attention", title="attention by part")
    left.legend(fontsize=8)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(found[0]["model"])
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _marks(at: Any, row: Row, both: bool = False) -> None:
    """Lines where a part begins, and its name above."""
    for name, begin, end in row["parts"]:
        at.axvline(begin, color=palette.COLOURS[3], linewidth=0.8)
        if both:
            at.axhline(begin, color=palette.COLOURS[3], linewidth=0.8)
        if end - begin > 0.03*row["n_tokens"]:
            at.text((begin + end)/2, 1.01, name, transform=at.get_xaxis_transform(), ha="center", va="bottom",
                    fontsize=8, color=palette.COLOURS[3])


def _heat_map(path: Path, heading: str, row: Row, arrays: dict[str, np.ndarray]) -> Path:
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm
    n, heat = row["n_tokens"], arrays["heat"].astype(np.float32)
    # so that a lone key is seen
    wide = heat[:, :n//max(1, n//400)*max(1, n//400)].reshape(len(heat), -1, max(1, n//400)).max(axis=2)
    figure, axes = plt.subplots(figsize=(7.5, 6.2), layout="constrained")
    image = axes.imshow(np.where(wide > 0, wide, np.nan), norm=LogNorm(1e-5, 0.3), cmap="magma", aspect="auto",
                        interpolation="nearest", extent=(0, n, len(heat)*row["step"], 0))
    axes.set(ylim=(n, 0), xlabel="token that is looked at", ylabel=f"token that looks ({row['step']} in a row)")
    axes.set_title(heading + ": attention, mean over layers and heads", pad=18, fontsize=10)
    _marks(axes, row, both=True)
    figure.colorbar(image)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _survivors(path: Path, heading: str, row: Row, arrays: dict[str, np.ndarray]) -> Path:
    import matplotlib.pyplot as plt
    shares = {name.removeprefix("kept "): a.astype(np.float32) for name, a in arrays.items()
              if name.startswith("kept ")}
    figure, axes = plt.subplots(len(shares), 1, figsize=(9, 0.8 + 1.05*len(shares)), layout="constrained", sharex=True,
                                squeeze=False)
    for i, (at, (name, share)) in enumerate(zip(axes[:, 0], shares.items())):
        at.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest",
                  extent=(0, row["n_tokens"], len(share), 0))
        at.set_ylabel(name.replace(" ", "\n"), rotation=0, ha="right", va="center", fontsize=8)
        at.set_yticks([])
        for _, begin, _ in row["parts"]:
            at.axvline(begin, color=palette.COLOURS[3], linewidth=0.8)
        if i == 0:
            _marks(at, row)
    axes[-1, 0].set_xlabel("token of the prompt (each strip: layers, the first one above)")
    figure.suptitle(heading + ": share of KV heads that keep a token", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
