"""Flags that several commands have, with llama.cpp's names and environment."""
import sys
from copy import copy
from pathlib import Path
from typing import Annotated, Any, Optional, get_args

import typer


def flag(*names: str, help: str, env: str | None = None, **more: Any) -> Any:
    return typer.Option(*names, help=help, envvar=env and f"LLAMA_ARG_{env}", **more)


def said(of: Any, help: str) -> Any:
    """The same flag in other words."""
    option = copy(get_args(of)[1])
    option.help = help
    return option


Model = Annotated[Optional[str], flag("-m", "--model", env="MODEL", help="GGUF file or known name. Default: SmolLM2-135M, fetched once.")]
HfRepo = Annotated[Optional[str], flag("-hf", "--hf-repo", env="HF_REPO", help="user/repo[:quant] of Hugging Face.")]
Prompt = Annotated[Optional[str], flag("-p", "--prompt", help="The prompt.")]
File = Annotated[Optional[str], flag("-f", "--file", help="A file with the prompt; - is stdin.")]
Question = Annotated[Optional[str], flag("--question", help="Asked of the prompt, after it was evicted, so that the eviction has not seen it (question-out).")]
Raw = Annotated[bool, flag("--raw", help="Go on from the text as it is, without the model's chat template.")]
CtxSize = Annotated[int, flag("-c", "--ctx-size", env="CTX_SIZE", help="Tokens of context; 0: the model's own, at most 8192.")]
UbatchSize = Annotated[int, flag("-ub", "--ubatch-size", env="UBATCH", help="Tokens computed at once.")]
Threads = Annotated[Optional[int], flag("-t", "--threads", env="THREADS", help="CPU threads; default: all.")]
GpuLayers = Annotated[int, flag("-ngl", "--gpu-layers", "--n-gpu-layers", env="N_GPU_LAYERS", help="Layers on the GPU.")]
TypeK = Annotated[str, flag("-ctk", "--cache-type-k", env="CACHE_TYPE_K", help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0.")]
TypeV = Annotated[str, flag("-ctv", "--cache-type-v", env="CACHE_TYPE_V", help="As -ctk.")]
KvPolicy = Annotated[Optional[str], flag("--kv-policy", env="KV_POLICY",
                                         help="NAME[:key=value,...]; `pykvc policies` lists them. Default: full, with a budget the recommended one.")]
KvBudget = Annotated[Optional[str], flag("--kv-budget", env="KV_BUDGET", help="Cells a layer keeps of the prompt: 512, 25% or 0.25.")]
KvCells = Annotated[Optional[str], flag("--kv-cells", env="KV_CELLS",
                                        help="Allocate this many cells, bytes (512MiB), or auto: what memory there is; evict whenever they are full.")]
KvQuery = Annotated[Optional[str], flag("--kv-query", help="What finch asks after each chunk of the prompt. Default: --question.")]
System = Annotated[Optional[str], flag("-sys", "--system-prompt", help="A system message.")]
BatchSize = Annotated[int, flag("-b", "--batch-size", env="BATCH", help="Tokens of one call.")]
FlashAttn = Annotated[str, flag("-fa", "--flash-attn", env="FLASH_ATTN", help="on, off or auto.")]
Seed = Annotated[int, flag("-s", "--seed", env="SEED", help="Seed of the sampler; -1: a random one.")]
Temp = Annotated[float, flag("--temp", "--temperature", help="0: the most likely token.")]
TopK = Annotated[int, flag("--top-k", env="TOP_K", help="0: off.")]
TopP = Annotated[float, flag("--top-p", help="1: off.")]
MinP = Annotated[float, flag("--min-p", help="0: off.")]
RepeatPenalty = Annotated[float, flag("--repeat-penalty", help="1: off.")]
Stop = Annotated[Optional[list[str]], flag("--stop", help="A string that ends the answer; may be repeated.")]
KvDecodeBudget = Annotated[Optional[str], flag("--kv-decode-budget", env="KV_DECODE_BUDGET",
                                               help="The same of the generated tokens; better tokens than a ratio, which is of the answer so far.")]
Segment = Annotated[Optional[str], flag("--segment", help='Units for policies on spans: sentence, sep:SEPARATOR or re:REGEX.')]

Lora = Annotated[Optional[list[str]], flag("--lora", help="A LoRA of the model, a GGUF; may be repeated.")]
MainGpu = Annotated[Optional[int], flag("-mg", "--main-gpu", env="MAIN_GPU", help="All layers of -ngl on this GPU.")]
TensorSplit = Annotated[Optional[str], flag("-ts", "--tensor-split", env="TENSOR_SPLIT", help="Proportions of the GPUs: 3,1.")]
Rpc = Annotated[Optional[str], flag("--rpc", env="RPC", help="RPC servers that hold layers of -ngl: host:port,host:port.")]
NoKvOffload = Annotated[bool, flag("-nkvo", "--no-kv-offload", help="The cache stays on the CPU.")]
TypicalP = Annotated[float, flag("--typical", "--typical-p", help="1: off.")]
PresencePenalty = Annotated[float, flag("--presence-penalty", help="0: off.")]
FrequencyPenalty = Annotated[float, flag("--frequency-penalty", help="0: off.")]
Grammar = Annotated[Optional[str], flag("--grammar", help="GBNF that the answer follows.")]
GrammarFile = Annotated[Optional[str], flag("--grammar-file", help="A file with it.")]
JsonSchema = Annotated[Optional[str], flag("-j", "--json-schema", help="Schema of the JSON that the answer is.")]
JsonSchemaFile = Annotated[Optional[str], flag("-jf", "--json-schema-file", help="A file with it.")]


def opening(
    model: Model = None, hf_repo: HfRepo = None, lora: Lora = None, ctx_size: CtxSize = 0, batch_size: BatchSize = 512, ubatch_size: UbatchSize = 512,
    threads: Threads = None, n_gpu_layers: GpuLayers = 0, main_gpu: MainGpu = None, tensor_split: TensorSplit = None, rpc: Rpc = None,
    no_kv_offload: NoKvOffload = False, flash_attn: FlashAttn = "auto", type_k: TypeK = "f16", type_v: TypeV = "f16", seed: Seed = 0,
    kv_policy: KvPolicy = None, kv_budget: KvBudget = None, kv_decode_budget: KvDecodeBudget = None, kv_cells: KvCells = None,
) -> dict[str, Any]:
    """What LLM() takes."""
    return dict(model=named(model, hf_repo), lora=lora or None, n_ctx=ctx_size, n_batch=batch_size, n_ubatch=ubatch_size, n_threads=threads,
                n_gpu_layers=n_gpu_layers, main_gpu=main_gpu, tensor_split=proportions(tensor_split), rpc_servers=rpc,
                offload_kqv=not no_kv_offload, flash_attn=flash_attn, type_k=type_k, type_v=type_v, seed=seed, kv_policy=kv_policy,
                kv_budget=kv_budget or None, kv_decode_budget=kv_decode_budget or None, kv_cells=kv_cells or None)


def sampling(
    temp: Temp = 0.0, top_k: TopK = 40, top_p: TopP = 0.95, min_p: MinP = 0.05, typical_p: TypicalP = 1.0, repeat_penalty: RepeatPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0, frequency_penalty: FrequencyPenalty = 0.0, grammar: Grammar = None, grammar_file: GrammarFile = None,
    json_schema: JsonSchema = None, json_schema_file: JsonSchemaFile = None, stop: Stop = None,
) -> dict[str, Any]:
    """What SamplingParams takes, but for the number of tokens."""
    if grammar is not None and grammar_file is not None:
        raise ValueError("give --grammar or --grammar-file, not both")
    if json_schema is not None and json_schema_file is not None:
        raise ValueError("give --json-schema or --json-schema-file, not both")
    if json_schema and not json_schema.strip().startswith("{") and Path(json_schema).is_file():
        raise ValueError(f"-j is the text of a JSON schema: -jf {json_schema} reads it from a file")
    return dict(temperature=temp, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p, repeat_penalty=repeat_penalty,
                presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, grammar=read(grammar_file) if grammar_file else grammar,
                json_schema=read(json_schema_file) if json_schema_file else json_schema,
                stop=[unescaped(s) for s in stop] if stop else None)


def proportions(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"-ts are proportions as 3,1, not {text!r}") from None


def unescaped(text: str) -> str:
    """Backslash-n and -t, which a shell does not make for one; as llama.cpp's -e. Regular expressions have their
    own."""
    if text.startswith("re:"):
        return text
    return text.replace("\\n", "\n").replace("\\t", "\t")


def read(path: str) -> str:
    """A file's text; - is stdin. ValueError: it cannot be read, or is not UTF-8."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None


def named(model: str | None, hf_repo: str | None) -> str | None:
    """What -m or -hf names."""
    if model is not None and hf_repo is not None:
        raise ValueError("give -m or -hf, not both")
    return model or hf_repo
