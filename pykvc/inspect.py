"""What an eviction keeps of a prompt, token by token: `pykvc inspect`.

    found = look(prompt, kv_policy="snapkv", kv_budget=0.25)
    found.kept                  # [n_layer, n_tokens] KV heads that hold each token
    found.regions()             # where the attention went, and what is left of it
    write(found, "out.html")    # a page; .png, .svg or .pdf: a picture

The prompt is evaluated twice: once with the whole cache, for the attention of its last queries, and once under the policy.
"""
import base64
import html
import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from . import options
from .llm import LLM
from .policy import F32, I32, Layer, Policy
from .spans import Span

WINDOW = 32
N_SINKS = 4  # first tokens, which models use as a place for attention that is not needed
PICTURES = (".png", ".svg", ".pdf")
KEPT, MASS = "#2f7de0", "#d9822b"  # as the page has them


class Attention(Policy):
    """Keeps everything; remembers what it was shown. Mean attention of the last `window` queries."""
    name = "attention"

    def __init__(self, window: int) -> None:
        self.window = window
        self.seen: list[F32] = []  # a layer [n_head, n_kv]

    def score(self, layer: Layer) -> F32:
        assert layer.attn is not None  # since window > 0
        self.seen.append(layer.attn.copy())
        return np.zeros((layer.n_head_kv, layer.n_kv), np.float32)


@dataclass(frozen=True)
class Inspection:
    """Tokens are the prompt's, then the question's. Layers are those that evict."""
    model: str
    policy: str                 # with every parameter
    budget: str                 # canonical, "" none
    pieces: list[str]           # [n_tokens] text; a character of several tokens stands in the first of them
    spans: list[Span]           # of tokens
    n_prompt: int               # tokens of the prompt; what follows is the question, evaluated after the eviction
    n_head_kv: int
    kept: I32                   # [n_layer, n_tokens] KV heads that hold the token
    mass: F32                   # [n_layer, n_tokens] attention of the last n_window queries, mean over heads; sums to 1 in each layer
    held: F32                   # [n_layer] share of the attention that fell on what its head kept
    n_window: int               # queries whose attention it is

    @property
    def n_tokens(self) -> int:
        return len(self.pieces)

    @property
    def kept_share(self) -> F32:
        """[n_tokens] share of layers and heads that hold it."""
        return (self.kept.sum(axis=0)/(self.kept.shape[0]*self.n_head_kv)).astype(np.float32)

    def parts(self) -> list[tuple[str, list[Span]]]:
        """What the tokens are divided into: (name, token ranges)."""
        ends = [0, *(end for _, end in self.spans)]
        gaps = [(a, b) for a, b in zip(ends, [*(begin for begin, _ in self.spans), self.n_prompt]) if a < b]
        if not self.spans:
            found = [("prompt", [(0, self.n_prompt)])]
        else:
            first, last = self.spans[0][0], self.spans[-1][1]
            found = [("before the spans", [gap for gap in gaps if gap[1] <= first]), ("spans", self.spans),
                     ("between the spans", [gap for gap in gaps if first < gap[0] and gap[1] < last]), ("after the spans", [gap for gap in gaps if gap[0] >= last])]
        return [part for part in [*found, ("question", [(self.n_prompt, self.n_tokens)])] if any(a < b for a, b in part[1])]

    def regions(self, il: int | None = None) -> list[dict[str, Any]]:
        """Of layer il, or the mean of all: name, n_tokens, kept and mass as shares. The first tokens, which are in
        another part, too, come last."""
        kept = self.kept_share if il is None else self.kept[il]/self.n_head_kv
        mass = self.mass.mean(axis=0) if il is None else self.mass[il]
        rows = []
        for name, ranges in [*self.parts(), (f"the first {N_SINKS} tokens, of the above", [(0, min(N_SINKS, self.n_tokens))])]:
            at = np.concatenate([np.arange(a, b) for a, b in ranges])
            rows.append({"name": name, "n_tokens": len(at), "kept": float(kept[at].mean()), "mass": float(mass[at].sum())})
        return rows


