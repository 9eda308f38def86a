"""The command line: `python -m evals --help`. A mistake ends with exit status 2 and one sentence on stderr."""
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Callable, Iterator, Optional

import typer

from pykvc import _core, bench, command, models, options
from pykvc.command import sentences, values

from . import archive, baselines, estimate, fetch, harness, leaderboard, pictures, pool, report, study
from .cases import cases, protocols
from .run import check_all, run, run_all
from .tasks import TASKS, settings_of, task
from .tools import attention, latency
from .work import Plan, open_model

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="What eviction does to answers: tasks, policies and budgets against the whole cache.")


def main() -> None:
    command.run(app)


def _flag(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help)


# Of several commands
Models = Annotated[Optional[list[str]], _flag(
    "-m", "--model", help="GGUF files, known names or user/repo[:quant]. Default: SmolLM2-135M.")]
DataDir = Annotated[Optional[Path], _flag("--data-dir", help="Folder with TASK/*.jsonl[.gz]. Default: Hugging Face.")]
Threads = Annotated[Optional[int], _flag("--threads", "-t", help="CPU threads; default: all.")]
GpuLayers = Annotated[int, _flag("--n-gpu-layers", "-ngl", help="Layers on the GPU.")]
Parallel = Annotated[int, _flag(
    "--n-parallel", "-np", "--parallel", help="Questions asked at once, where the policy permits it.")]
Plain = Annotated[bool, _flag("--plain", help="Ask without the model's chat template.")]
AnyCommit = Annotated[bool, _flag("--any-commit", help="Go on with answers that another commit gave.")]
UnsafeCode = Annotated[bool, _flag("--unsafe-code", help="humaneval: run code where it cannot be locked in.")]
Answers = Annotated[Path, _flag("--out", "-o", help="Folder of the answers.")]
OnlyTasks = Annotated[Optional[list[str]], _flag("--task", help="Only these.")]
OnlyPolicies = Annotated[Optional[list[str]], _flag("--policy", "--kv-policy", help="Only these, by name.")]
OnlyBudgets = Annotated[Optional[list[str]], _flag("--budget", "--kv-budget", help="Only these.")]
OnlyProtocols = Annotated[Optional[list[str]], _flag("--protocol", help="Only these.")]


