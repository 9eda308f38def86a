"""The [[bench]] blocks of a study: rows of `pykvc bench`, saved one by one, as a table and a picture."""
import contextlib
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Sequence

from pykvc import bench, report
from pykvc.race import Case

from .. import palette
from ..panels import use_matplotlib
from ..settings import Only, listed, sweep
from ..store import Row

FILE = "latency.jsonl"


def cases_of(blocks: Sequence[Row], model: Path | str | None, only: Only, n_threads: int | None, n_gpu_layers: int,
             repetitions: int | None) -> list[tuple[Case, int]]:
    """(case, repetitions) of every block. ValueError names what is valid."""
    found: dict[Case, int] = {}
    for block in blocks:
        for one in sweep(block, ["cache_type"]):
            if "cache_type" in one:
                one["type_k"] = one["type_v"] = one.pop("cache_type")
            n = repetitions or one.pop("repetitions", 5)
            one.pop("repetitions", None)
            lists = {name: [str(v) if name in ("kv_budget", "kv_decode_budget", "kv_cells") else v
                            for v in listed(value)] for name, value in one.items()}
            for case in bench.cases(model=[model], n_threads=[n_threads], n_gpu_layers=[n_gpu_layers], **lists):
                if not case.evicts or only.case(case.kv_policy, case.kv_budget):
                    found.setdefault(case, n)
    return list(found.items())


def run(blocks: Sequence[tuple[Case, int]], out: Path, size: Callable[[int], None],
        watch: Callable[[int, str], None]) -> list[str]:
    """Measures what the folder does not hold yet; returns what went wrong, in sentences: a row that fails is no other
    row's end."""
    size(sum(bench.work(*one) for one in blocks))
    out.mkdir(parents=True, exist_ok=True)
    done, problems = {_key(row) for row in rows(out)}, []
    for case, repetitions in blocks:
        what = f"{case.model.stem}, {case.kv_policy} {case.kv_budget}".strip()
        watch(0, what)
        if _name(case) not in done:
            try:
                for row in bench.run([case], repetitions):
                    with open(out/FILE, "a", encoding="utf-8") as file:
                        file.write(json.dumps({**row, "case": json.loads(_name(case))}) + "\n")
            except Exception as error:
                problems.append(f"bench of {what}: {type(error).__name__}: {error}")
        watch(bench.work(case, repetitions), what)
    return problems


def rows(out: Path) -> list[Row]:
    path = out/FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]


def _name(case: Case) -> str:
    return json.dumps({**asdict(case), "model": case.model.name}, sort_keys=True)


def _key(row: Row) -> str:
    return json.dumps(row["case"], sort_keys=True)


def table(out: Path) -> str:
    """As `pykvc bench -o md` prints it."""
    found = rows(out)
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        report.markdown([Case(**{**row["case"], "model": Path(row["case"]["model"])}) for row in found], found)
    return text.getvalue()


def draw(out: Path) -> list[Path]:
    """How much faster it decodes than with the whole cache, and what the eviction takes of the prefill: a bar for each
    row."""
    use_matplotlib()
    import matplotlib.pyplot as plt
    paths, found = [], [row for row in rows(out) if row["decode_ratio_full"] is not None]
    for model in dict.fromkeys(row["case"]["model"] for row in found):
        of_model = [row for row in found if row["case"]["model"] == model]
        labels = [_label(row) for row in of_model]
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 1.2 + 0.28*len(labels)), layout="constrained",
                                             sharey=True)
        values = [row["decode_ratio_full"] for row in of_model]
        errors = [[v - row["decode_ratio_full_min"] for v, row in zip(values, of_model)],
                  [row["decode_ratio_full_max"] - v for v, row in zip(values, of_model)]]
        left.barh(labels, values, xerr=errors, color=[palette.look(row["kv_policy"])["color"] for row in of_model],
                  capsize=2)
        left.axvline(1, color="grey", linestyle="--")
        left.set_xlabel("decoding, times as fast as with the whole cache (median, range)")
        right.barh(labels, [row["evict_pct"] for row in of_model],
                   color=[palette.look(row["kv_policy"])["color"] for row in of_model])
        right.set_xlabel("time of the eviction, % of reading the prompt")
        left.invert_yaxis()
        figure.suptitle(Path(model).stem)
        paths.append(out/f"latency-{Path(model).stem}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def _label(row: Row) -> str:
    name = row["kv_policy"].partition(":")[0]
    more: list[Any] = [row["kv_budget"] or "", f"pp{row['n_prompt']}",
                       f"x{row['n_parallel']}" if row["n_parallel"] > 1 else "",
                       "" if row["type_k"] == row["type_v"] == "f16" else f"{row['type_k']}/{row['type_v']}"]
    return " ".join([name, *filter(None, more)])
