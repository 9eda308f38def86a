"""GGUF models with random weights, a few hundred kilobytes each: architectures to accept or refuse, and to fuzz
fast."""
from pathlib import Path
from typing import Callable, Sequence

import gguf
import numpy as np

import families

N_EMBD, N_HEAD, N_HEAD_KV, N_FF, N_VOCAB = 64, 4, 2, 96, 128
N_LAYER = families.N_LAYER  # where it is not 3
ARCHS = ["llama", "qwen2", "gemma3", "gpt-oss", "hunyuan-dense", "openelm", "deci", "t5", "qwen2vl", "mamba", *families.WRITE]


def write(path: Path, arch: str = "llama", n_layer: int | None = None, n_ctx: int = 4096, head_dim: int = 32, yarn: float = 1, quant: str = "F32",
          n_vocab: int = N_VOCAB, seed: int = 0, mute: int | None = None, tokenizer: Callable[[gguf.GGUFWriter], None] = lambda w: w.add_tokenizer_model("no_vocab")) -> Path:
    """arch: llama | qwen2 (the other pairs in RoPE) | gemma3 (a global layer after five with a window of 32) | gpt-oss (every
    other layer has a window of 32; attention sinks, two experts) | hunyuan-dense (a norm
    after RoPE) | openelm (the second layer has half the KV heads) | deci (the second has none) | t5 (relative positions; what an encoder
    needs, too) | qwen2vl (M-RoPE) | mamba (recurrent) | those of tests/families.py. yarn: what RoPE is stretched by. quant: the type of the matrices, as
    gguf.GGMLQuantizationType names it. tokenizer: writes one of n_vocab tokens; none otherwise. seed: of the weights. mute: a token
    that is never the likeliest."""
    rng = np.random.default_rng(seed)
    n_layer = n_layer or N_LAYER.get(arch, 3)
    head_dim = 16 if arch in ("qwen2", "qwen2vl") else head_dim  # 32: a block of a quantized cache
    w = gguf.GGUFWriter(path, arch.partition(":")[0])
    w.add_context_length(n_ctx)
    w.add_embedding_length(N_EMBD)
    w.add_block_count(n_layer)
    w.add_head_count(N_HEAD)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(n_vocab)
    tokenizer(w)
    def put(name, *shape, scale=None, mute=None):  # numpy order: [out, in]
        scale = 0.7/np.sqrt(shape[-1])*2 if scale is None else scale
        data = (rng.standard_normal(shape)*scale).astype(np.float32)
        if mute is not None:
            data[mute] = 0
        kind = gguf.GGMLQuantizationType[quant]
        if kind == gguf.GGMLQuantizationType.F32 or len(shape) < 2:
            w.add_tensor(name, data)
        else:
            w.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)

    def ones(name, n):
        w.add_tensor(name, np.ones(n, np.float32))

    put("token_embd.weight", n_vocab, N_EMBD, scale=1.0, mute=mute)
    if write := (families.WRITE | families.DRAFTS).get(arch):
        write(families.Tensors(w, put, ones, n_layer, n_vocab, head_dim))
        return _finish(w, path)
    second = {"openelm": N_HEAD_KV//2, "deci": 0}.get(arch, N_HEAD_KV)  # KV heads of the second layer
    if second != N_HEAD_KV:
        w.add_head_count_kv([second if i == 1 else N_HEAD_KV for i in range(n_layer)])
    else:
        w.add_head_count_kv(N_HEAD if arch == "t5" else N_HEAD_KV)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_feed_forward_length(N_FF)
    if yarn > 1:
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(yarn)
        w.add_rope_scaling_orig_ctx_len(int(n_ctx/yarn))

    if arch == "gpt-oss":
        put("output.weight", n_vocab, N_EMBD, mute=mute)
    if arch == "t5":
        w.add_relative_attn_buckets_count(32)
        for half, attns in (("enc", ("attn",)), ("dec", ("attn", "cross_attn"))):
            ones(f"{half}.output_norm.weight", N_EMBD)
            for i in range(n_layer):
                b = f"{half}.blk.{i}."
                if i == 0:
                    put(b + "attn_rel_b.weight", 32, N_HEAD)
                for attn in attns:
                    ones(b + attn + "_norm.weight", N_EMBD)
                    for name in "qkv":
                        put(f"{b}{attn}_{name}.weight", N_HEAD*head_dim, N_EMBD)
                    put(b + attn + "_o.weight", N_EMBD, N_HEAD*head_dim)
                ones(b + "ffn_norm.weight", N_EMBD)
                put(b + "ffn_up.weight", N_FF, N_EMBD)
                put(b + "ffn_down.weight", N_EMBD, N_FF)
        n_layer = 0  # there are no others
    else:
        ones("output_norm.weight", N_EMBD)
    if arch == "mamba":
        w.add_ssm_conv_kernel(4)
        w.add_ssm_inner_size(2*N_EMBD)
        w.add_ssm_state_size(8)
        w.add_ssm_time_step_rank(4)
    if arch in ("gemma3", "gpt-oss"):
        w.add_sliding_window(32)
    if arch == "gpt-oss":
        w.add_expert_count(2)
        w.add_expert_used_count(1)
        w.add_expert_feed_forward_length(N_FF)
    if arch == "qwen2vl":
        w.add_rope_dimension_sections([2, 3, 3, 0])

    for i in range(n_layer):
        b = f"blk.{i}."
        ones(b + "attn_norm.weight", N_EMBD)
        if arch == "mamba":
            n = 2*N_EMBD
            put(b + "ssm_in.weight", 2*n, N_EMBD)
            put(b + "ssm_conv1d.weight", n, 4)
            put(b + "ssm_conv1d.bias", n)
            put(b + "ssm_x.weight", 4 + 2*8, n)
            put(b + "ssm_dt.weight", n, 4)
            put(b + "ssm_dt.bias", n)
            w.add_tensor(b + "ssm_a", -np.ones((n, 8), np.float32))
            ones(b + "ssm_d", n)
            put(b + "ssm_out.weight", N_EMBD, n)
            continue
        if arch == "openelm":
            put(b + "attn_qkv.weight", (N_HEAD + 2*(second if i == 1 else N_HEAD_KV))*head_dim, N_EMBD)
        elif arch == "deci" and i == 1:  # attention is one matrix
            put(b + "attn_output.weight", N_EMBD, N_EMBD)
        else:
            put(b + "attn_q.weight", N_HEAD*head_dim, N_EMBD)
            put(b + "attn_k.weight", N_HEAD_KV*head_dim, N_EMBD)
            put(b + "attn_v.weight", N_HEAD_KV*head_dim, N_EMBD)
        if not (arch == "deci" and i == 1):
            put(b + "attn_output.weight", N_EMBD, N_HEAD*head_dim)
        if arch == "gpt-oss":
            put(b + "attn_output.bias", N_EMBD)
            put(b + "attn_sinks.weight", N_HEAD)
            ones(b + "post_attention_norm.weight", N_EMBD)
            put(b + "ffn_gate_inp.weight", 2, N_EMBD)
            put(b + "ffn_gate_inp.bias", 2)
            for name, n_out, n_in in (("gate", N_FF, N_EMBD), ("up", N_FF, N_EMBD), ("down", N_EMBD, N_FF)):
                put(f"{b}ffn_{name}_exps.weight", 2, n_out, n_in)
                put(f"{b}ffn_{name}_exps.bias", 2, n_out)
            continue
        if arch in ("qwen2", "qwen2vl"):
            put(b + "attn_q.bias", N_HEAD*head_dim)
            put(b + "attn_k.bias", N_HEAD_KV*head_dim)
            put(b + "attn_v.bias", N_HEAD_KV*head_dim)
        if arch in ("gemma3", "hunyuan-dense", "openelm"):
            for name in ("attn_q_norm", "attn_k_norm"):
                ones(b + name + ".weight", head_dim)
        if arch == "gemma3":
            for name in ("post_attention_norm", "post_ffw_norm"):
                ones(b + name + ".weight", N_EMBD)
        ones(b + "ffn_norm.weight", N_EMBD)
        put(b + "ffn_gate.weight", N_FF, N_EMBD)
        put(b + "ffn_up.weight", N_FF, N_EMBD)
        put(b + "ffn_down.weight", N_EMBD, N_FF)
    return _finish(w, path)


def _finish(w: gguf.GGUFWriter, path: Path) -> Path:
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def write_chat(path: Path, templates: dict[str, str], bos: str = "<s>", eos: str = "</s>", add_bos: bool = False,
               special: Sequence[str] = (), arch: str = "llama", n_layer: int = 1, mute_eos: bool = False) -> Path:
    """A model that spells: a token is a byte, or one of the special texts.

    templates: by name, the main one as "default". mute_eos: it never ends by itself."""
    marks = list(dict.fromkeys((bos, eos, *special)))
    tokens = [*_byte_characters(), "th", *marks]

    def tokenizer(w: gguf.GGUFWriter) -> None:
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("gpt-2")
        w.add_token_list(tokens)
        w.add_token_types([gguf.TokenType.NORMAL]*257 + [gguf.TokenType.CONTROL]*len(marks))
        w.add_token_merges(["t h"])  # llama.cpp wants one
        w.add_bos_token_id(tokens.index(bos))
        w.add_eos_token_id(tokens.index(eos))
        w.add_add_bos_token(add_bos)
        for name, text in templates.items():
            w.add_string("tokenizer.chat_template" + (f".{name}" if name != "default" else ""), text)
    return write(path, arch, n_layer, n_vocab=len(tokens), tokenizer=tokenizer, mute=tokens.index(eos) if mute_eos else None)


def _byte_characters() -> list[str]:
    """Of each byte the character that GPT-2's vocabulary writes for it."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


def lora(path: Path, base: Path, rank: int = 4, alpha: float = 8, seed: int = 9, only: str = "") -> dict[str, np.ndarray]:
    """A LoRA of a llama that write() wrote, of all its matrices or of those with `only` in their names: what it adds to
    each, at scale 1."""
    rng, added = np.random.default_rng(seed), {}
    w = gguf.GGUFWriter(path, "llama")
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", alpha)
    for tensor in gguf.GGUFReader(base).tensors:
        if not tensor.name.startswith("blk.") or "norm" in tensor.name or only not in tensor.name:
            continue
        n_out, n_in = tensor.data.shape
        a, b = (rng.standard_normal(shape).astype(np.float32)*0.05 for shape in ((rank, n_in), (n_out, rank)))
        w.add_tensor(tensor.name + ".lora_a", a)
        w.add_tensor(tensor.name + ".lora_b", b)
        added[tensor.name] = alpha/rank*(b @ a)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return added
