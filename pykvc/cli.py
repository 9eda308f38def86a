"""The command line: `pykvc chat | generate | inspect | serve | bench | policies | pull | demo`, with llama.cpp's names for flags and environment.

A mistake ends with exit status 2 and one sentence on stderr.
"""
import json
import sys
from typing import Annotated, Any, Optional, Sequence

import typer

from . import __version__, bench, command, flags, models, policies, report, table
from .command import numbers, sentences, values
from .flags import flag
from .progress import prompt_bar
from .user_turn import answer_once

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="KV cache eviction inside llama.cpp: a long prompt in a small cache.")


def main() -> None:
    """Entry point."""
    command.run(app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pykvc {__version__}")
        raise typer.Exit()


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False) -> None:
    pass


@app.command("chat")
@sentences
@command.takes(opening=flags.opening, sampling=flags.sampling)
def run_chat(
    opening: dict[str, Any],
    sampling: dict[str, Any],
    system_prompt: flags.System = None,
    n_predict: Annotated[int, flag("-n", "--predict", "--n-predict", env="N_PREDICT", help="Tokens of an answer, at most; -1: until the context is full.")] = 512,
) -> None:
    """Talk with a model: each answer goes on from the cache.

    /clear forgets the conversation, /system TEXT begins a new one, Ctrl-C stops an answer, /exit or Ctrl-D ends. Where -c
    is full, the oldest turns are dropped. With a pipe each line is a message, stdout has the answers alone, and the
    exit status is 1 where a message was refused."""
    from .llm import LLM
    from .terminal import Talk, with_policy
    with LLM(**with_policy(opening)) as llm:
        talk = Talk(llm, system_prompt, dict(max_tokens=n_predict, **sampling))
        talk.run()
    if talk.n_refused and not talk.typed:
        raise typer.Exit(1)


@app.command()
@sentences
@command.takes(opening=flags.opening, sampling=flags.sampling)
def generate(
    opening: dict[str, Any],
    sampling: dict[str, Any],
    prompt: flags.Prompt = None,
    file: flags.File = None,
    question: flags.Question = None,
    system_prompt: flags.System = None,
    raw: flags.Raw = False,
    n_predict: Annotated[int, flag("-n", "--predict", "--n-predict", env="N_PREDICT", help="Tokens to generate; -1: until the context is full.")] = 128,
    kv_query: flags.KvQuery = None,
    segment: flags.Segment = None,
    as_json: Annotated[bool, flag("--json", help="Print one object instead of the text.")] = False,
) -> None:
    """Evaluate a prompt, evict, and answer it.

    A model with a chat template is asked in it: -p or -f is what a user says, and with --question the text of which the
    question is asked. With --raw, or without a template, the model goes on from the text as it is."""
    from .llm import LLM
    from .terminal import say
    text = _prompt(prompt, file)
    with LLM(**opening) as llm, prompt_bar(llm._session):
        notes: list[str] = []  # after the answer, which they would stand in the middle of
        llm._session.tell = notes.append
        stream = answer_once(llm, text, question, system_prompt, raw, segment and flags.unescaped(segment), kv_query, max_tokens=n_predict, **sampling)
        if as_json:
            for _ in stream:
                pass
        else:
            say(stream)
        answer = stream.result
        if as_json:
            kv = {key: answer.kv[key] for key in ("cells", "kept", "bytes_allocated", "bytes_used", "bytes_full")}
            print(json.dumps({"text": answer.text, "tokens": answer.tokens, "model": str(llm.path), "policy": llm.policy,
                              "n_prompt": answer.n_prompt, "n_predicted": answer.n_predicted, "kv": kv, "timings": answer.timings}))
        else:
            print()
            print(f"{answer.n_prompt} tokens at {answer.timings['prefill_tps']:.0f} t/s, {answer.n_predicted} at "
                  f"{answer.timings['decode_tps']:.1f} t/s, evicted in {answer.timings['evict_ms']:.0f} ms, "
                  f"KV {table.mebibytes(answer.kv['bytes_used'])} of {table.mebibytes(answer.kv['bytes_full'])}", file=sys.stderr)
        for note in notes:
            print(note, file=sys.stderr)