def attention(prompt: str, question: str = "", *, window: int = WINDOW, **how: Any) -> tuple[list[int], F32]:
    """(tokens, attention [n_layer, n_head, n_tokens] of the last `window` of them over all of them), with the whole
    cache. how: of LLM."""
    policy = Attention(options.whole("window", window, 1, 4096))
    with LLM(**{**how, "kv_policy": policy, "kv_budget": "100%", "kv_cells": None, "kv_decode_budget": None}) as llm:
        llm.prefill(prompt)
        if question:
            llm.prefill(question)
        policy.seen.clear()
        llm.scores()
        return list(llm._session.tokens), np.stack(policy.seen)


def survivors(prompt: str, question: str = "", *, spans: Sequence[Span] | None = None, span_unit: str = "tokens", segment: str | None = None,
              kv_query: str | None = None, **how: Any) -> tuple[LLM, list[I32]]:
    """(the LLM, open, kept() of it) once the prompt was evaluated and evicted, and the question evaluated after it."""
    llm = LLM(**how)
    try:
        asks = llm._session.probe.kind == "mean"
        llm.prefill(prompt, spans=spans, span_unit=span_unit, segment=segment, kv_query=kv_query or (question if question and asks else None))
        if llm._session.has_budget:
            llm.compress()
        if question:
            llm.prefill(question, spans=())
        return llm, llm.kept()
    except BaseException:
        llm.close()
        raise


def look(prompt: str, question: str = "", *, spans: Sequence[Span] | None = None, span_unit: str = "tokens", segment: str | None = None,
         kv_query: str | None = None, window: int = WINDOW, **how: Any) -> Inspection:
    """Evaluates and evicts a prompt, and says what became of it. question: evaluated after the eviction, which has not seen it
    (question-out). spans, segment, kv_query: as LLM.generate(). window: the last queries whose attention is shown. how: of LLM.
    ValueError for every mistake."""
    llm, kept = survivors(prompt, question, spans=spans, span_unit=span_unit, segment=segment, kv_query=kv_query, **how)
    with llm:
        session = llm._session
        tokens, n_question = list(session.tokens), len(llm.tokenize(question, add_special=False)) if question else 0
        pieces = texts([session.model.piece(token, True) for token in tokens])
        about = dict(model=llm.path.name, policy=llm.policy, budget=session.setup["kv_budget"], spans=list(session.spans), n_head_kv=kept[0].shape[0])
    _, attn = attention(prompt, question, window=window, **how)
    n_layer, n_head, n = attn.shape
    holds = np.stack([counts(layer, n) for layer in kept])  # [n_layer, n_head_kv, n]
    by_group = attn.reshape(n_layer, holds.shape[1], -1, n).mean(axis=2)
    return Inspection(**about, pieces=pieces, n_prompt=len(tokens) - n_question, kept=holds.sum(axis=1, dtype=np.int32), mass=attn.mean(axis=1),
                      held=(by_group*holds).sum(axis=2).mean(axis=1), n_window=min(window, n))


def counts(kept: I32, n: int) -> np.ndarray:
    """kept() of a layer -> bool [n_head_kv, n_tokens]: does the head hold the token?"""
    holds = np.zeros((kept.shape[0], n), bool)
    for head, positions in enumerate(kept):
        holds[head, positions[positions >= 0]] = True
    return holds


def texts(pieces: Sequence[bytes]) -> list[str]:
    """Tokens as text: a character that several make up stands in the first of them; bytes that are no UTF-8 as
    \\xNN."""
    owner = [i for i, piece in enumerate(pieces) for _ in piece]  # of each byte
    found, data, at = [""]*len(pieces), b"".join(pieces), 0
    for char in data.decode("utf-8", "surrogateescape"):
        n = len(char.encode("utf-8", "surrogateescape"))
        found[owner[at]] += char if char.isprintable() or char.isspace() else char.encode("unicode_escape").decode().replace("\\udc", "\\x")
        at += n
    return found


# -- files ----------------------------------------------------------------------------------------------------------------

