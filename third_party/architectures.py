"""python architectures.py [SOURCE]: prints the tables of docs/architectures.md, what evicts of all that llama.cpp knows.

Read off llama.cpp's source (the pinned one, unless SOURCE is another): its list of names, and which memory the graph of each reads.
A newer pin shows what is new: tests/test_architectures.py compares the page with what this prints.
"""
import re
import sys
from pathlib import Path
from typing import NamedTuple

import fetch


class Architecture(NamedTuple):
    name: str
    inputs: set[str]  # of attention and recurrence, as llama-graph.h names what builds them; empty: there is no graph
    facts: str        # the text that loads its hyperparameters
    rope: str
    embeds: bool      # its graph is another's, for embeddings


# -- what llama.cpp's source says -----------------------------------------------------------------------------------

def read(source: Path) -> list[Architecture]:
    src = source/"src"
    names, models, header = (src.joinpath(name).read_text() for name in ("llama-arch.cpp", "llama-model.cpp", "models/models.h"))
    files = {path: path.read_text() for path in sorted(src.glob("models/*.cpp"))}
    bases = {name: (base, re.search(r"using graph\s*=\s*(\w+)::graph(<embed>)?", body)) for name, base, body in
             re.findall(r"struct (llama_model_\w+) : public (\w+) \{(.*?)\n\};", header, re.S)}

    def text(cls: str, what: str) -> str:
        """Of the file that defines a method of the class, or of the one it takes it from."""
        found = [body for body in files.values() if re.search(rf"\b{cls}::{what}", body)]
        base, alias = bases.get(cls, ("llama_model_base", None))
        other = alias[1] if alias and what.startswith("graph") else base
        return "".join(found) or ("" if other in ("llama_model_base", cls) else text(other, what))

    table = names[names.index("LLM_ARCH_NAMES"):names.index("LLM_KV_NAMES")]
    classes = {arch: cls for cases, cls in re.findall(r"((?:case LLM_ARCH_\w+:\s*)+)return new (llama_model_\w+)\(params\);", models)
               for arch in re.findall(r"LLM_ARCH_\w+", cases)}
    ropes = {arch: value for cases, value in re.findall(r"((?:case LLM_ARCH_\w+:\s*)+)return (.*LLAMA_ROPE_TYPE_\w+);", models)
             for arch in re.findall(r"LLM_ARCH_\w+", cases)}
    res = []
    for arch, name in re.findall(r'\{ (LLM_ARCH_\w+),\s*"([^"(]+)"\s*\}', table):
        cls = classes.get(arch, "")
        graph = text(cls, r"graph(<[^>]*>)?::graph") if cls else ""
        alias = bases.get(cls, ("", None))[1]
        res.append(Architecture(name, set(re.findall(r"build_((?:attn_inp|inp_mem|rs_inp)\w*)\(", graph)),
                                text(cls, "load_arch_hparams") if cls else "", ropes.get(arch, ""), bool(alias and alias[2])))
    return res


# -- and what it means for an eviction ---------------------------------------------------------------------------------

DRAFTS = {"gemma4-assistant", "eagle3", "dflash"}  # they read another context's cells, or its layers' outputs
MAY_INDEX = {"hy_v4"}  # a file of it has an index or none


def verdict(a: Architecture) -> str:
    """"evicts ...", or "refused: ..." with the reason in short."""
    index = "indexer" in a.facts.lower() or any(name.endswith(("_dsa", "_dsa_iswa", "_msa")) for name in a.inputs)
    why = ("a draft's cache stays whole" if a.name in DRAFTS else
           "relative positions need the distance to every cell" if "n_rel_attn_bkts" in a.facts else
           "llama.cpp has its name only" if not a.inputs and a.name in ("clip", "gptj") else
           "no KV cache: it encodes, or evaluates all its tokens at once" if a.embeds or not a.inputs - {"attn_inp_no_cache"} else
           "a recurrent state, which does not grow" if a.inputs == {"rs_inp"} else
           "an index beside the cache picks what attention reads" if index and a.name not in MAY_INDEX else
           "ALiBi needs the distance to every cell" if re.search(r"^ {4}hparams.f_max_alibi_bias = ", a.facts, re.M) else
           "a layer that routes has a KV head of its own" if "hparams.router_layer" in a.facts else
           "its attention scores are transformed in a way not tested" if a.name == "grok" else "")
    if why:
        return f"refused: {why}"
    res = "evicts"
    if "hybrid" in "".join(a.inputs):
        res += " its attention layers; the recurrent state stays whole"
    elif "attn_inp_kv_iswa" in a.inputs:
        res += " its global layers" + (", where it has sliding windows" if "attn_inp_kv" in a.inputs else "")
    but = ["MROPE" in a.rope and "images are refused" + (" where it has M-RoPE" if "?" in a.rope else ""),
           index and "refused with an index beside its cache", "max_alibi_bias" in a.facts.lower() and "refused with ALiBi"]
    return "; ".join(filter(None, [res, *but]))


# -- what a cache costs -----------------------------------------------------------------------------------------------------

COSTS = [  # model, layers that grow, of how many, values of K and V a layer and token
    ("Qwen3-Next-80B-A3B", 12, 48, 2*2*256), ("Qwen3.5-35B-A3B", 10, 40, 2*2*256), ("Granite-4.0-H-Small", 4, 40, 2*8*128),
    ("LFM2-1.2B", 6, 16, 2*8*64), ("Falcon-H1-7B", 44, 44, 2*2*128), ("Qwen3-VL-8B", 36, 36, 2*8*128), ("gpt-oss-20b", 12, 24, 2*8*64),
    ("Gemma 3n E4B", 4, 35, 2*2*256), ("Gemma 4 31B", 10, 60, 2*4*512),
    ("DeepSeek-V2-Lite", 27, 27, 512 + 64), ("DeepSeek-V3", 61, 61, 512 + 64),
]


def costs() -> list[str]:
    rows = ["| model | layers that grow | MB per 1,000 tokens | freed at a budget of 25 % |", "| --- | ---: | ---: | ---: |"]
    for model, n, n_layer, n_value in COSTS:
        mb = n*n_value*2*1000/1e6
        rows.append(f"| {model} | {n} of {n_layer} | {mb:.1f} | {0.75*mb:.1f} MB |")
    return rows


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else fetch.pristine()
    print("\n".join([*costs(), "", *table(source)]))


def table(source: Path) -> list[str]:
    rows = [f"| `{a.name}` | {verdict(a)} |" for a in sorted(read(source), key=lambda a: a.name)]
    return ["| architecture | what happens under a policy |", "| --- | --- |", *rows]


if __name__ == "__main__":
    main()
