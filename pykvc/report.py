"""Rows of `pykvc bench`, for people and for programs, each printed as soon as it was measured."""
import csv
import json
import sys
from typing import Any, Callable, Iterable, Iterator, Sequence

from .bench import DEFAULTS, run, work
from .figures import Row
from .race import Case
from .table import mebibytes

Column = tuple[str, int, Callable[[Row], str]]  # header, width, cell
LEGEND = """
/ full: decode's speed over that of the whole cache; / short: over that of a cache which never held more.
policy costs: what the prefill takes longer, with its 95 % interval; evict ms: one eviction."""


def markdown(todo: Sequence[Case], rows: Iterable[Row]) -> None:
    """A table of medians; ± is one standard deviation."""
    columns = _columns(todo)
    header = [name.rjust(width) for name, width, _ in columns]
    for row in rows:
        if header:
            _line(header)
            _line("-"*(len(name) - 1) + ":" for name in header)
            header = []
        _line(show(row).rjust(max(len(name), width)) for name, width, show in columns)
    if sys.stdout.isatty() and any(case.evicts for case in todo):  # a file has the table alone
        print(LEGEND)


def _line(cells: Iterable[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def comma_separated(todo: Sequence[Case], rows: Iterable[Row]) -> None:
    """Without the samples, as in llama-bench."""
    table = None
    for row in rows:
        flat = {name: value for name, value in row.items() if not isinstance(value, list)}
        if table is None:
            table = csv.DictWriter(sys.stdout, list(flat), quoting=csv.QUOTE_ALL, lineterminator="\n")
            table.writeheader()
        table.writerow(flat)
        sys.stdout.flush()


def json_list(todo: Sequence[Case], rows: Iterable[Row]) -> None:
    separator = "["
    try:
        for row in rows:
            print(separator + json.dumps(row, indent=2), end="", flush=True)
            separator = ",\n"
    finally:  # what was measured before a mistake or Ctrl-C can be read
        if separator != "[":
            print("]")


def json_lines(todo: Sequence[Case], rows: Iterable[Row]) -> None:
    for row in rows:
        print(json.dumps(row), flush=True)


FORMATS = {"md": markdown, "csv": comma_separated, "json": json_list, "jsonl": json_lines}


# -- columns of the table ---------------------------------------------------------------------------------------------

def _columns(todo: Sequence[Case]) -> list[Column]:
    """Parameters where any row has another value than the default, and what any row measures."""
    shown = [name for name in PARAMETERS if name == "n_threads" or any(getattr(case, name) != (DEFAULTS[name] or _none(name)) for case in todo)]
    asked = {"e": any(c.evicts for c in todo), "r": any(c.evicts and c.repeats for c in todo), "p": any(c.n_prompt for c in todo), "g": any(c.n_gen for c in todo)}
    return ([("model", 20, lambda row: row["model_type"]), ("size", 11, lambda row: _mib(row["model_size"])),
             ("params", 10, lambda row: f"{row['model_n_params']/1e6:.2f} M"), *(_parameter(name, todo) for name in shown), ("test", 14, _test)]
            + [(name, width, show) for name, width, needs, show in MEASURED if all(asked[need] for need in needs)])


def _none(name: str) -> Any:
    return "" if name.startswith("kv_") else 0


def _parameter(name: str, todo: Sequence[Case]) -> Column:
    width = max(len(str(getattr(case, name))) for case in todo)
    return name.removeprefix("n_").removeprefix("kv_"), width, lambda row: "" if row[name] is None else str(row[name])


def _test(row: Row) -> str:
    depth = f" @ d{row['n_depth']}" if row["n_depth"] else ""
    return "+".join(f"{kind}{n}" for kind, n in (("pp", row["n_prompt"]), ("tg", row["n_gen"])) if n) + depth


def _rate(row: Row, name: str) -> str:
    return "" if row[f"{name}_median_ts"] is None else f"{row[f'{name}_median_ts']:.2f} ± {row[f'{name}_stddev_ts']:.2f}"


def _cost(row: Row) -> str:
    cost, low, high = (row[f"prefill_cost_pct{end}"] for end in ("", "_low", "_high"))
    return "" if cost is None else f"{cost:+.2f} % ({low:+.2f} to {high:+.2f})"


def _mib(n_bytes: int | None) -> str:
    return "" if n_bytes is None else mebibytes(n_bytes)


def _figure(name: str, spec: str, unit: str = "") -> Callable[[Row], str]:
    return lambda row: "" if row[name] is None else f"{row[name]:{spec}}{unit}"


PARAMETERS = ("n_threads", "n_gpu_layers", "n_batch", "n_ubatch", "type_k", "type_v", "flash_attn", "n_parallel", "kv_policy", "kv_budget",
              "kv_decode_budget", "kv_cells")
MEASURED = (  # shown where any row evicts (e), repeats the context (r), has a prompt (p), generates (g)
    ("prefill t/s", 16, "p", lambda row: _rate(row, "prefill")),
    ("policy costs", 26, "pe", _cost),
    ("probe ms", 8, "r", _figure("probe_ms", ".0f")),
    ("of prefill ", 11, "r", _figure("probe_pct", ".0f", " %")),
    ("evict ms", 8, "e", _figure("evict_ms", ".1f")),
    ("of prefill", 10, "e", _figure("evict_pct", ".2f", " %")),
    ("decode t/s", 14, "g", lambda row: _rate(row, "decode")),
    ("/ full", 6, "ge", _figure("decode_ratio_full", ".2f")),
    ("/ short", 7, "ge", _figure("decode_ratio_short", ".3f")),
    ("kept", 6, "e", _figure("n_kept", ".0f")),
    ("KV used", 18, "", lambda row: f"{row['kv_bytes_used']/2**20:.1f} of {mebibytes(row['kv_bytes_full'])}"),
    ("KV allocated", 12, "", lambda row: _mib(row["kv_bytes_allocated"])),
    ("peak RSS", 10, "", lambda row: _mib(row["peak_rss"])))


# -- progress ---------------------------------------------------------------------------------------------------------

def watched(todo: Sequence[Case], repetitions: int, source: str, text: str | None) -> Iterator[Row]:
    """bench.run(), with a bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield from run(todo, repetitions, source, text)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    # no thread that draws while something is timed: ticks come between two timings
    with Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=Console(stderr=True),
                  auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False) as bars:
        task = bars.add_task(f"row 1 of {len(todo)}", total=sum(work(case, repetitions) for case in todo))

        def tick(n: int) -> None:
            bars.start()  # again, after a row was printed
            bars.advance(task, n)
            bars.refresh()
        for i, row in enumerate(run(todo, repetitions, source, text, tick), start=2):
            bars.stop()  # the row is printed where the bar was
            yield row
            bars.update(task, description=f"row {i} of {len(todo)}")
