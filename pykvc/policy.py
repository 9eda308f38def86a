"""An eviction policy written in Python: subclass `Policy`, write `score`, pass an instance as `kv_policy`.

    class NewestHeavy(pykvc.Policy):
        name, window, sinks, recent = "newest_heavy", 16, 4, 16

        def score(self, layer):                    # higher is kept longer
            return layer.attn.reshape(layer.n_head_kv, -1, layer.n_kv).mean(axis=1)

    llm = pykvc.LLM(kv_policy=NewestHeavy(), kv_budget=256)

It runs like a built-in one: the engine gathers the signals that the class attributes ask for, calls `score` once per
layer, `budgets` once and `keep` once per layer, and moves cells only when the whole plan is known. An exception in
any of them ends the call that evicted, and nothing was moved. docs/adding-a-policy.md has a worked example.
"""
import re
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """One layer as `score` sees it. Slots count the cells that a KV head still holds, oldest first."""
    il: int           # 0 .. n_layer - 1, among the layers that evict
    n_layer: int
    n_kv: int         # slots
    n_head: int       # query heads; head h belongs to KV head h // (n_head // n_head_kv)
    n_head_kv: int
    head_dim: int
    n_query: int      # queries the window or the fit really had, <= Policy.window
    value_dim: int    # of a value: head_dim in most models
    budget: int       # slots a head is to keep on average; n_kv where nothing is to be evicted
    pos: I32          # [n_head_kv, n_kv] original position of each slot, ascending; -1, first: empty (heads_differ), its score is not asked
    attn: F32 | None  # [n_head, n_kv] attention of the last queries, weighted mean over them; None unless window > 0
    sums: F32 | None  # [n_head_kv, n_kv] attention summed over every query so far, mean over the group; None unless sums
    keys: F32 | None  # [n_head_kv, n_kv, head_dim] rotated as they lie in the cache; None unless keys
    q_mean: F32 | None  # [n_head, head_dim] mean of the expected queries: keys . q_mean are logits; None unless future > 0
    q_cov: F32 | None   # [n_head, head_dim, head_dim] their covariance; None unless future > 0
    v_norm: F32 | None  # [n_head_kv, n_kv] L2 norm of each slot's value; None unless values
    o_norm: F32 | None  # [n_head, n_kv] L2 norm of W_O^h v, W_O^h the head's slice of the output projection; None unless outputs
    attn_rows: F32 | None   # [n_head, n_query, n_kv] attention of each query, oldest first, instead of attn; None unless attn_rows
    value_rows: F32 | None  # [n_head_kv, n_kv, value_dim] the values; None unless value_rows


@dataclass(frozen=True)
class LayerPlan:
    """One layer as `budgets` and `keep` see it."""
    n_kv: int         # slots now
    n_frozen: int     # the first slots, which stay whatever happens (a frozen prompt); 0 at the prompt's end
    pos: I32          # [n_head_kv, n_kv]
    score: F32        # [n_head_kv, n_kv] what score() returned


@dataclass(frozen=True)
class Request:
    """What is to be evicted."""
    prompt: bool      # tokens of the prompt are evicted; False: generated tokens are over their budget
    room: bool        # because kv_cells are full, maybe in mid-prompt
    budget: int       # slots to keep in a layer, the mean over layers, frozen ones included
    layers: list[LayerPlan]
    spans: list[tuple[int, int]]  # original positions [begin, end), ascending, disjoint; empty unless Policy.spans


ASKED = {"attn": "window", "sums": "sums", "keys": "keys", "q_mean": "window and future", "q_cov": "window and future",
         "v_norm": "values", "o_norm": "outputs", "attn_rows": "window and attn_rows",
         "value_rows": "value_rows"}  # fields of Layer, and the attributes of a Policy that ask for them
N_MOST = 2**20  # tokens of a window and of what is always kept


