"""The command line: `python -m evals --help`. A mistake ends with exit status 2 and one sentence on stderr."""
import inspect
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Callable, Optional, Sequence

import typer

from pykvc import _core, bench, command, models, options
from pykvc.command import sentences, takes, values
from pykvc.flags import flag

from . import baselines, leaderboard, panels, pool, report, study
from .cases import protocols
from .run import check_all, run
from .settings import HELP, LISTS, Only, kind_of
from .tasks import TASKS, task
from .tools import archive, attention, estimate, fetch, harness, latency
from .work import open_model

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="What eviction does to answers: tasks, policies and budgets against the whole cache.")


def main() -> None:
    command.run(app)


# -- flags of several commands ----------------------------------------------------------------------------------------

Models = Annotated[Optional[list[str]], flag(
    "-m", "--model", help="GGUF files, known names or user/repo[:quant]. Default: SmolLM2-135M.")]
DataDir = Annotated[Optional[Path], flag("--data-dir", help="Folder with TASK/*.jsonl[.gz]. Default: Hugging Face.")]
Plain = Annotated[bool, flag("--plain", help="Ask without the model's chat template.")]
Answers = Annotated[Path, flag("--out", "-o", help="Folder of the answers.")]
OnlyTasks = Annotated[Optional[list[str]], flag("--task", help="Only these.")]
OUT = Path("evals-out")


def how(
    threads: Annotated[Optional[int], flag("--threads", "-t", help="CPU threads; default: all.")] = None,
    n_gpu_layers: Annotated[int, flag("--n-gpu-layers", "-ngl", help="Layers on the GPU.")] = 0,
    n_parallel: Annotated[int, flag("--n-parallel", "-np", "--parallel",
                                    help="Questions asked at once, where the policy permits it.")] = 16,
    any_commit: Annotated[bool, flag("--any-commit", help="Go on with answers that another commit gave.")] = False,
) -> dict[str, Any]:
    return dict(n_threads=threads, n_gpu_layers=n_gpu_layers, n_parallel=_positive("--n-parallel", n_parallel),
                any_commit=any_commit)


def only(
    tasks: OnlyTasks = None,
    policy: Annotated[Optional[list[str]], flag("--policy", "--kv-policy", help="Only these, by name.")] = None,
    budget: Annotated[Optional[list[str]], flag("--budget", "--kv-budget", help="Only these.")] = None,
    protocol: Annotated[Optional[list[str]], flag("--protocol", help="Only these.")] = None,
) -> Only:
    return Only(values(tasks), [_name(spec) for spec in values(policy)],
                      [options.budget("--budget", value) for value in values(budget)], protocols(values(protocol)))


def flags_of(table: dict[str, tuple[str, str]], kind: Callable[[str], Any],
             default: Callable[[str], Any]) -> Callable[..., dict[str, Any]]:
    """For takes(): a parameter for each name of a table, with its flags and their help; given back are those that were
    given or have a default."""
    def given(**found: Any) -> dict[str, Any]:
        return {name: value for name, value in found.items() if value is not None and value is not False}
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default(name),
                                    annotation=Annotated[kind(name), flag(*names.split(), help=text)])
                  for name, (names, text) in table.items()]
    setattr(given, "__signature__", inspect.Signature(parameters))  # noqa: B010
    return given


LIST_FLAGS = {
    "policy": ("--policy --kv-policy", "NAME[:key=value,...]; full is what the others are compared with."),
    "budget": ("--budget --kv-budget", "Cells a layer keeps of the prompt: 512, 25% or 0.25; none."),
    "decode_budget": ("--decode-budget --kv-decode-budget", "The same of the generated tokens; same: as the budget."),
    "cells": ("--cells --kv-cells", "Cells allocated: evict whenever they are full; none: once, at the end."),
    "protocol": ("--protocol", "question-out (query-agnostic), question-in (query-aware)."),
    "type_k": ("--type-k -ctk --cache-type-k", "Cache types of K."),
    "type_v": ("--type-v -ctv --cache-type-v", "Cache types of V.")}
