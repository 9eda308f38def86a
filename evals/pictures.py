"""Pictures of a report: a heat map where a task has something to lay out (niah: depth), else score against budget."""
from pathlib import Path
from typing import Sequence

import pandas as pd

from . import panels
from .panels import file_of, label, use_matplotlib
from .report import title
from .store import Row, grouped
from .tasks import task


def draw(out: Path, rows: Sequence[Row], lines: Sequence[Row]) -> list[Path]:
    """PNG files, one for each model, task and protocol."""
    use_matplotlib()
    paths, of_lines = [], grouped(lines, title)
    for name, of_name in grouped((row for row in rows if row["score"] is not None), title).items():
        path, tag = file_of(out, name), getattr(task(of_name[0]["task"]), "ACROSS", None)
        if tag:
            _heat_map(path, name, of_name, tag)
        elif not panels.picture(path, name, {"line": "configuration", "x": "n_kept"}, of_lines[name]):
            continue
        paths.append(path)
    return paths


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
