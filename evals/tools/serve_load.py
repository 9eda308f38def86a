"""Many clients at once against a llama-server: does each get its own answer, does memory stay flat, how long does the
first token take?

python evals/tools/serve_load.py --requests 500                                         # pykvc serve, 4 slots, 25 % of
each prompt
    python evals/tools/serve_load.py --requests 500 --server PATH --flags "-c 32768 -np 4"   # another llama-server

llama-server keeps past prompts in RAM (--cache-ram, 8 GiB unless told otherwise), so memory is flat once that is full:
it is 256 MiB here.

Requests have 100 to --longest tokens; of ten, two branch off an earlier prompt, one is cancelled after its first words,
one is invalid. A grammar makes each answer begin with the number that its prompt has: another number would be another
slot's text. One JSON object.
"""
import argparse
import json
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pykvc import models, prose

# run as a file: ./pykvc, without its compiled half, is not first
sys.path.append(str(Path(__file__).resolve().parents[2]))

from evals.tools.served import Server  # noqa: E402

KINDS = ("new",)*6 + ("branch",)*2 + ("cancel", "invalid")


@dataclass
class Outcome:
    kind: str
    n_prompt: int = 0
    n_answer: int = 0
    first_ms: float = 0.0
    wrong: str = ""        # what should not have happened
    at: float = 0.0        # s since the start


def prompts(n: int, longest: int, seed: int) -> list[tuple[str, str]]:
    """(kind, prompt) of n requests; a sentence of this prose has about 17 tokens."""
    draw = random.Random(seed)
    res: list[tuple[str, str]] = []
    for i in range(n):
        kind = draw.choice(KINDS)
        text = prose.prose(int(draw.uniform(100, longest)/17), seed=seed + i)
        if kind == "branch" and res:
            before = draw.choice(res)[1]
            text = before[:int(len(before)*draw.uniform(0.3, 0.9))] + text[:500]
        res.append((kind, f"{text}\nThe number is {i}. Repeat the number and write a sentence:"))
    return res


def ask(server: Server, i: int, kind: str, prompt: str, n_predict: int, start: float) -> Outcome:
    done = Outcome(kind)
    body = {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "grammar": f'root ::= " {i}." [ a-zA-Z,]*',
            "ignore_eos": True}
    try:
        if kind == "invalid":
            status, reply = server.post("/completion", {**body, "n_predict": "many"})
            done.wrong = "" if status == 400 else f"an invalid request got {status}"
            return done
        begin = time.perf_counter()
        connection, events = server.stream("/completion", body)
        text = ""
        for event in events:
            if "error" in event:
                done.wrong = event["error"]["message"]
                break
            if event.get("content") and not text:
                done.first_ms = 1e3*(time.perf_counter() - begin)
                if kind == "cancel":
                    break
            text += event.get("content", "")
            if event.get("stop"):
                done.n_prompt, done.n_answer = event["tokens_evaluated"], event["tokens_predicted"]
        events.close()
        connection.close()
        if kind != "cancel" and not done.wrong and not f"{text} ".startswith(f" {i}."):
            done.wrong = f"request {i} got {text[:40]!r}"
    except (OSError, AssertionError) as error:
        done.wrong = f"{type(error).__name__}: {str(error)[:200]}"
    done.at = time.perf_counter() - start
    return done


def resident(pid: int) -> int:
    """MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))//1024


def percentile(values: list[float], p: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(p*len(ordered)))], 1) if ordered else 0.0


def run(args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        with Server(Path(folder)/"log", "-m", models.resolve(args.model), *args.flags.split(),
                    program=args.server) as server:
            todo = prompts(args.requests, args.longest, args.seed)
            memory: list[int] = []
            start = time.perf_counter()
            with ThreadPoolExecutor(args.clients) as pool:
                jobs = [pool.submit(ask, server, i, kind, prompt, args.predict, start)
                        for i, (kind, prompt) in enumerate(todo)]
                for n, job in enumerate(jobs):
                    job.result()
                    memory.append(resident(server.process.pid))
                    print(f"\r{n + 1} of {len(jobs)}", end="", file=sys.stderr)
            seconds = time.perf_counter() - start
            done = [job.result() for job in jobs]
            answered = [d for d in done if d.kind in ("new", "branch") and not d.wrong]
            metrics = server.get("/metrics")[1] if "--metrics" in args.flags else ""
            status = server.stop()
    half = memory[len(memory)//2:]
    return {"flags": args.flags, "requests": len(done), "answered": len(answered),
            "wrong": [d.wrong for d in done if d.wrong], "seconds": round(seconds, 1),
            "tokens_per_second": round(sum(d.n_prompt + d.n_answer for d in answered)/seconds, 1),
            "first_token_ms": {"p50": percentile([d.first_ms for d in answered], 0.5),
                               "p95": percentile([d.first_ms for d in answered], 0.95)},
            "resident_mib": {"first": memory[0], "half": half[0], "most_after": max(half), "last": memory[-1]},
            "exit_status": status,
            "evictions": [line for line in metrics.splitlines() if line.startswith("llamacpp:kv_")]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--longest", type=int, default=6000, help="tokens of the longest prompt, about")
    parser.add_argument("--predict", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default=None)
    parser.add_argument("--server", default=None, help="a llama-server; default: pykvc serve")
    parser.add_argument("--flags",
                        default="-c 32768 -np 4 --kv-policy snapkv --kv-budget 25% --kv-cells 2560 --cache-ram 256 "
                                "--metrics")
    print(json.dumps(run(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
