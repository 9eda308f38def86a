"""The tables of speed_kvpress.py as a picture.

    python evals/tools/speed_plot.py docs/benchmarks.md docs/benchmarks.png
"""
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot

# palette.py's; this file runs without evals
COLOURS = ("#777777", "#56B4E9", "#0072B2", "#009E73", "#E69F00", "#D55E00")

HEAD = "| tokens | | prefill t/s |"
COLUMNS = {"tokens read per second": 2, "tokens written per second": 5}


def tables(text: str) -> list[tuple[str, dict[str, dict[int, list[str]]]]]:
    """[(the line before the table, row name -> tokens -> cells)]"""
    found, title, rows = [], "", None
    for line in text.splitlines():
        if line.startswith(HEAD):
            rows = {}
            found.append((title, rows))
        elif rows is not None and line.startswith("| ---"):
            continue
        elif rows is not None and line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows.setdefault(cells[1], {})[int(cells[0])] = cells
        elif line.strip():
            title, rows = line.split("(")[0].strip(" :"), None
    return found


def main(source: Path, target: Path) -> None:
    found = tables(source.read_text(encoding="utf-8"))
    if not found:
        sys.exit(f"{source} has no table of speed_kvpress.py")
    figure, axes = pyplot.subplots(len(found), len(COLUMNS), figsize=(10, 3.2*len(found)), squeeze=False,
                                   layout="constrained")
    for (title, rows), line in zip(found, axes):
        for (name, column), one in zip(COLUMNS.items(), line):
            for i, (row, by_tokens) in enumerate(rows.items()):
                at = [j + (i - (len(rows) - 1)/2)*0.8/len(rows) for j in range(len(by_tokens))]
                one.bar(at, [float(cells[column]) for cells in by_tokens.values()], 0.8/len(rows), label=row,
                        color=COLOURS[i % len(COLOURS)])
            one.set_xticks(range(len(by_tokens)), [f"{n:,}" for n in by_tokens])
            one.set(title=title, xlabel="tokens in the prompt", ylabel=name)
            one.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