@app.command("inspect")
@sentences
def show_kept(
    output: Annotated[list[str], flag("-o", "--output", help="A page (.html) or a picture (.png, .svg, .pdf); may be repeated.")],
    model: Annotated[Optional[str], flags.said(flags.Model, "As in generate.")] = None,
    hf_repo: Annotated[Optional[str], flags.said(flags.HfRepo, "As in generate.")] = None,
    prompt: flags.Prompt = None,
    file: flags.File = None,
    question: Annotated[Optional[str], flags.said(flags.Question, "Evaluated after the prompt was evicted, so that the eviction has not seen it.")] = None,
    kv_policy: flags.KvPolicy = None,
    kv_budget: flags.KvBudget = None,
    kv_cells: Annotated[Optional[str], flags.said(flags.KvCells, "As in generate.")] = None,
    kv_query: Annotated[Optional[str], flags.said(flags.KvQuery, "What finch asks. Default: --question.")] = None,
    segment: Annotated[Optional[str], flags.said(flags.Segment, "Units that are outlined, and that policies on spans keep: sentence, sep:SEPARATOR or re:REGEX.")] = None,
    window: Annotated[int, flag("--window", help="Last queries whose attention is shown.")] = 32,
    ctx_size: flags.CtxSize = 0,
    ubatch_size: flags.UbatchSize = 512,
    threads: flags.Threads = None,
    n_gpu_layers: flags.GpuLayers = 0,
    type_k: flags.TypeK = "f16",
    type_v: flags.TypeV = "f16",
) -> None:
    """Show which tokens of a prompt an eviction keeps, and where the attention went."""
    from . import inspect
    name = flags.named(model, hf_repo)
    paths = [inspect.check_output(path) for path in output]
    found = inspect.look(_prompt(prompt, file), question or "", segment=segment and flags.unescaped(segment), kv_query=kv_query, window=window, model=name,
                         n_ctx=ctx_size, n_batch=ubatch_size, n_ubatch=ubatch_size, n_threads=threads, n_gpu_layers=n_gpu_layers, type_k=type_k, type_v=type_v,
                         kv_policy=kv_policy, kv_budget=kv_budget or None, kv_cells=kv_cells or None)
    for path in paths:
        inspect.write(found, path)
        print(path)


def _prompt(prompt: str | None, file: str | None) -> str:
    if prompt is not None and file is None:
        return prompt
    if prompt is not None or file is None:
        raise ValueError("give a prompt: -p TEXT or -f FILE, one of them")
    return flags.read(file)


@app.command("serve", add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True,
                                                               "allow_interspersed_args": False})
@sentences
def run_serve(given: typer.Context) -> None:
    """llama-server with eviction: its flags and API, and --kv-policy, --kv-budget, --kv-decode-budget, --kv-cells.

    -m as in generate; `pykvc serve --help` lists the flags."""
    from .serve import run
    run(given.args)


