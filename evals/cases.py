"""What is compared: every combination of policy, budget, cells and cache types, checked at the door."""
import itertools
from dataclasses import dataclass, replace
from typing import Sequence

from pykvc import _core, options
from pykvc.probe import N_REQUEST

PROTOCOLS = ("question-in", "question-out")
SAME = "same"


@dataclass(frozen=True)
class Case:
    """One configuration of LLM; everything in its canonical form. full has no budget and no cells."""
    policy: str = "full"
    budget: str = ""
    decode_budget: str = ""
    cells: str = ""
    type_k: str = "f16"
    type_v: str = "f16"

    @property
    def name(self) -> str:
        return self.policy.partition(":")[0]

    @property
    def compresses(self) -> bool:
        """Is there something to evict the prompt to?"""
        return bool(self.budget or self.cells)

    @property
    def asks(self) -> bool:
        """Does it have to know the question when the context is evaluated?"""
        return options.needs(self.policy)["probe"] == "mean"

    @property
    def probes(self) -> bool:
        """Does it have something evaluated after the context, and taken out again?"""
        return options.needs(self.policy)["probe"] != "none"

    def n_probe(self, n_ubatch: int) -> int:
        """Cells to leave behind a context for what is evaluated there. With kv_cells it has room of its own."""
        if not self.probes or self.cells:
            return 0
        return max(n_ubatch, options.parameter(self.policy, "chunk") + N_REQUEST)

    def serves(self, other: "Case") -> bool:
        """Can a context evaluated for this one be evicted as `other`, with the same outcome as in its own? Sums of
        attention turn flash attention off, and a probe takes cells."""
        ours, theirs = options.needs(self.policy), options.needs(other.policy)
        return (not _core.lacks(self.policy, other.policy) and ours["sums"] == theirs["sums"]
                and ours["spans"] >= theirs["spans"] and self.n_probe(0) == other.n_probe(0))

    @property
    def budgets(self) -> dict:
        """Keywords of LLM.generate() and compress()."""
        return dict(kv_budget=self.budget or None, kv_decode_budget=self.decode_budget or None)

    def settings(self) -> dict:
        """Keywords of LLM."""
        return dict(kv_policy=self.policy, **self.budgets, kv_cells=self.cells or None, type_k=self.type_k,
                    type_v=self.type_v)

    def label(self) -> str:
        parts = [self.policy, self.budget and f"budget {self.budget}",
                 self.decode_budget and f"decode {self.decode_budget}", self.cells and f"cells {self.cells}",
                 (self.type_k, self.type_v) != ("f16", "f16") and f"{self.type_k}/{self.type_v}"]
        return ", ".join(part for part in parts if part)


def cases(policy: Sequence[str], budget: Sequence[str], decode_budget: Sequence[str], cells: Sequence[str],
          type_k: Sequence[str], type_v: Sequence[str]) -> list[Case]:
    """Every combination, full once. "none" is no budget, or as many cells as tokens; a decode_budget "same" is the
    budget's value. ValueError names what is valid."""
    def none(value: str) -> str | None:
        return None if value.lower() in ("none", "") else value
    checked = ([_core.parse_spec(spec) for spec in policy],
               [options.budget("--budget", none(value)) for value in budget],
               [SAME if value == SAME else options.budget("--decode-budget", none(value)) for value in decode_budget],
               [options.cells(none(value)) for value in cells],
               [options.cache_type("--type-k", value) for value in type_k],
               [options.cache_type("--type-v", value) for value in type_v])
    found = []
    for case in itertools.starmap(Case, itertools.product(*checked)):
        if case.decode_budget == SAME:
            case = replace(case, decode_budget=case.budget)
        if case.name == "full":
            case = replace(case, budget="", decode_budget="", cells="")
        elif not (case.budget or case.decode_budget or case.cells):
            raise ValueError(f"{case.name} evicts nothing without a budget: give --budget (tokens, or a retained ratio "
                             "in (0, 1]), --decode-budget or --cells")
        found.append(case)
    return list(dict.fromkeys(found))


def exceeds(n: int, budget: str) -> bool:
    """Do n tokens have to be evicted to stay in the budget?"""
    kind, amount = _core.parse_budget(budget)
    return (amount if kind == "tokens" else amount*n) < n


def protocols(given: Sequence[str]) -> list[str]:
    for name in given:
        if name not in PROTOCOLS:
            raise ValueError(f"--protocol is {' or '.join(PROTOCOLS)}, not {name!r}")
    return list(dict.fromkeys(given))
