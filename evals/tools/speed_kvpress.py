"""How fast are llama.cpp, pykvc and kvpress 0.5.5 on the same weights? By hand, not in CI: it needs torch.

    pip install '.[kvpress]' && python evals/tools/speed_kvpress.py --model smollm2-135m.gguf --tokens 2000,4000,7000

In one process, taking turns, --rounds times: a prompt of --tokens is evaluated, SnapKV (window 64, kernel 5) leaves
--budget of it, --generate tokens follow. The rows:

- llama.cpp: no policy, and ggml's own attention and matrix products (PYKVC_STOCK_ATTENTION, PYKVC_STOCK_MATRIX): its
code, bit for bit. - pykvc full: no policy. pykvc: evicts at the prompt's end. pykvc bounded: in --budget + n_ubatch
cells. - kvpress full, kvpress: transformers in float32, weights dequantised from the same GGUF, attention "sdpa".

Medians of t/s. The prefill of a row that evicts has the eviction in it: kvpress evicts inside its forward pass.
"""
import argparse
import os
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Callable

import numpy as np

from compare_kvpress import KERNEL, WINDOW, load_hf, read_tokens

N_UBATCH = 512
STOCK = ("PYKVC_STOCK_ATTENTION", "PYKVC_STOCK_MATRIX")


def llama_cpp(path: Path, tokens: np.ndarray, n_gen: int, n_threads: int, stock: bool = False,
              **policy: str) -> Callable[[], tuple[float, float]]:
    """() -> seconds of the prefill and of n_gen tokens."""
    from pykvc import _core
    model = _core.Model(str(path))
    ctx = _core.Context(model, n_ctx=len(tokens) + n_gen + 1, n_batch=N_UBATCH, n_ubatch=N_UBATCH, n_threads=n_threads,
                        flash_attn="on", **policy)

    def run() -> tuple[float, float]:
        if stock:
            os.environ |= {name: "1" for name in STOCK}
        ctx.clear()
        begin = perf_counter()
        ctx.decode(tokens)
        if policy:
            ctx.evict()
            ctx.end_prompt()
        prefill = perf_counter() - begin
        ctx.decode(tokens[:1])  # builds the graph
        begin = perf_counter()
        for token in tokens[:n_gen]:
            ctx.decode(np.array([token], np.int32))
        for name in STOCK:
            os.environ.pop(name, None)
        return prefill, perf_counter() - begin
    return run


def kvpress(model, tokens: np.ndarray, n_gen: int, budget: int) -> Callable[[], tuple[float, float]]:
    """budget 0: no press."""
    import torch
    from contextlib import nullcontext
    from kvpress import SnapKVPress
    from transformers import DynamicCache
    ids = torch.from_numpy(tokens[None].astype(np.int64))

    @torch.no_grad()
    def run() -> tuple[float, float]:
        cache, n = DynamicCache(), len(tokens)
        begin = perf_counter()
        with SnapKVPress(1 - (budget + 0.5)/n, WINDOW, KERNEL)(model) if budget else nullcontext():
            model(ids, past_key_values=cache, logits_to_keep=1)
        prefill = perf_counter() - begin
        assert cache.get_seq_length() == (budget or n)
        took = []
        for i in range(n_gen + 1):
            begin = perf_counter()
            model(ids[:, i:i + 1], past_key_values=cache, position_ids=torch.tensor([[n + i]]))
            took.append(perf_counter() - begin)
        return prefill, sum(took[1:])
    return run


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--model", type=Path, required=True, help="a GGUF of the llama or qwen2 architecture")
    cli.add_argument("--tokens", default="2000,4000,7000", help="prompt lengths, with commas")
    cli.add_argument("--budget", type=int, default=512, help="tokens kept a layer")
    cli.add_argument("--generate", type=int, default=16)
    cli.add_argument("--rounds", type=int, default=1)
    cli.add_argument("--threads", type=int, default=os.cpu_count())
    cli.add_argument("--text", type=Path, help="read the prompt from this file instead of made-up prose")
    args = cli.parse_args()
    import torch
    torch.set_num_threads(args.threads)
    lengths = [int(n) for n in args.tokens.split(",")]
    tokens, hf = read_tokens(args.model, max(lengths), args.text), load_hf(args.model)
    spec = dict(policy=f"snapkv:window={WINDOW},kernel={KERNEL}", budget=str(args.budget))
    print("| tokens | | prefill t/s | / kvpress | / llama.cpp | decode t/s | / kvpress | / llama.cpp |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for n in lengths:
        how = args.model, tokens[:n], args.generate, args.threads
        rows = {"llama.cpp": llama_cpp(*how, stock=True), "pykvc full": llama_cpp(*how),
                "pykvc": llama_cpp(*how, **spec),
                "pykvc bounded": llama_cpp(*how, cells=str(args.budget + N_UBATCH), **spec),
                "kvpress full": kvpress(hf, tokens[:n], args.generate, 0),
                "kvpress": kvpress(hf, tokens[:n], args.generate, args.budget)}
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
        for _ in range(args.rounds):
            for name, run in rows.items():
                took[name].append(run())
        prefill, decode = ({name: median(count/seconds[i] for seconds in runs) for name, runs in took.items()}
                           for i, count in enumerate((n, args.generate)))
        for name in rows:
            cells = (f"{of[name]:.1f} | {of[name]/of['kvpress']:.2f} | {of[name]/of['llama.cpp']:.2f}"
                     for of in (prefill, decode))
            print(f"| {n} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
