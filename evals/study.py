"""A study: a TOML file with runs, benches and captures of attention, done in one folder and reported there.

    title = "..."                     model = [...], n = 100: defaults that the command line replaces
    [[run]]                           flags of `python -m evals run` by their long names, a value or a list of values
    [[bench]]                         flags of `pykvc bench`, likewise
    [[attention]]                     task and its settings, policy, budget, layers: evals/tools/attention.py
    [[picture]]                       x, y, panel, line: evals/panels.py

A list given to a setting of a task (shots = [1, 2, 4]) is a run for each value; cache_type sets type_k and type_v
together.
"""
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Sequence

from . import leaderboard, panels
from . import report as tables
from .cases import cases, protocols
from .store import write_table
from .settings import EVERYTHING, LISTS, SETTINGS, SINGLE, Block, Only, sweep, texts
from .tasks import TASKS, settings_of, task
from .tools import attention_report, latency
from .work import Plan

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent/"studies"

BLOCKS = {
    "run": {"task", "cache_type", *LISTS, *SINGLE, *SETTINGS},
    "bench": {"n_prompt", "n_gen", "n_depth", "n_parallel", "kv_policy", "kv_budget", "kv_decode_budget", "kv_cells",
              "type_k", "type_v", "cache_type", "repetitions"},
    "attention": {"task", "n", "policy", "budget", "seed", "plain", *SETTINGS},
    "picture": {"name", "x", "y", "panel", "line", "file", "marker", "front", "only"}}
TOP = {"title", "model", "n", "n_models", *BLOCKS}


@dataclass(frozen=True)
class Study:
    name: str
    title: str
    model: list[str]
    n: int | None
    n_models: int               # that it takes to compare
    blocks: dict[str, list[Block]] = field(default_factory=dict)


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find(name: str) -> Path:
    """A file, or one of evals/studies by its name, its number or what comes after the number."""
    if name.endswith(".toml"):
        return Path(name)
    for known in names():
        if name in (known, *known.split("-", 1)):
            return FOLDER/f"{known}.toml"
    raise ValueError(f"unknown study {name!r}: valid are {', '.join(names())}, or a .toml file")