@app.command("run")
@sentences
def run_tasks(
    tasks: Annotated[list[str], _flag("--task", help="Tasks; `python -m evals list` names them.")],
    model: Models = None,
    policy: Annotated[list[str],
                      _flag("--policy", "--kv-policy",
                            help="NAME[:key=value,...]; full is what the others are compared with.")] = ["full"],
    budget: Annotated[list[str],
                      _flag("--budget", "--kv-budget",
                            help="Cells a layer keeps of the prompt: 512, 25% or 0.25; none.")] = ["none"],
    decode_budget: Annotated[list[str],
                             _flag("--decode-budget", "--kv-decode-budget",
                                   help="The same of the generated tokens; same: as the budget.")] = ["none"],
    cells: Annotated[list[str],
                     _flag("--cells", "--kv-cells",
                           help="Cells allocated: evict whenever they are full; none: once, at the end.")] = ["none"],
    protocol: Annotated[list[str], _flag(
        "--protocol", help="question-out (query-agnostic), question-in (query-aware).")] = ["question-out"],
    type_k: Annotated[list[str], _flag("--type-k", "-ctk", "--cache-type-k", help="Cache types of K.")] = ["f16"],
    type_v: Annotated[list[str], _flag("--type-v", "-ctv", "--cache-type-v", help="Cache types of V.")] = ["f16"],
    n: Annotated[Optional[int], _flag(
        "--n", "-n", help="Items of each task, or of each of its --sets. Default: what the task takes.")] = None,
    out: Annotated[Path, _flag(
        "--out", "-o", help="Folder of the answers; an interrupted run goes on there.")] = Path("evals-out"),
    data_dir: DataDir = None,
    seed: Annotated[int, _flag("--seed", "-s",
                               help="Of what a task draws, and of random policies' spec if they say so.")] = 0,
    n_ctx: Annotated[int, _flag("--n-ctx", "-c", "--ctx-size", help="Tokens of context; 0: what the task needs.")] = 0,
    n_ubatch: Annotated[int, _flag("--n-ubatch", "-ub", "--ubatch-size", help="Tokens computed at once.")] = 512,
    threads: Threads = None,
    n_gpu_layers: GpuLayers = 0,
    n_parallel: Parallel = 16,
    plain: Plain = False,
    any_commit: AnyCommit = False,
    length: Annotated[Optional[int], _flag(
        "--length", help="Tokens of a context (niah, fidelity), and its answer (ruler). longbench: at most.")] = None,
    of: Annotated[Optional[str],
                  _flag("--of", help="fidelity: prose, or the task whose contexts and questions are compared.")] = None,
    reference: Annotated[Optional[str],
                         _flag("--reference", help="fidelity: the whole cache of the same types, or of f16.")] = None,
    depths: Annotated[Optional[str], _flag("--depths", help="niah: where needles stand, in percent: 0,50,100.")] = None,
    needles: Annotated[Optional[int], _flag("--needles", help="niah: needles in one context.")] = None,
    shots: Annotated[Optional[int], _flag(
        "--shots", help="Examples before a question, of tasks that have some.")] = None,
    exemplars: Annotated[Optional[str],
                         _flag("--exemplars", help="gsm8k, longgenbench, commonsense_qa: cot, train; auto.")] = None,
    order: Annotated[Optional[int], _flag(
        "--order", help="gsm8k, longgenbench: a seed for another order of the examples; 0: as they are.")] = None,
    draw: Annotated[Optional[int], _flag(
        "--draw", help="gsm8k, longgenbench, humaneval, safety: a seed for other examples; 0: the first.")] = None,
    questions: Annotated[Optional[int], _flag(
        "--questions", help="longgenbench, longgenbench_mmlu: of one generation; kv_retrieval: of one object.")] = None,
    sets: Annotated[Optional[str], _flag("--sets", help="longbench, safety, ruler: parts of it, with commas.")] = None,
    announce: Annotated[Optional[int],
                        _flag("--announce", help="ruler: 0: contexts that do not tell what will be asked.")] = None,
    pairs: Annotated[Optional[int], _flag("--pairs", help="kv_retrieval: pairs of an object.")] = None,
    tokens: Annotated[Optional[int], _flag("--tokens", help="fidelity: tokens that are compared.")] = None,
    unsafe_code: UnsafeCode = False,
) -> None:
    """Ask what is not answered yet, save each answer, score it."""
    wanted = values(tasks)
    given = {"length": length, "depths": depths, "needles": needles, "shots": shots, "exemplars": exemplars,
             "order": order, "draw": draw, "of": of, "reference": reference, "questions": questions, "sets": sets,
             "announce": announce, "pairs": pairs, "tokens": tokens, "unsafe_code": unsafe_code or None}
    chosen = cases(values(policy), values(budget), values(decode_budget), values(cells), values(type_k), values(type_v))
    plan = Plan(tasks=wanted, cases=chosen, protocols=protocols(values(protocol)), out=out, data_dir=_folder(data_dir),
                n=_positive("--n", n), seed=seed, n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=threads,
                n_gpu_layers=n_gpu_layers, n_parallel=_positive("--n-parallel", n_parallel), chat=not plain,
                any_commit=any_commit,
                settings=settings_of(wanted, {name: value for name, value in given.items() if value is not None}))
    problems, names = [], [models.resolve(name) for name in values(model) or [None]]
    for name in names[1:]:
        check_all([plan], name)
    for name in names:
        with _bar() as (size, watch):
            problems += run(plan, name, size, watch)
    _end(problems)


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ValueError(f"{name} is 1 or more, not {value}")
    return value


def _folder(path: Path | None) -> Path | None:
    if path is not None and not path.is_dir():
        raise ValueError(f"--data-dir {path} is no folder")
    return path


@contextmanager
def _bar() -> Iterator[tuple[Callable[[int], None], Callable[[int, str], None]]]:
    """A bar on stderr with the time left; where that is no terminal, a line whenever something else begins."""
    from rich.console import Console
    from rich.progress import (BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn,
                               TimeRemainingColumn)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())
    terminal = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=terminal,
                  disable=not terminal, speed_estimate_period=1800) as bars:
        bar, last = bars.add_task("loading", total=None), ""

        def watch(n: int, what: str) -> None:
            nonlocal last
            if what != last and not terminal:
                print(what, file=sys.stderr, flush=True)
            last = what
            bars.update(bar, advance=n, description=what)
        yield lambda n: bars.update(bar, total=n), watch