@app.command("bench")
@sentences
def run_bench(
    model: Annotated[Optional[list[str]], flag("-m", "--model", help="As in generate.")] = None,
    n_prompt: Annotated[list[str], flag("-p", "--n-prompt", help="Tokens of the prompt that are timed; 0: none.")] = ["512"],
    n_gen: Annotated[list[str], flag("-n", "--n-gen", help="Tokens generated after it; 0: none.")] = ["128"],
    n_depth: Annotated[list[str], flag("-d", "--n-depth", help="Tokens evaluated before the prompt, not timed.")] = ["0"],
    repetitions: Annotated[int, flag("-r", "--repetitions", help="Times each row is measured.")] = 5,
    batch_size: Annotated[list[str], flag("-b", "--batch-size", help="Tokens of one call; caches take turns after each.")] = ["512"],
    ubatch_size: Annotated[list[str], flag("-ub", "--ubatch-size", help="Tokens computed at once.")] = ["512"],
    type_k: Annotated[list[str], flag("-ctk", "--cache-type-k", help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0.")] = ["f16"],
    type_v: Annotated[list[str], flag("-ctv", "--cache-type-v", help="As -ctk.")] = ["f16"],
    flash_attn: Annotated[list[str], flag("-fa", "--flash-attn", help="on, off or auto.")] = ["auto"],
    threads: Annotated[Optional[list[str]], flag("-t", "--threads", help="CPU threads; default: all.")] = None,
    n_gpu_layers: Annotated[list[str], flag("-ngl", "--n-gpu-layers", help="Layers on the GPU.")] = ["0"],
    n_parallel: Annotated[list[str], flag("-np", "--parallel", help="Sequences at once; rates are their sum.")] = ["1"],
    kv_policy: Annotated[list[str], flag("--kv-policy", help="NAME[:key=value,...]; full is the reference of the others.")] = ["full"],
    kv_budget: Annotated[Optional[list[str]], flag("--kv-budget", help="Cells a layer keeps of the prompt: 512, 25% or 0.25.")] = None,
    kv_decode_budget: Annotated[Optional[list[str]], flag("--kv-decode-budget", help="The same of the generated tokens.")] = None,
    kv_cells: Annotated[Optional[list[str]], flag("--kv-cells", help="Cells of a sequence that are allocated, or bytes of all (512MiB).")] = None,
    file: Annotated[Optional[str], flag("-f", "--file", help="Text to evaluate; - is stdin. Default: prose made from a word list.")] = None,
    random_tokens: Annotated[bool, flag("--random", help="Evaluate random tokens, as llama-bench does.")] = False,
    output: Annotated[str, flag("-o", "--output", help="md, csv, json or jsonl.")] = "md",
) -> None:
    """Measure prefill, eviction and decode against a cache that holds everything and one that holds only the budget.

    Flags that take a list (-p 512,4096) and are repeated (-p 512 -p 4096) measure every combination."""
    if output not in report.FORMATS:
        raise ValueError(f"-o is one of {', '.join(report.FORMATS)}, not {output!r}")
    if file is not None and random_tokens:
        raise ValueError("give -f or --random, not both")
    text = None if file is None else _prompt(None, file)
    lists: dict[str, Sequence[Any]] = dict(
        model=values(model), n_gpu_layers=numbers(n_gpu_layers), n_threads=numbers(threads), n_batch=numbers(batch_size),
        n_ubatch=numbers(ubatch_size), type_k=values(type_k), type_v=values(type_v), flash_attn=values(flash_attn),
        n_parallel=numbers(n_parallel), kv_policy=values(kv_policy), kv_budget=values(kv_budget),
        kv_decode_budget=values(kv_decode_budget), kv_cells=values(kv_cells),
        n_depth=numbers(n_depth), n_prompt=numbers(n_prompt), n_gen=numbers(n_gen))
    todo = bench.cases(**{name: values for name, values in lists.items() if values})
    report.FORMATS[output](todo, report.watched(todo, repetitions, "random" if random_tokens else file or "prose", text))


@app.command("policies")
@sentences
def show_policies(
    name: Annotated[Optional[str], typer.Argument(help="A policy, to see its parameters.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The table as JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table as it stands in docs/policies.md.")] = False,
) -> None:
    """List the eviction policies, or the parameters of one."""
    chosen = [p for p in policies() if name in (None, p["name"])]
    if not chosen:
        raise ValueError(f"unknown policy '{name}': valid are {', '.join(p['name'] for p in policies())}")
    if as_json:
        print(json.dumps(chosen if name is None else chosen[0], indent=2))
    elif markdown:
        print(table.markdown(chosen))
    else:
        table.show(chosen, parameters=name is not None)


@app.command()
@sentences
def pull(name: Annotated[str, typer.Argument(help="smollm2-135m, or user/repo[:quant] of Hugging Face.")]) -> None:
    """Fetch a model and print its path."""
    print(models.pull(name))


@app.command()
@sentences
def demo(
    model: Annotated[Optional[str], flags.said(flags.Model, "As in generate.")] = None,
    threads: flags.Threads = None,
) -> None:
    """A prompt of many shots: the whole cache against a quarter of it."""
    from .demo import run
    run(model, n_threads=threads)


if __name__ == "__main__":
    main()
