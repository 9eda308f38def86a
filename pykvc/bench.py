"""What eviction costs and gains: `pykvc bench`, in llama-bench's manner.

    for row in bench.run(bench.cases(n_prompt=[7000], n_gen=[32], kv_policy=["snapkv"], kv_budget=[256, 512])):
        print(row["decode_median_ts"], row["decode_ratio_full"])

A case is one configuration; race.py measures it, report.py prints it.
"""
import datetime
import itertools
import json
import os
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, Iterator, Sequence

import numpy as np

from . import _core, models, options
from .figures import Row
from .policy import I32
from .prose import prose
from .race import Case, Race, Tick

DEFAULTS: dict[str, Any] = dict(
    model=None, n_gpu_layers=0, n_threads=None, n_batch=512, n_ubatch=512, type_k="f16", type_v="f16", flash_attn="auto", n_parallel=1,
    kv_policy="full", kv_budget=None, kv_decode_budget=None, kv_cells=None, n_depth=0, n_prompt=512, n_gen=128)

LIMITS = {"n_gpu_layers": (-1, 2**31 - 1), "n_threads": (1, 512), "n_parallel": (1, 256), "n_batch": (1, 2**24), "n_ubatch": (1, 2**24),
          "n_depth": (0, 2**24), "n_prompt": (0, 2**24), "n_gen": (0, 2**24)}


def cases(**lists: Sequence[Any]) -> list[Case]:
    """Every combination of the values, the last field of Case fastest; a field that is not given has its default.
    ValueError names what is valid."""
    if lists.keys() - DEFAULTS.keys():
        raise TypeError(f"cases() takes {', '.join(DEFAULTS)}, not {', '.join(lists.keys() - DEFAULTS.keys())}")
    values = {name: [_check(name, value) for value in lists.get(name, [default])] for name, default in DEFAULTS.items()}
    todo = [Case(**dict(zip(values, chosen))) for chosen in itertools.product(*values.values())]
    for case in todo:
        options.policy(case.kv_policy, case.kv_budget, case.kv_decode_budget, case.kv_cells)
        if case.evicts and options.needs(case.kv_policy)["probe"] == "mean":
            raise ValueError(f"{case.kv_policy} is told a question, and bench has none: name another policy")
        if case.evicts and case.repeats and (case.kv_cells or case.n_parallel > 1):
            raise ValueError(f"{case.kv_policy} repeats the context: bench times that with n_parallel 1 and without kv_cells")
        options.whole("n_parallel", case.n_parallel, 1, case.n_batch)  # a call takes a token of each
    todo = [case if case.evicts else replace(case, kv_budget="", kv_decode_budget="", kv_cells="") for case in todo]
    todo = [case for case in dict.fromkeys(todo) if case.n_prompt or case.n_gen]
    if not todo:
        raise ValueError("there is nothing to measure: give n_prompt (-p) or n_gen (-n), or both")
    return [replace(case, model=models.resolve(case.model)) for case in todo]  # last: it may have to be fetched


def _check(name: str, value: Any) -> Any:
    if name == "model":
        return value
    if name == "n_threads" and value is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if name in LIMITS:
        return options.whole(name, value, *LIMITS[name])
    if name in ("type_k", "type_v"):
        return options.cache_type(name, value)
    if name == "flash_attn":
        return options.flash_attn(value)
    if name == "kv_policy":
        if options.in_python(value):
            raise ValueError(f"kv_policy {value}: bench races built-in policies, not one written in Python; "
                             "`pykvc policies` lists them")
        return _core.parse_spec(value)
    if name == "kv_cells":
        return options.cells(value)
    return options.budget(name, value)


def run(todo: Sequence[Case], repetitions: int = 5, source: str = "prose", text: str | None = None, tick: Tick = lambda n: None) -> Iterator[Row]:
    """A row for each case. source: "prose", "random" (tokens, as in llama-bench), or the name of `text`."""
    options.whole("repetitions", repetitions, 1)
    for (path, n_gpu_layers), cases_of_it in itertools.groupby(todo, key=lambda case: (case.model, case.n_gpu_layers)):
        model = _core.Model(str(path), n_gpu_layers=n_gpu_layers)
        tokens = evaluated(model, max(1, *(case.n_past for case in todo)), source, text)
        for case in cases_of_it:
            race = Race(model, case, tokens, tick)
            race.warm_up()
            for r in range(repetitions):
                if case.n_prompt or not race.rewind():
                    race.prefill(r)
                    race.evict()
                race.decode(r)
            yield {**_build(), **_model(model, case), **_parameters(case), "text": source, **race.row()}
        del race, model  # they make room for the next ones


def work(case: Case, repetitions: int) -> int:
    """About how many tokens a case evaluates, for a progress bar."""
    n_caches, n_fills = (2 if case.evicts else 1), (repetitions if case.n_prompt else 1)
    n_rounds = 1 + repetitions*(3 if case.evicts else 1)
    return case.n_parallel*((1 + n_fills*n_caches)*case.n_past + n_rounds*(1 + case.n_gen))


def evaluated(model: "_core.Model", n: int, source: str, text: str | None) -> I32:
    """The n tokens that are evaluated."""
    if source == "random":
        return np.random.default_rng(0).integers(0, model.n_vocab, n, dtype=np.int32)
    if model.meta.get("tokenizer.ggml.model") == "no_vocab":  # llama.cpp would abort
        raise ValueError("this model has no tokenizer: measure it with random tokens (--random)")
    ids = model.tokenize((prose(n//8 + 1) if text is None else text).encode("utf-8", "surrogateescape"), True)
    if len(ids) < n:
        raise ValueError(f"{source} has {len(ids)} tokens and {n} are to be evaluated: give more text, or less -p and -d")
    return np.array(ids[:n], np.int32)


# -- what a row says of where it was measured -------------------------------------------------------------------------

def _build() -> Row:
    from . import __version__
    try:
        origin = json.loads(distribution("pykvc").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # run from a source tree
        origin = {}
    return {"build_version": __version__, "build_commit": origin.get("vcs_info", {}).get("commit_id"),  # of pip install git+...
            "system_info": _core.system_info().strip(), "test_time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


def _model(model: "_core.Model", case: Case) -> Row:
    return {"model_filename": str(case.model), "model_type": model.desc, "model_size": model.size, "model_n_params": model.n_params}


def _parameters(case: Case) -> Row:
    return {name: value or None if name in ("kv_budget", "kv_decode_budget", "kv_cells") else value
            for name, value in asdict(case).items() if name != "model"}
