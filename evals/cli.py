"""The command line: `python -m evals --help`. A mistake ends with exit status 2 and one sentence on stderr."""
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Callable, Optional, Sequence

import typer

from pykvc import bench, command, models
from pykvc.command import sentences, takes, values
from pykvc.flags import flag

from . import baselines, flags, leaderboard, panels, pool, report, study
from .flags import (HELP, OUT, Answers, DataDir, Models, OnlyTasks, Plain, end, existing, known_tasks, policy_name,
                    positive)
from .run import check_all, run
from .settings import Only
from .tasks import TASKS
from .tools import archive, attention, estimate, fetch, harness, latency
from .work import open_model

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="What eviction does to answers: tasks, policies and budgets against the whole cache.")


def main() -> None:
    command.run(app)


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


# -- asking -----------------------------------------------------------------------------------------------------------

@app.command("run")
@sentences
@takes(lists=flags.lists, settings=flags.settings, how=flags.how)
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
             "n_ctx": n_ctx, "n_ubatch": n_ubatch, "plain": plain, **({} if n is None else {"n": positive("--n", n)})}
    plan = study.plan_of(block, out, data_dir=existing("--data-dir", data_dir), **how)
    names = [models.resolve(name) for name in values(model) or [None]]
    for name in names[1:]:
        check_all([plan], name)
    end(_each([partial(run, [plan], name) for name in names]))


@app.command("study")
@sentences
@takes(only=flags.only, how=flags.how)
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
    found, where = study.read(name), existing("--data-dir", data_dir)
    models_given = values(model) or found.model or [None]
    if len(models_given) < found.n_models:
        raise ValueError(f"{found.name} compares models: give at least {found.n_models} with --model")
    folder, threads, layers = out or OUT/found.name, how["n_threads"], how["n_gpu_layers"]
    plans = study.plans(found, folder, positive("--n", n), replace(only, settings=settings or ()), data_dir=where,
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
    end(problems)


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
    rows = report.scored(out, known_tasks(tasks), rescore)
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
    print(baselines.markdown(baselines.lines(report.scored(out, known_tasks(tasks)), lm_eval)))


@app.command("leaderboard")
@sentences
def show_leaderboard(out: Answers = OUT, tasks: OnlyTasks = None) -> None:
    """Print a line for each method, a column for each share removed: means over a task's sets. Also writes a .csv."""
    print(leaderboard.write(out, report.scored(out, known_tasks(tasks))))


@app.command("pool")
@sentences
@takes(only=flags.only)
def show_pool(
    only: Only,
    out: Answers = OUT,
    by: Annotated[list[str], flag("--by", help=f"A line for each value of these: {', '.join(pool.COLUMNS)}.")] = [
        "task", "set", "settings", "protocol"],
    across: Annotated[str, flag("--across", help="One of --by: a column for each of its values.")] = "",
    value: Annotated[str, flag("--value", help="score, or kl (of fidelity, in nats).")] = "score",
    against: Annotated[str, flag(
        "--against", help="The policy to compare with, all but full at the same budget; or COLUMN=VALUE: "
                          "protocol=question-in, shots=0; none: a mean and its interval.")] = "full",
    comparisons: Annotated[Optional[int],
                           flag("--comparisons", help="Correct for so many. Default: those of the table.")] = None,
) -> None:
    """Print what many cells say together, against one policy on the same items, with intervals over questions."""
    if against != pool.NOTHING and list(pool.named(against)) == ["policy"]:
        against = policy_name(pool.named(against)["policy"])
    rows, columns = report.scored(out, known_tasks(only.tasks)), values(by)
    lines = pool.pool(rows, columns, against, value, positive("--comparisons", comparisons), only)
    print(pool.markdown(lines, columns, against, across, value))


# -- the others --------------------------------------------------------------------------------------------------------

for name, tool in (("fetch", fetch), ("harness", harness), ("archive", archive)):
    app.command(name)(sentences(tool.command))


@app.command("list")
@sentences
def list_tasks() -> None:
    """Name the tasks, with what they are and their settings, and the studies."""
    for name, module in TASKS.items():
        settings = ", ".join(f"--{setting.replace('_', '-')} {value}" for setting, value in module.SETTINGS.items())
        print(f"{name}: {module.__doc__.splitlines()[0]}" + (f" [{settings}]" if settings else ""))
    for name in study.names():
        print(f"study {name}: {study.read(name).title}")
