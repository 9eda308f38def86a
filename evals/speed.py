"""What eviction costs and gains, as ratios inside one run: python evals/speed.py [-m MODEL.gguf] [-p 7000] [--kv-budget 512]

Prefill of stock (policy full, which adds nothing to llama.cpp's graph) and of a policy alternate ubatch by ubatch, then one
eviction, then decode alternates in rounds: the compacted cache, stock holding only the budget, stock holding the prompt.
"""
import argparse
import statistics
import time

import numpy as np

from pykvc import _core
from pykvc.models import resolve

TEXT = "The river rose in the night and took the lower bridge, so the carts went round by the mill. "


def timed(fn, *args) -> float:
    begin = time.perf_counter()
    fn(*args)
    return time.perf_counter() - begin


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-m", "--model")
    p.add_argument("-p", "--n-prompt", type=int, default=7000)
    p.add_argument("-n", "--n-gen", type=int, default=32, help="tokens a round and cache")
    p.add_argument("-r", "--repetitions", type=int, default=5)
    p.add_argument("-t", "--threads", type=int, default=0)
    p.add_argument("-f", "--file", help="text to evaluate")
    p.add_argument("--kv-policy", default="snapkv")
    p.add_argument("--kv-budget", type=int, default=512)
    a = p.parse_args()

    model = _core.Model(str(resolve(a.model)))
    text = open(a.file).read() if a.file else TEXT*(a.n_prompt//15)
    tokens = np.array(model.tokenize(text.encode()), np.int32)[:a.n_prompt]
    n_ctx = -(-(len(tokens) + a.n_gen*(a.repetitions + 1) + 64)//256)*256

    def context(policy, budget=""):
        return _core.Context(model, n_ctx=n_ctx, n_batch=512, n_threads=a.threads, policy=policy, budget=budget)

    stock, ours, short = context("full"), context(a.kv_policy, str(a.kv_budget)), context("full")
    pre = {"stock": 0.0, "ours": 0.0}
    ratios = []
    for i in range(0, len(tokens), 512):
        pair = [("stock", stock), ("ours", ours)]
        took = {name: timed(c.decode, tokens[i:i + 512]) for name, c in (pair if i//512 % 2 else pair[::-1])}
        ratios.append(took["ours"]/took["stock"])
        for name, t in took.items():
            pre[name] += t
    short.decode(tokens[:a.kv_budget])
    evict = timed(ours.evict)
    st = ours.stats()

    rates = {"compacted": [], "stock short": [], "stock full": []}
    caches = dict(zip(rates, (ours, short, stock)))
    for r in range(a.repetitions + 1):  # the first round warms up
        for name, c in caches.items():
            t = timed(lambda: [c.decode(tokens[j:j + 1]) for j in range(a.n_gen)])
            if r:
                rates[name].append(a.n_gen/t)
    med = {name: statistics.median(v) for name, v in rates.items()}

    print(f"{model.desc}, {len(tokens)} tokens, {a.kv_policy} -> {a.kv_budget}, {_core.system_info()}")
    print(f"prefill        stock {len(tokens)/pre['stock']:.1f} t/s, with the tap {len(tokens)/pre['ours']:.1f} t/s; "
          f"cost {100*(pre['ours']/pre['stock'] - 1):+.2f} % in all, {100*(statistics.median(ratios) - 1):+.2f} % in the median ubatch")
    print(f"eviction       {1e3*evict:.1f} ms = {100*evict/pre['ours']:.2f} % of prefill "
          f"(score {st['score_ms']:.1f}, plan {st['plan_ms']:.1f}, compact {st['compact_ms']:.1f})")
    print(f"decode t/s     " + ", ".join(f"{n} {med[n]:.1f} ({min(v):.1f} to {max(v):.1f})" for n, v in rates.items()))
    print(f"decode ratio   {med['compacted']/med['stock short']:.3f} of stock at {a.kv_budget}, {med['compacted']/med['stock full']:.2f}x stock at {len(tokens)}")
    print(f"bytes          {st['bytes_used']/2**20:.1f} of {st['bytes_full']/2**20:.1f} MiB in use")


if __name__ == "__main__":
    main()
