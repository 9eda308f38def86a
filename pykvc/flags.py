"""Flags that several commands have, with llama.cpp's names and environment."""
from copy import copy
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
KvCells = Annotated[Optional[str], flag("--kv-cells", env="KV_CELLS", help="Allocate this many cells, or bytes (512MiB), and evict whenever they are full.")]
KvQuery = Annotated[Optional[str], flag("--kv-query", help="What finch asks after each chunk of the prompt. Default: --question.")]
System = Annotated[Optional[str], flag("-sys", "--system-prompt", help="A system message.")]
BatchSize = Annotated[int, flag("-b", "--batch-size", env="BATCH", help="Tokens of one call.")]
FlashAttn = Annotated[str, flag("-fa", "--flash-attn", env="FLASH_ATTN", help="on, off or auto.")]
Seed = Annotated[int, flag("-s", "--seed", env="SEED", help="Seed of the sampler.")]
Temp = Annotated[float, flag("--temp", "--temperature", help="0: the most likely token.")]
TopK = Annotated[int, flag("--top-k", env="TOP_K", help="0: off.")]
TopP = Annotated[float, flag("--top-p", help="1: off.")]
MinP = Annotated[float, flag("--min-p", help="0: off.")]
RepeatPenalty = Annotated[float, flag("--repeat-penalty", help="1: off.")]
Stop = Annotated[Optional[list[str]], flag("--stop", help="A string that ends the answer; may be repeated.")]
KvDecodeBudget = Annotated[Optional[str], flag("--kv-decode-budget", env="KV_DECODE_BUDGET",
                                               help="The same of the generated tokens; better tokens than a ratio, which is of the answer so far.")]
Segment = Annotated[Optional[str], flag("--segment", help='Units for policies on spans: sentence, sep:SEPARATOR or re:REGEX.')]


def named(model: str | None, hf_repo: str | None) -> str | None:
    """What -m or -hf names."""
    if model is not None and hf_repo is not None:
        raise ValueError("give -m or -hf, not both")
    return model or hf_repo