class Policy:
    """Base class. Only `name` and `score` are required; `__init__` may set the attributes on the instance."""
    name: ClassVar[str] = ""  # as it stands in stats and state files: two policies of one name must be the same
    window: int = 0           # attention of the last `window` queries, at no cost to flash attention
    newest: float = 1.0       # their weights: 1 for the oldest query, linear up to this for the newest
    future: int = 0           # > 0: not their attention, but a Gaussian fit of them, rotated as on average at the next `future` positions
    sums: bool = False        # attention summed over all queries; turns flash attention off
    keys: bool = False        # the keys themselves
    values: bool = False      # the norms of the values
    outputs: bool = False     # the norms of what the values become behind the output projection
    attn_rows: bool = False   # the attention of each of the window's queries, not their mean
    value_rows: bool = False  # the values themselves
    spans: bool = False       # units given by the caller; sentences when none are given
    sinks: int = 0            # the first slots, always kept and counted in the budget
    recent: int = 0           # the last slots, always kept and counted in the budget
    decode: Literal["none", "whole", "generated"] = "none"
    # generated tokens: never evicted | all cells compete | only they compete, the prompt is frozen
    share: Literal["head", "layers", "layer", "all"] = "head"
    # how far one ranking of score() reaches: every head keeps as many | all layers' scores say how long each layer is | heads of a
    # layer differ | all heads differ. Only where budgets() and keep() are not overridden; with "layer" and "all" as heads_differ.
    heads_differ: bool = False
    # KV heads of a layer may keep different numbers, request.budget on average; a head takes the rows it keeps. budgets() says how
    # many the longest head of each layer keeps; a shorter head's list in keep() begins with -1s. Needs decode "none", and the CPU.

    _overrides: ClassVar[frozenset[str]] = frozenset()  # which optional methods the engine is to call

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._overrides = frozenset(m for m in ("budgets", "keep") if getattr(cls, m) is not getattr(Policy, m))

    def score(self, layer: Layer) -> F32:
        """F32 [n_head_kv, n_kv], higher is kept longer; equal scores go to the older slot. No NaN."""
        raise NotImplementedError

    def budgets(self, request: Request) -> list[int]:
        """[n_layer] slots each layer keeps: their sum is n_layer * request.budget, none more than the layer has.
        heads_differ: the slots of each layer's longest head, whatever their sum.

        Not overridden: the same for every layer."""
        raise NotImplementedError

    def keep(self, layer_index: int, request: Request, n_keep: int) -> I32:
        """I32 [n_head_kv, n_keep] slots to keep of a layer, ascending in each head. heads_differ: -1s first in a head that keeps fewer.

        Not overridden: n_frozen, sinks and recent, then the best scores."""
        raise NotImplementedError

    # -- what the engine calls: dicts of numpy arrays in, checked arrays out --------------------------------------

    def _check(self) -> None:
        """ValueError names the attribute that is wrong. LLM calls this before the engine sees the policy."""
        def refuse(attribute: str, valid: str) -> None:
            raise ValueError(f"{type(self).__name__}.{attribute} is {valid}, not {getattr(self, attribute)!r}")
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            refuse("name", "a word of a-z, 0-9 and _")
        for attribute in ("window", "future", "sinks", "recent"):
            value = getattr(self, attribute)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                refuse(attribute, "a number of tokens >= 0")
        for attribute in ("sums", "keys", "values", "outputs", "attn_rows", "value_rows", "spans", "heads_differ"):
            if not isinstance(getattr(self, attribute), bool):
                refuse(attribute, "True or False")
        if self.future > 0 and self.window == 0:
            refuse("window", f"the number of queries that future = {self.future} asks a fit of, > 0")
        if self.attn_rows and (self.window == 0 or self.future > 0):
            refuse("attn_rows", "False where there is no window of queries, or only a fit of it")
        if not isinstance(self.newest, (int, float)) or not self.newest > 0:
            refuse("newest", "a weight > 0")
        if self.share not in ("head", "layers", "layer", "all"):
            refuse("share", "'head', 'layers', 'layer' or 'all'")
        if self.share != "head" and self._overrides:
            raise ValueError(f"{type(self).__name__} has {' and '.join(sorted(self._overrides))} of its own, so share is 'head'")
        if self.decode not in ("none", "whole", "generated"):
            refuse("decode", "'none', 'whole' or 'generated'")
        for attribute in ("window", "future", "sinks", "recent"):
            if getattr(self, attribute) > N_MOST:
                refuse(attribute, f"at most {N_MOST} tokens")
        if type(self).score is Policy.score:
            raise ValueError(f"{type(self).__name__} has no score(self, layer): it returns F32 [n_head_kv, n_kv]")

    def _score(self, view: dict[str, Any]) -> F32:
        layer = _record(Layer, view)
        try:
            given = self.score(layer)
        except (AttributeError, TypeError) as error:
            if "NoneType" not in str(error):
                raise
            raise ValueError(f"{self.name}.score(): {error}; {_unasked(layer)}") from error
        if given is None:
            raise ValueError(f"{self.name}.score() returned None; {_unasked(layer)}")
        score = self._array("score", given, (layer.n_head_kv, layer.n_kv), np.float32)
        if np.isnan(score).any():
            raise ValueError(f"{self.name}.score() returned NaN for layer {layer.il}")
        return score

    def _budgets(self, view: dict[str, Any]) -> list[int]:
        request = _request(view)
        n_layer = len(request.layers)
        budgets = self._array("budgets", self.budgets(request), (n_layer,), np.int32)
        if not self.heads_differ and budgets.sum() != n_layer * request.budget:
            raise ValueError(f"{self.name}.budgets() add up to {budgets.sum()}, not {n_layer} layers x {request.budget}")
        for il, (n_keep, layer) in enumerate(zip(budgets, request.layers)):
            if not max(1, layer.n_frozen) <= n_keep <= layer.n_kv:
                raise ValueError(f"{self.name}.budgets() gives layer {il} {n_keep} slots; it has {layer.n_kv}, "
                                 f"of which {layer.n_frozen} are frozen")
        return budgets.tolist()

    def _keep(self, view: dict[str, Any], il: int, n_keep: int) -> I32:
        request = _request(view)
        layer = request.layers[il]
        slots = self._array("keep", self.keep(il, request, n_keep), (layer.pos.shape[0], n_keep), np.int32)
        empty = slots < 0 if self.heads_differ else np.zeros(slots.shape, bool)
        if slots.min() < -self.heads_differ or slots.max() >= layer.n_kv or ((np.diff(slots, axis=1) <= 0) & ~empty[:, :-1]).any():
            raise ValueError(f"{self.name}.keep() returns slots of [0, {layer.n_kv}), ascending in each head, each once")
        return slots

    def _array(self, method: str, value: Any, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        try:
            array = np.asarray(value)
        except ValueError:
            array = np.empty(0)
        if array.shape != shape or not np.issubdtype(array.dtype, np.number):
            raise ValueError(f"{self.name}.{method}() returns an array {list(shape)}, not {array.dtype} {list(array.shape)}")
        if dtype is np.int32 and not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{self.name}.{method}() returns whole numbers, not {array.dtype}")
        return np.ascontiguousarray(array, dtype=dtype)


def _record(cls: type, view: dict[str, Any]) -> Any:
    return cls(**{f.name: view[f.name] for f in fields(cls)})


def _unasked(layer: Layer) -> str:
    """What is None in a layer, and what would have it there."""
    missing = [name for name in ASKED if getattr(layer, name) is None]
    return "None here: " + ", ".join(f"layer.{name} (set {ASKED[name]})" for name in missing)


def _request(view: dict[str, Any]) -> Request:
    layers = [_record(LayerPlan, layer) for layer in view["layers"]]
    return Request(view["prompt"], view["room"], view["budget"], layers, [tuple(span) for span in view["spans"]])
