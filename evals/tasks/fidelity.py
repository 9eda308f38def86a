"""How far the next token's distribution moves: KL divergence from the whole cache, and how often both have the same first choice.

No data set: any text, in niah/haystack/*.txt of the data folder. A context of --length tokens is evaluated and evicted, a sentence or
two follow as the question, and then --tokens tokens of the text, teacher-forced: after each, the distribution is compared with that of
a cache that keeps everything (same types). The score is the share of equal first choices; KL is in nats, a mean over tokens.
"""
import json
from time import perf_counter
from typing import Any, Iterator

import numpy as np

import pykvc
from pykvc.spans import sentence_spans

from ..cases import Case
from ..items import Item, Options
from .niah import haystacks

SETTINGS = {"length": 2000, "tokens": 64}
N_QUESTION = 32  # tokens at least
N_DEFAULT = 16


def load(options: Options) -> list[Item]:
    texts = [_chunks(path.read_text(encoding="utf-8"), path.stem, options) for path in haystacks("fidelity", options)]
    items = [item for of_round in zip(*texts) for item in of_round][:options.n or N_DEFAULT]
    if not items:
        raise ValueError(f"the texts are shorter than --length {options['length']} tokens")
    return items


def _chunks(text: str, name: str, options: Options) -> Iterator[Item]:
    lengths = (options["length"], N_QUESTION, options["tokens"] + 8)
    parts, tokens, begin = [], 0, 0
    for a, b in sentence_spans(text):
        tokens += options.count(text[a:b])
        if tokens >= lengths[len(parts)]:
            parts.append(text[begin:b])
            tokens, begin = 0, b
        if len(parts) == 3:
            yield Item(id=f"{name}/{options['length']}/{options['tokens']}/{begin}", context=parts[0], question=parts[1], query="", chat=False,
                       gold=parts[2], max_tokens=options["tokens"] + 64)
            parts = []


def ask(llm: pykvc.LLM, group: list, protocol: str, case: Case, n_threads: int | None) -> Iterator[tuple[Item, dict[str, Any]]]:
    """In place of answers: for each teacher-forced token the KL divergence and whether the first choice is the same, as JSON."""
    for item, prompt in group:
        with pykvc.LLM(llm.path, n_ctx=llm.n_ctx, n_threads=n_threads, type_k=case.type_k, type_v=case.type_v) as full:
            full.prefill(prompt.head)
            full.prefill(prompt.tail)
            llm.reset()
            before, begin = llm.stats()["n_evictions"], perf_counter()
            query = dict(kv_query=prompt.query) if case.asks else {}
            n_context = llm.prefill(prompt.head, spans=prompt.spans, span_unit="chars", **query)
            n_prompt = n_context + len(llm.tokenize(prompt.tail, add_special=False))
            if protocol == "question-in":
                llm.prefill(prompt.tail)
            middle = perf_counter()
            if case.compresses:
                llm.compress()
            end, kept = perf_counter(), [int(n) for n in llm.stats()["kept"]]
            if protocol == "question-out":
                llm.prefill(prompt.tail)
            kl, same, ids = [], [], llm.tokenize(item.gold, add_special=False)[:item.max_tokens - 64]
            for token in ids:
                for one in (full, llm):
                    one.prefill(tokens=[token])
                p, q = _log_softmax(full.logits()), _log_softmax(llm.logits())
                kl.append(round(max(0.0, float(np.sum(np.exp(p)*(p - q)))), 6))
                same.append(int(p.argmax() == q.argmax()))
            stats = llm.stats()
            yield item, {"n_context": n_context, "n_prompt": n_prompt, "n_predicted": len(ids), "kept": kept, "evictions": stats["n_evictions"] - before,
                         **{name: stats[name] for name in ("cells_allocated", "bytes_used", "bytes_full", "bytes_allocated")},
                         "prefill_ms": round(1e3*(middle - begin), 1), "evict_ms": round(1e3*(end - middle), 1),
                         "decode_ms": round(1e3*(perf_counter() - end), 1), "stop_reason": "length", "answer": json.dumps({"kl": kl, "same": same})}


def score(item: Item, answer: str) -> float:
    same = json.loads(answer)["same"] if answer else []
    return sum(same)/len(same) if same else 0.0


def extra(answer: str) -> dict[str, float]:
    """More columns of the report."""
    return {"kl": float(np.mean(json.loads(answer)["kl"]))}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64) - logits.max()
    return x - np.log(np.exp(x).sum())