lists = flags_of(LIST_FLAGS, lambda name: list[str], lambda name: [LISTS[name]])
settings = flags_of({name: (f"--{name.replace('_', '-')}", text) for name, text in HELP.items()},
                    lambda name: bool if kind_of(name) is bool else Optional[kind_of(name)],
                    lambda name: False if kind_of(name) is bool else None)


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ValueError(f"{name} is 1 or more, not {value}")
    return value


def _folder(name: str, path: Path | None) -> Path | None:
    if path is not None and not path.is_dir():
        raise ValueError(f"{name} {path} is no folder")
    return path


def _name(spec: str) -> str:
    """Of a policy, without parameters."""
    return _core.parse_spec(spec).partition(":")[0]


def _tasks(given: list[str] | None) -> list[str]:
    return [name for name in values(given) if task(name)]


def _each(parts: Sequence[Callable[..., list[str]]]) -> list[str]:
    """Each with a bar on stderr and the time left; where that is no terminal, a line whenever something else begins.
    What went wrong."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn
    columns = TextColumn("{task.description}", markup=False), *Progress.get_default_columns()[1:], TimeElapsedColumn()
    terminal, problems = sys.stderr.isatty(), []
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=terminal,
                  disable=not terminal, speed_estimate_period=1800) as bars:
        bar, last = bars.add_task("loading", total=None), ""

        def watch(n: int, what: str) -> None:
            nonlocal last
            if what != last and not terminal:
                print(what, file=sys.stderr, flush=True)
            last = what
            bars.update(bar, advance=n, description=what)
        for part in parts:
            bars.reset(bar)
            problems += part(lambda n: bars.update(bar, total=n), watch)
    return problems


def _end(problems: list[str]) -> None:
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise typer.Exit(1)


# -- asking -----------------------------------------------------------------------------------------------------------

@app.command("run")
@sentences
@takes(lists=lists, settings=settings, how=how)
def run_tasks(
    lists: dict[str, list[str]],
    settings: dict[str, Any],
    how: dict[str, Any],
    tasks: Annotated[list[str], flag("--task", help="Tasks; `python -m evals list` names them.")],
    model: Models = None,
    n: Annotated[Optional[int], flag(
        "--n", "-n", help="Items of each task, or of each of its --sets. Default: what the task takes.")] = None,
    out: Annotated[Path, flag("--out", "-o", help="Folder of the answers; an interrupted run goes on there.")] = OUT,
    data_dir: DataDir = None,
    seed: Annotated[int, flag("--seed", "-s",
                              help="Of what a task draws, and of random policies' spec if they say so.")] = 0,
    n_ctx: Annotated[int, flag("--n-ctx", "-c", "--ctx-size", help="Tokens of context; 0: what the task needs.")] = 0,
    n_ubatch: Annotated[int, flag("--n-ubatch", "-ub", "--ubatch-size", help="Tokens computed at once.")] = 512,
    plain: Plain = False,
) -> None:
    """Ask what is not answered yet, save each answer, score it."""
    block = {"task": values(tasks), **{name: values(given) for name, given in lists.items()}, **settings, "seed": seed,
             "n_ctx": n_ctx, "n_ubatch": n_ubatch, "plain": plain, **({} if n is None else {"n": _positive("--n", n)})}
    plan = study.plan_of(block, out, data_dir=_folder("--data-dir", data_dir), **how)
    names = [models.resolve(name) for name in values(model) or [None]]
    for name in names[1:]:
        check_all([plan], name)
    _end(_each([partial(run, [plan], name) for name in names]))


@app.command("study")
@sentences
@takes(only=only, how=how)
def run_study(
    only: Only,
    how: dict[str, Any],
    name: Annotated[str, typer.Argument(help="A study of evals/studies (sensitivity, or 1), or a .toml file.")],
    model: Models = None,
    n: Annotated[Optional[int], flag("--n", "-n", help="Items of each task, whatever the file says.")] = None,
    out: Annotated[Optional[Path],
                   flag("--out", "-o", help="Folder of answers and report. Default: evals-out/NAME.")] = None,
    data_dir: DataDir = None,
    settings: Annotated[Optional[list[str]],
                        flag("--set", help="A setting of its tasks, whatever the file says: questions=5.")] = None,
    plain: Plain = False,
    unsafe_code: Annotated[bool, flag("--unsafe-code", help=HELP["unsafe_code"])] = False,
    dry_run: Annotated[bool, flag("--dry-run", help="Say what there is to do and about how long it takes.")] = False,
) -> None:
    """Do what is not done yet of a study, then write its report: tables and pictures."""
    found, where = study.read(name), _folder("--data-dir", data_dir)
    models_given = values(model) or found.model or [None]
    if len(models_given) < found.n_models:
        raise ValueError(f"{found.name} compares models: give at least {found.n_models} with --model")
    folder, threads, layers = out or OUT/found.name, how["n_threads"], how["n_gpu_layers"]
    plans = study.plans(found, folder, _positive("--n", n), replace(only, settings=settings or ()), data_dir=where,
                        chat=not plain, unsafe_code=unsafe_code, **how)
    names = [models.resolve(one) for one in models_given]
    benches = [latency.cases_of(found.blocks["bench"], one, only, threads, layers, n) for one in names]
    seen = [attention.views(found.blocks["attention"], open_model(one), only, where, n, found.n, not plain)
            for one in names if found.blocks["attention"]]
    if dry_run:
        for one, looks in zip(names, seen):
            n_times = 2 + max(len(view.cases) for view in looks)
            print(f"{one.stem}: {len(looks)} items to look at, each evaluated {n_times} times")
        for one, todo in zip(names, benches):
            if plans:
                print(estimate.sentence(plans, one))
            if todo:
                print(f"{one.stem}: {len(todo)} rows of bench, {sum(bench.work(*row) for row in todo)} tokens")
        return
    for one in names[1:] if plans else []:
        check_all(plans, one)
    problems = _each([
        *(partial(run, plans, one) for one in names if plans),
        *(partial(latency.run, todo, folder) for todo in benches),
        *(partial(attention.run, looks, one, folder, threads, layers, how["any_commit"])
          for one, looks in zip(names, seen))])
    for line in study.report(found, folder):
        print(line)
    _end(problems)


# -- what answers say -------------------------------------------------------------------------------------------------

@app.command("report")
@sentences
def show_report(
    out: Answers = OUT,
    tasks: OnlyTasks = None,
    rescore: Annotated[bool, flag("--rescore", help="Score every answer again.")] = False,
    no_pictures: Annotated[bool, flag("--no-pictures", help="Tables only.")] = False,
) -> None:
    """Print the table, and write it to the folder as report.md and report.csv, with pictures."""
    rows = report.scored(out, _tasks(tasks), rescore)
    print(report.write(out, rows))
    for path in [] if no_pictures else panels.draw_report(out, rows, report.table(rows)):
        print(path, file=sys.stderr)


@app.command("baselines")
@sentences
def show_baselines(
    out: Answers = OUT,
    lm_eval: Annotated[Optional[Path],
                       flag("--lm-eval", help="What python -m pykvc.lm_eval --output_path wrote.")] = None,
    tasks: OnlyTasks = None,
) -> None:
    """Print the whole cache's scores beside lm-evaluation-harness' and published ones."""
    print(baselines.markdown(baselines.lines(report.scored(out, _tasks(tasks)), lm_eval)))


@app.command("leaderboard")
@sentences
def show_leaderboard(out: Answers = OUT, tasks: OnlyTasks = None) -> None:
    """Print a line for each method, a column for each share removed: means over a task's sets. Also writes a .csv."""
    print(leaderboard.write(out, report.scored(out, _tasks(tasks))))


