"""Caches that take turns, so that what else the machine does falls on all of them alike.

`ours` evicts. `full` is llama.cpp without a policy holding every token, `short` the same holding as many as the policy kept.
The prefill alternates call by call between ours and full, the decode in rounds between all three. A case that does not
evict is ours alone.
"""
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from time import perf_counter_ns
from typing import Any, Callable, Sequence

import numpy as np

from . import _core, options
from .figures import Row, median_interval, peak_rss, rates, reset_peak_rss, spread
from .policy import I32
from .probe import N_REQUEST
from .session import Session

Tick = Callable[[int], None]  # so many more tokens were evaluated


@dataclass(frozen=True)
class Case:
    """What a row measures: n_depth tokens, then n_prompt timed ones, an eviction, n_gen timed ones, in each of n_parallel sequences."""
    model: Path
    n_gpu_layers: int
    n_threads: int
    n_batch: int
    n_ubatch: int
    type_k: str
    type_v: str
    flash_attn: str
    n_parallel: int
    kv_policy: str
    kv_budget: str         # "": none
    kv_decode_budget: str
    kv_cells: str
    n_depth: int
    n_prompt: int
    n_gen: int

    @property
    def n_past(self) -> int:
        return self.n_depth + self.n_prompt

    @property
    def evicts(self) -> bool:
        return self.kv_policy != "full"

    @property
    def repeats(self) -> bool:
        """Does the policy have the context evaluated once more?"""
        return options.needs(self.kv_policy)["probe"] == "max"