def check_output(path: str | os.PathLike) -> Path:
    """ValueError if that is no file which write() can make."""
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm", *PICTURES):
        raise ValueError(f"the output is a page (.html) or a picture ({', '.join(PICTURES)}), not {str(path)!r}")
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ValueError(f"cannot write {path}: {'it is a folder' if path.is_dir() else 'there is no such folder'}")
    if path.suffix.lower() in PICTURES:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ValueError("a picture needs matplotlib: `pip install matplotlib`, or write a page (.html)") from None
    return path


def write(found: Inspection, path: str | os.PathLike) -> None:
    """A page that needs nothing else, or a picture, by the name's ending."""
    path = check_output(path)
    try:
        if path.suffix.lower() in PICTURES:
            _draw(found, path)
        else:
            path.write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def page(found: Inspection) -> str:
    """The HTML. The data are JSON in it, so nothing of the prompt is ever read as HTML."""
    scale = float(found.mass.max()) or 1.0
    data = {"model": found.model, "policy": found.policy, "budget": found.budget, "pieces": found.pieces, "spans": found.spans,
            "n_prompt": found.n_prompt, "n_head_kv": found.n_head_kv, "n_layer": len(found.kept), "n_window": found.n_window,
            "kept": _base64(found.kept.astype("<u2")), "mass": _base64(np.round(found.mass/scale*65535).astype("<u2")), "mass_scale": scale,
            "held": [round(float(x), 4) for x in found.held], "regions": [found.regions(), *(found.regions(il) for il in range(len(found.kept)))]}
    text = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    template = resources.files("pykvc").joinpath("inspect.html").read_text(encoding="utf-8")
    title = html.escape(f"{found.policy.partition(':')[0]} {found.budget} on {found.model}")
    return template.replace("__TITLE__", title).replace("__DATA__", text)


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _draw(found: Inspection, path: Path) -> None:
    """Above: which layers keep what. Below: where the attention of the last queries goes, and the parts of the
    prompt."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = plt.figure(figsize=(9, 5.2), layout="constrained")
    top, mass, bars = figure.subplot_mosaic([["map", "map"], ["mass", "bars"]], width_ratios=[2.2, 1], height_ratios=[1.25, 1]).values()
    n = found.n_tokens
    image = top.imshow(found.kept/found.n_head_kv, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest",
                       extent=(0, n, len(found.kept) - 0.5, -0.5))
    top.set(ylabel="layer", xlabel="token of the prompt", title=f"{found.policy.partition(':')[0]} {found.budget}, {found.model}: share of KV heads that keep a token")
    figure.colorbar(image, ax=top)
    for at in (top, mass):
        for begin, end in found.spans if len(found.spans) <= 64 else []:
            at.axvline(begin, color="#a59f90", linewidth=0.5)
            at.axvline(end, color="#a59f90", linewidth=0.5)
        if found.n_prompt < n:
            at.axvline(found.n_prompt, color=MASS, linewidth=1)
    mean, share = found.mass.mean(axis=0), found.kept_share
    mass.vlines(np.arange(n) + 0.5, 1e-7, np.maximum(mean, 1e-7), colors=plt.get_cmap("Blues")(0.25 + 0.75*share), linewidth=max(0.4, min(3, 300/n)))
    mass.set(yscale="log", xlim=(0, n), ylim=(max(1e-6, float(np.quantile(mean, 0.02))), 1), xlabel="token of the prompt",
             ylabel="share of the attention", title=f"last {found.n_window} queries; {100*found.held.mean():.0f} % falls on what is kept")
    rows = found.regions()
    y = np.arange(len(rows))
    bars.barh(y - 0.2, [row["kept"] for row in rows], 0.38, color=KEPT, label="kept")
    bars.barh(y + 0.2, [row["mass"] for row in rows], 0.38, color=MASS, label="attention")
    bars.set(yticks=y, xlim=(0, 1), title="by part")
    bars.set_yticklabels([row["name"].replace(", ", "\n") + f" ({row['n_tokens']})" for row in rows], fontsize=8)
    bars.invert_yaxis()
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