def read(name: str) -> Study:
    """ValueError names what is wrong in the file, and what is valid."""
    path = find(name)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the study {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    _known(str(path), content, TOP)
    blocks = {kind: content.get(kind, []) for kind in BLOCKS}
    for kind, found in blocks.items():
        if not isinstance(found, list) or not all(isinstance(block, dict) for block in found):
            raise ValueError(f"{path}: {kind} is a table in double brackets, [[{kind}]]")
        for block in found:
            _known(f"[[{kind}]] of {path}", block, BLOCKS[kind])
            if kind == "picture":
                panels.check(f"[[picture]] of {path}", block)
    if not any(blocks[kind] for kind in ("run", "bench", "attention")):
        raise ValueError(f"{path} has nothing to do: it needs a [[run]], [[bench]] or [[attention]]")
    for where, block in ((str(path), content), *((f"[[attention]] of {path}", one) for one in blocks["attention"])):
        for name in block.keys() & {"n", "n_models"}:
            _kind(where, name, block[name], int)
    return Study(path.stem, str(content.get("title", path.stem)), texts(content.get("model", [])), content.get("n"),
                 content.get("n_models", 1), blocks)


def _known(where: str, given: Block, valid: set[str]) -> None:
    for name, value in given.items():
        if name not in valid:
            raise ValueError(f"{where} has no key {name!r}: valid are {', '.join(sorted(valid))}")
        if isinstance(value, list) and not value and "task" in valid:
            raise ValueError(f"{name} in {where} is empty")


def _kind(where: str, name: str, value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{name} in {where} is {'a whole number' if kind is int else 'true or false'}, not {value!r}")
    if name in ("n", "n_models") and value < 1:
        raise ValueError(f"{name} in {where} is 1 or more, not {value}")
    return value


def plans(study: Study, out: Path, n: int | None = None, only: Only = EVERYTHING, **how: Any) -> list[Plan]:
    """Of all runs, in the order of the file. n: what the command line says. how: of plan_of().
    ValueError for every mistake that can be seen without the data."""
    for name in only.tasks:
        task(name)
    usual, given = ({} if value is None else {"n": value} for value in (study.n, n))
    found = [plan_of({**usual, **one, **given}, out, f"[[run]] of {study.name}", only, **how)
             for block in _with_settings(study, only.settings) for one in sweep(block, [*SETTINGS, "cache_type"])]
    return [plan for plan in found if plan.tasks and plan.protocols]


def _with_settings(study: Study, given: Sequence[str]) -> list[Block]:
    """The runs, with these settings where their tasks have them."""
    settings: Block = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in SETTINGS:
            raise ValueError(f"--set is NAME=VALUE, such as questions=5, not {text!r}: valid names are "
                             f"{', '.join(SETTINGS)}")
        settings[name] = int(value) if value.isdecimal() else value
    found, used = [], set()
    for block in study.blocks["run"]:
        tasks = [TASKS[name] for name in (*texts(block.get("task", [])), *texts(block.get("of", []))) if name in TASKS]
        here = {name: value for name, value in settings.items() if any(name in module.SETTINGS for module in tasks)}
        used |= set(here)
        found.append({**block, **here})
    if unused := sorted(set(settings) - used):
        raise ValueError(f"no task of {study.name} has a setting {unused[0]!r}")
    return found


def plan_of(block: Block, out: Path, where: str = "run", only: Only = EVERYTHING, chat: bool = True,
            unsafe_code: bool = False, **more: Any) -> Plan:
    """Of a block with one value for each setting. chat: False asks all without a template. more: further fields of
    Plan."""
    if "task" not in block:
        raise ValueError(f"{where} names no task: valid are {', '.join(TASKS)}")
    if "cache_type" in block:
        block = {**block, "type_k": block["cache_type"], "type_v": block["cache_type"]}
    lists = {name: texts(block.get(name, usual)) for name, usual in LISTS.items()}
    single = {name: _kind(where, name, block[name], kind) for name, kind in SINGLE.items() if name in block}
    plain = single.pop("plain", False)
    wanted = [name for name in texts(block["task"]) if task(name)]
    settings = settings_of(wanted, {name: block[name] for name in SETTINGS if name in block})
    if unsafe_code and "humaneval" in wanted:
        settings["humaneval"] = {**settings.get("humaneval", {}), "unsafe_code": True}
    asked = protocols(lists.pop("protocol"))
    return Plan(tasks=[name for name in wanted if not only.tasks or name in only.tasks],
                cases=[case for case in cases(**lists) if case.name == "full" or only.case(case.policy, case.budget)],
                protocols=[name for name in asked if not only.protocols or name in only.protocols], out=out,
                chat=chat and not plain, settings=settings, **single, **more)


def report(study: Study, out: Path) -> list[str]:
    """Writes report.md, report.csv and the pictures to the folder, and of ruler leaderboard.md and leaderboard.csv;
    what there is to say of it, line by line."""
    said = []
    if study.blocks["run"]:
        scored = tables.scored(out)
        said += [tables.write(out, scored, study.title),
                 *map(str, panels.draw(out, study.blocks["picture"], tables.table(scored)))]
        if of_ruler := [row for row in scored if row["task"] == "ruler"]:
            said += [leaderboard.write(out, of_ruler, study.title),
                     *map(str, leaderboard.draw(out, leaderboard.lines(of_ruler)))]
    if found := attention_report.rows(out):
        lines = attention_report.lines(found)
        said += [write_table(out, "attention", attention_report.markdown(lines), lines, study.title),
                 *map(str, attention_report.draw(out, found))]
    if study.blocks["bench"] and latency.rows(out):
        text = latency.table(out)
        (out/"latency.md").write_text(f"# {study.title}\n\n{text}", encoding="utf-8")
        said += [text, *map(str, latency.draw(out))]
    return said