class Cache:
    """A context whose sequences all evaluate the same. What takes time returns ns."""

    def __init__(self, model: "_core.Model", case: Case, n_past: int, evicts: bool) -> None:
        own = case.kv_policy, case.kv_budget, case.kv_decode_budget, case.kv_cells
        policy, budget, decode_budget, cells = own if evicts else ("full", "", "", "")
        chunk = options.parameter(case.kv_policy, "chunk") if evicts and case.repeats else 0
        n_ctx = -(-(n_past + max(1 + case.n_gen, chunk and chunk + N_REQUEST))//256)*256
        self.ctx = _core.Context(model, n_ctx=n_ctx, n_batch=case.n_batch, n_ubatch=case.n_ubatch, n_seq_max=case.n_parallel,
                                 n_threads=case.n_threads, type_k=case.type_k, type_v=case.type_v, flash_attn=case.flash_attn,
                                 policy=policy, budget=budget, decode_budget=decode_budget, cells=cells)
        self.n_past, self.seqs = n_past, range(case.n_parallel)
        self.evicts, self.has_budget = evicts, bool(evicts and (case.kv_budget or case.kv_cells))
        self.session: Session | None = None  # that a repetition is evaluated in
        if chunk:
            setup = {"kv_cells": "", "kv_budget": case.kv_budget, "n_ctx": self.ctx.n_ctx}
            self.session = Session(model, self.ctx, setup, True, False, "max", options.parameter(case.kv_policy, "window"), chunk)

    def probe(self, tokens: I32) -> int:
        """Has a policy that asks see what a repetition of the evaluated tokens attends to."""
        begin = perf_counter_ns()
        if self.session is not None:
            self.session.tokens, self.session.n_probed = [int(token) for token in tokens], 0
            self.session.probe.ask()
        return perf_counter_ns() - begin

    def end_prompt(self) -> int:
        """Evicts down to the budget."""
        begin = perf_counter_ns()
        for seq in self.seqs:
            if self.has_budget:
                self.ctx.evict(seq)
            if self.evicts:
                self.ctx.end_prompt(seq)
        return perf_counter_ns() - begin

    def generate(self, tokens: I32) -> int:
        seqs = np.array(self.seqs, np.int32)
        steps = [np.full(len(seqs), token, np.int32) for token in tokens]
        begin = perf_counter_ns()
        for step in steps:
            self.ctx.decode_batch(step, seqs)
        return perf_counter_ns() - begin

    def rewind(self) -> bool:
        """Removes what was generated. False: this policy cannot, and the cache has to be filled again."""
        return all([self.ctx.remove_tail(self.n_past, seq) for seq in self.seqs])


def fill(caches: Sequence[Cache], tokens: I32, n_call: int, tick: Tick, turn: int = 0) -> list[list[int]]:
    """Evaluates the tokens in every cache, call by call, each time another one first: ns [n_caches][n_calls]."""
    took: list[list[int]] = [[] for _ in caches]
    for seq in caches[0].seqs:
        for i in range(0, len(tokens), n_call):
            call = tokens[i:i + n_call]
            for c in _turns(len(caches), turn):
                begin = perf_counter_ns()
                caches[c].ctx.decode(call, seq)
                took[c].append(perf_counter_ns() - begin)
                tick(len(call))
            turn += 1
    return took


def _turns(n: int, first: int) -> list[int]:
    return [(first + i) % n for i in range(n)]


class Race:
    """A case. warm_up() once; then a repetition is prefill(), evict(), decode(), or rewind() and decode()."""

    def __init__(self, model: "_core.Model", case: Case, tokens: I32, tick: Tick) -> None:
        self.model, self.case, self.tokens, self.tick = model, case, tokens[:case.n_past], tick
        self.generated = np.resize(tokens, 1 + case.n_gen)  # which tokens does not matter, only how deep they are
        self.caches: dict[str, Cache] = {}
        self.peak_rss: int | None = None
        self.before: dict[str, Any] = {}  # stats of ours when its prefill begins
        self.stats: dict[str, Any] = {}   # and when its decode begins
        self.whole_ns = 0                 # of its last prefill, depth included
        self.prefill_ns: dict[str, list[int]] = {"ours": [], "full": []}              # a repetition
        self.decode_ns: dict[str, list[int]] = {"ours": [], "full": [], "short": []}
        self.call_costs: list[float] = []      # % that ours takes longer, a call of the timed prompt
        self.probe_ms: list[float] = []
        self.probe_pcts: list[float] = []      # of whole_ns
        self.evict_ms: list[float] = []
        self.evict_pcts: list[float] = []      # of whole_ns
        self.parts_ms: dict[str, list[float]] = {"score_ms": [], "plan_ms": [], "compact_ms": []}

    def warm_up(self) -> None:
        """A pass of ours before there is another cache: what memory it takes by itself."""
        watched = reset_peak_rss()
        ours = self.caches["ours"] = Cache(self.model, self.case, self.case.n_past, self.case.evicts)
        fill([ours], self.tokens, self.case.n_batch, self.tick)
        ours.probe(self.tokens)
        ours.end_prompt()
        self._generate(ours)
        self.peak_rss = peak_rss() if watched else None
        if self.case.evicts:
            full = self.caches["full"] = Cache(self.model, self.case, self.case.n_past, evicts=False)
            fill([full], self.tokens[:self.case.n_batch], self.case.n_batch, self.tick)

    def prefill(self, r: int) -> None:
        racing = {name: cache for name, cache in self.caches.items() if name != "short"}
        for cache in racing.values():
            cache.ctx.clear()
        self.before = self.caches["ours"].ctx.stats()
        how = self.case.n_batch, self.tick, r
        depth = fill([*racing.values()], self.tokens[:self.case.n_depth], *how)
        calls = fill([*racing.values()], self.tokens[self.case.n_depth:], *how)
        self.whole_ns = sum(depth[0]) + sum(calls[0])
        if self.case.n_prompt:
            for name, took in zip(racing, calls):
                self.prefill_ns[name].append(sum(took))
        if self.case.evicts:
            self.call_costs += [100*(ours/full - 1) for ours, full in zip(*calls)]

    def evict(self) -> None:
        ours = self.caches["ours"]
        probed = ours.probe(self.tokens)
        took = ours.end_prompt()
        self.stats = ours.ctx.stats()
        if ours.session is not None:
            self.probe_ms.append(probed/1e6)
            if self.whole_ns > 0:
                self.probe_pcts.append(100*probed/self.whole_ns)
        if self.case.evicts:
            self.evict_ms.append(took/1e6)
            if self.whole_ns > 0:
                self.evict_pcts.append(100*took/self.whole_ns)
            for part, ms in self.parts_ms.items():
                ms.append(self.stats[part] - self.before[part])

    def rewind(self) -> bool:
        """False where everything has to be filled again."""
        return bool(self.stats) and all([cache.rewind() for cache in self.caches.values()])

    def decode(self, r: int) -> None:
        if not self.case.n_gen:
            return
        if self.case.evicts:
            self._shorten()
        racing = [*self.caches.items()]
        for i in _turns(len(racing), r):
            name, cache = racing[i]
            self.decode_ns[name].append(self._generate(cache))

    def _shorten(self) -> None:
        if "short" in self.caches:
            self.caches["short"].rewind()
            return
        n_kept = round(mean(self.stats["kept"]))
        short = self.caches["short"] = Cache(self.model, self.case, n_kept, evicts=False)
        fill([short], self.tokens[:n_kept], self.case.n_batch, self.tick)

    def _generate(self, cache: Cache) -> int:
        cache.generate(self.generated[:1])  # not timed: the first token after an eviction builds its graph
        took = cache.generate(self.generated[1:])
        self.tick(len(self.generated)*len(cache.seqs))
        return took

    def row(self) -> Row:
        n_prompt, n_gen = self.case.n_parallel*self.case.n_prompt, self.case.n_parallel*self.case.n_gen
        prefill, decode, stats, ctx = self.prefill_ns, self.decode_ns, self.stats, self.caches["ours"].ctx
        cost = median_interval(self.call_costs)
        return {
            "flash_attn": ctx.flash_attn,  # as it turned out
            **rates("prefill", n_prompt, prefill["ours"]), **rates("decode", n_gen, decode["ours"]),
            **spread("prefill_ratio_full", [b/a for a, b in zip(prefill["ours"], prefill["full"])]),
            **spread("decode_ratio_full", [b/a for a, b in zip(decode["ours"], decode["full"])]),
            **spread("decode_ratio_short", [b/a for a, b in zip(decode["ours"], decode["short"])]),
            "prefill_cost_pct": median(self.call_costs) if self.call_costs else None,
            "prefill_cost_pct_low": cost[0], "prefill_cost_pct_high": cost[1], "prefill_cost_pct_samples": self.call_costs,
            **spread("probe_ms", self.probe_ms), **spread("probe_pct", self.probe_pcts),
            **spread("evict_ms", self.evict_ms), **spread("evict_pct", self.evict_pcts),
            **{part: median(ms) if ms else None for part, ms in self.parts_ms.items()},
            "n_evictions": stats["n_evictions"] - self.before["n_evictions"],
            "kept": stats["kept"], "n_kept": mean(stats["kept"]), "n_short": self.caches["short"].n_past if "short" in self.caches else None,
            "kv_cells_allocated": stats["cells_allocated"], "kv_cells_used": stats["cells_used"][0],
            "kv_bytes_allocated": stats["bytes_allocated"], "kv_bytes_used": stats["bytes_used"], "kv_bytes_full": stats["bytes_full"],
            "peak_rss": self.peak_rss,
            **rates("full_prefill", n_prompt, prefill["full"]), **rates("full_decode", n_gen, decode["full"]),
            **rates("short_decode", n_gen, decode["short"])}