@app.command("study")
@sentences
def run_study(
    name: Annotated[str, typer.Argument(help="A study of evals/studies (sensitivity, or 1), or a .toml file.")],
    model: Models = None,
    n: Annotated[Optional[int], _flag("--n", "-n", help="Items of each task, whatever the file says.")] = None,
    out: Annotated[Optional[Path],
                   _flag("--out", "-o", help="Folder of answers and report. Default: evals-out/NAME.")] = None,
    data_dir: DataDir = None,
    tasks: OnlyTasks = None,
    policy: OnlyPolicies = None,  # and full
    budget: OnlyBudgets = None,
    protocol: OnlyProtocols = None,
    settings: Annotated[Optional[list[str]],
                        _flag("--set", help="A setting of its tasks, whatever the file says: questions=5.")] = None,
    threads: Threads = None,
    n_gpu_layers: GpuLayers = 0,
    n_parallel: Parallel = 16,
    plain: Plain = False,
    any_commit: AnyCommit = False,
    unsafe_code: UnsafeCode = False,
    dry_run: Annotated[bool, _flag("--dry-run", help="Say what there is to do and about how long it takes.")] = False,
) -> None:
    """Do what is not done yet of a study, then write its report: tables and pictures."""
    found, where = study.read(name), _folder(data_dir)
    models_given = values(model) or found.model or [None]
    if len(models_given) < found.n_models:
        raise ValueError(f"{found.name} compares models: give at least {found.n_models} with --model")
    folder = out or Path("evals-out")/found.name
    only = study.Only(values(tasks), [_core.parse_spec(spec).partition(":")[0] for spec in values(policy)],
                      [options.budget("--budget", value) for value in values(budget)], protocols(values(protocol)),
                      settings or ())
    plans = study.plans(found, folder, where, _positive("--n", n), only, chat=not plain, unsafe_code=unsafe_code,
                        n_threads=threads, n_gpu_layers=n_gpu_layers, n_parallel=_positive("--n-parallel", n_parallel),
                        any_commit=any_commit)
    names = [models.resolve(one) for one in models_given]
    benches = [latency.cases_of(found.blocks["bench"], one, only.policies, only.budgets, threads, n_gpu_layers, n)
               for one in names]
    seen = [attention.views(found.blocks["attention"], open_model(one), where, n, found.n, only.tasks, only.policies,
                             only.budgets, not plain)
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
    problems = []
    for one in names[1:] if plans else []:
        check_all(plans, one)
    for one in names if plans else []:
        with _bar() as (size, watch):
            problems += run_all(plans, one, size, watch)
    for todo in benches:
        with _bar() as (size, watch):
            size(sum(bench.work(*one) for one in todo))
            problems += latency.run(todo, folder, watch)
    for one, looks in zip(names, seen):
        with _bar() as (size, watch):
            size(len(looks))
            problems += attention.run(looks, one, folder, threads, n_gpu_layers, any_commit, watch)
    for line in study.report(found, folder):
        print(line)
    _end(problems)


def _end(problems: list[str]) -> None:
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise typer.Exit(1)


@app.command("report")
@sentences
def show_report(
    out: Answers = Path("evals-out"),
    tasks: OnlyTasks = None,
    rescore: Annotated[bool, _flag("--rescore", help="Score every answer again.")] = False,
    no_pictures: Annotated[bool, _flag("--no-pictures", help="Tables only.")] = False,
) -> None:
    """Print the table, and write it to the folder as report.md and report.csv, with pictures."""
    rows = report.scored(out, [name for name in values(tasks) if task(name)], rescore)
    print(report.write(out, rows))
    for path in [] if no_pictures else pictures.draw(out, rows, report.table(rows)):
        print(path, file=sys.stderr)


@app.command("baselines")
@sentences
def show_baselines(
    out: Answers = Path("evals-out"),
    lm_eval: Annotated[Optional[Path], _flag(
        "--lm-eval", help="What python -m pykvc.lm_eval --output_path wrote.")] = None,
    tasks: OnlyTasks = None,
) -> None:
    """Print the whole cache's scores beside lm-evaluation-harness' and published ones."""
    rows = report.scored(out, [name for name in values(tasks) if task(name)])
    print(baselines.markdown(baselines.lines(rows, lm_eval)))


@app.command("leaderboard")
@sentences
def show_leaderboard(
    out: Answers = Path("evals-out"),
    tasks: OnlyTasks = None,
) -> None:
    """Print a line for each method, a column for each share removed: means over a task's sets. Also writes a .csv."""
    print(leaderboard.write(out, report.scored(out, [name for name in values(tasks) if task(name)])))


@app.command("pool")
@sentences
def show_pool(
    out: Answers = Path("evals-out"),
    by: Annotated[list[str], _flag("--by", help=f"A line for each value of these: {', '.join(pool.COLUMNS)}.")] = [
        "task", "set", "settings", "protocol"],
    across: Annotated[str, _flag("--across", help="One of --by: a column for each of its values.")] = "",
    value: Annotated[str, _flag("--value", help="score, or kl (of fidelity, in nats).")] = "score",
    against: Annotated[str, _flag(
        "--against", help="The policy to compare with, all but full at the same budget; or COLUMN=VALUE: "
                          "protocol=question-in, shots=0.")] = "full",
    comparisons: Annotated[Optional[int],
                           _flag("--comparisons", help="Correct for so many. Default: those of the table.")] = None,
    tasks: OnlyTasks = None,
    policy: OnlyPolicies = None,
    budget: OnlyBudgets = None,
    protocol: OnlyProtocols = None,
) -> None:
    """Print what many cells say together, against one policy on the same items, with intervals over questions."""
    rows = report.scored(out, [name for name in values(tasks) if task(name)])
    if list(pool.named(against)) == ["policy"]:
        against = _core.parse_spec(pool.named(against)["policy"]).partition(":")[0]
    names = [_core.parse_spec(spec).partition(":")[0] for spec in values(policy)]
    budgets, asked = [options.budget("--budget", value) for value in values(budget)], protocols(values(protocol))
    rows = [row for row in rows if (not names or row["policy"].partition(":")[0] in (*names, against, "full"))
            and (not asked or row["protocol"] in asked)
            and (not budgets or row["budget"] in ("", *budgets))]
    columns = values(by)
    print(pool.markdown(pool.pool(rows, columns, against, value, _positive("--comparisons", comparisons)), columns,
                        against, across, value))


@app.command("fetch")
@sentences
def fetch_files(
    data_dir: Annotated[Path, _flag("--data-dir",
                                    help="Where the files go, and the other commands read them.")] = Path("evals-data"),
    folder: Annotated[Optional[Path],
                      _flag("--from", help="A folder that has them already: they are checked and copied.")] = None,
    tasks: Annotated[Optional[list[str]], _flag("--task", help="Only what these need.")] = None,
) -> None:
    """Get or make the rows and texts that tasks need, each checked against its sha256."""
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--from {folder} is no folder")
    _end(fetch.fetch(data_dir, [name for name in values(tasks) if task(name)], folder, print))


@app.command("harness")
@sentences
def write_harness(
    data_dir: Annotated[Path, _flag("--data-dir", help="Folder with TASK/*.jsonl[.gz].")],
    out: Annotated[Path, _flag("--out", "-o",
                               help="Folder of the tasks' files, for --include_path.")] = Path("lm-eval-tasks"),
) -> None:
    """Write tasks of lm-evaluation-harness (gsm8k_cot, commonsense_qa, mmlu) that read their rows from a folder."""
    _folder(data_dir)
    names = harness.write(data_dir, out)
    others = [name for name in names if not name.startswith("mmlu_")]
    tasks = others + ["mmlu"]*(len(names) > len(others))
    print(f"python -m pykvc.lm_eval --include_path {out} --tasks {','.join(tasks)}")


@app.command("archive")
@sentences
def archive_results(
    folder: Annotated[Path, typer.Argument(help="Where the archive's files go; `report --out` reads them there.")],
    out: Answers = Path("evals-out"),
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