@app.command("pool")
@sentences
@takes(only=only)
def show_pool(
    only: Only,
    out: Answers = OUT,
    by: Annotated[list[str], flag("--by", help=f"A line for each value of these: {', '.join(pool.COLUMNS)}.")] = [
        "task", "set", "settings", "protocol"],
    across: Annotated[str, flag("--across", help="One of --by: a column for each of its values.")] = "",
    value: Annotated[str, flag("--value", help="score, or kl (of fidelity, in nats).")] = "score",
    against: Annotated[str, flag(
        "--against", help="The policy to compare with, all but full at the same budget; or COLUMN=VALUE: "
                          "protocol=question-in, shots=0.")] = "full",
    comparisons: Annotated[Optional[int],
                           flag("--comparisons", help="Correct for so many. Default: those of the table.")] = None,
) -> None:
    """Print what many cells say together, against one policy on the same items, with intervals over questions."""
    if list(pool.named(against)) == ["policy"]:
        against = _name(pool.named(against)["policy"])
    wanted = replace(only, policies=only.policies and [*only.policies, against, "full"],
                     budgets=only.budgets and ["", *only.budgets])
    rows, columns = report.scored(out, _tasks(only.tasks)), values(by)
    rows = [row for row in rows if wanted.case(row["policy"], row["budget"])
            and (not only.protocols or row["protocol"] in only.protocols)]
    print(pool.markdown(pool.pool(rows, columns, against, value, _positive("--comparisons", comparisons)), columns,
                        against, across, value))


# -- files ------------------------------------------------------------------------------------------------------------

@app.command("fetch")
@sentences
def fetch_files(
    data_dir: Annotated[Path, flag("--data-dir",
                                   help="Where the files go, and the other commands read them.")] = Path("evals-data"),
    folder: Annotated[Optional[Path],
                      flag("--from", help="A folder that has them already: they are checked and copied.")] = None,
    tasks: Annotated[Optional[list[str]], flag("--task", help="Only what these need.")] = None,
) -> None:
    """Get or make the rows and texts that tasks need, each checked against its sha256."""
    _end(fetch.fetch(data_dir, _tasks(tasks), _folder("--from", folder), print))


@app.command("harness")
@sentences
def write_harness(
    data_dir: Annotated[Path, flag("--data-dir", help="Folder with TASK/*.jsonl[.gz].")],
    out: Annotated[Path, flag("--out", "-o",
                              help="Folder of the tasks' files, for --include_path.")] = Path("lm-eval-tasks"),
) -> None:
    """Write tasks of lm-evaluation-harness (gsm8k_cot, commonsense_qa, mmlu) that read their rows from a folder."""
    _folder("--data-dir", data_dir)
    tasks = dict.fromkeys("mmlu" if name.startswith("mmlu_") else name for name in harness.write(data_dir, out))
    print(f"python -m pykvc.lm_eval --include_path {out} --tasks {','.join(tasks)}")


@app.command("archive")
@sentences
def archive_results(
    folder: Annotated[Path, typer.Argument(help="Where the archive's files go; `report --out` reads them there.")],
    out: Answers = OUT,
) -> None:
    """Keep the figures and scores of every answer, compressed, without the texts."""
    for path in archive.pack(out, folder):
        print(f"{path}: {path.stat().st_size} bytes")


@app.command("list")
@sentences
def list_tasks() -> None:
    """Name the tasks, with what they are and their settings, and the studies."""
    for name, module in TASKS.items():
        settings = ", ".join(f"--{setting.replace('_', '-')} {value}" for setting, value in module.SETTINGS.items())
        print(f"{name}: {module.__doc__.splitlines()[0]}" + (f" [{settings}]" if settings else ""))
    for name in study.names():
        print(f"study {name}: {study.read(name).title}")
