"""The families people run, as tiny random GGUFs: what tests/tiny.py writes beyond what all models have. Layer patterns
are the real ones."""
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import gguf
import numpy as np

N_EMBD, N_HEAD, N_HEAD_KV, N_FF, N_EXPERT = 64, 4, 2, 96, 2
N_CONV, N_STATE, N_GROUP = 4, 16, 2  # of a recurrent layer
N_LATENT, N_NOPE, N_ROPE = 64, 16, 32  # of a latent row, and of a head's key


@dataclass
class Tensors:
    """put(name, *shape): random, in numpy's order [out, in]. ones(name, n)."""
    w: gguf.GGUFWriter
    put: Callable
    ones: Callable
    n_layer: int
    n_vocab: int
    head_dim: int = 32

    def norms(self, b, *names, n=N_EMBD):
        for name in names:
            self.ones(f"{b}{name}.weight", n)

    def heads(self, key=None, n_rot=None, sections=None):
        self.w.add_key_length(key or self.head_dim)
        self.w.add_value_length(key or self.head_dim)
        if n_rot:
            self.w.add_rope_dimension_count(n_rot)
        if sections:
            self.w.add_rope_dimension_sections(sections)

    def attention(self, b, head_dim=None, n_kv=N_HEAD_KV, n_q=1, v=True):
        """n_q: times what a query takes (2: a gate lies beside it)."""
        d = head_dim or self.head_dim
        self.put(b + "attn_q.weight", n_q*N_HEAD*d, N_EMBD)
        self.put(b + "attn_k.weight", n_kv*d, N_EMBD)
        if v:
            self.put(b + "attn_v.weight", n_kv*d, N_EMBD)
        self.put(b + "attn_output.weight", N_EMBD, N_HEAD*d)

    def swiglu(self, b, suffix="", n=()):
        for name, n_out, n_in in (("gate", N_FF, N_EMBD), ("up", N_FF, N_EMBD), ("down", N_EMBD, N_FF)):
            self.put(f"{b}ffn_{name}{suffix}.weight", *n, n_out, n_in)

    def latent(self, b, n_q=None):
        """MLA: a row of N_LATENT values, which keys and values are made from, and of N_ROPE that are rotated; queries through
        n_q values, or straight."""
        n_key = N_NOPE + N_ROPE
        self.norms(b, "attn_kv_a_norm", n=N_LATENT)
        if n_q:
            self.norms(b, "attn_q_a_norm", n=n_q)
            self.put(b + "attn_q_a.weight", n_q, N_EMBD)
            self.put(b + "attn_q_b.weight", N_HEAD*n_key, n_q)
        else:
            self.put(b + "attn_q.weight", N_HEAD*n_key, N_EMBD)
        self.put(b + "attn_kv_a_mqa.weight", N_LATENT + N_ROPE, N_EMBD)
        self.put(b + "attn_k_b.weight", N_HEAD, N_LATENT, N_NOPE)
        self.put(b + "attn_v_b.weight", N_HEAD, N_NOPE, N_LATENT)
        self.put(b + "attn_output.weight", N_EMBD, N_HEAD*N_NOPE)

    def add_latent(self, n_head_kv=1):
        self.w.add_head_count_kv(n_head_kv)
        self.w.add_kv_lora_rank(N_LATENT)
        self.w.add_key_length(N_LATENT + N_ROPE)
        self.w.add_value_length(N_LATENT)
        self.w.add_key_length_mla(N_NOPE + N_ROPE)
        self.w.add_value_length_mla(N_NOPE)
        self.w.add_rope_dimension_count(N_ROPE)

    def kimi_delta(self, b):
        n = N_HEAD*N_STATE
        for name in "qkv":
            self.put(f"{b}attn_{name}.weight", n, N_EMBD)
            self.put(f"{b}ssm_conv1d_{name}.weight", n, 1, N_CONV)
        for name in "fg":
            self.put(f"{b}ssm_{name}_a.weight", N_STATE, N_EMBD)
            self.put(f"{b}ssm_{name}_b.weight", n, N_STATE)
        self.put(b + "ssm_beta.weight", N_HEAD, N_EMBD)
        self.w.add_tensor(b + "ssm_a", -np.ones((N_HEAD, 1), np.float32))
        self.put(b + "ssm_dt.bias", n)
        self.norms(b, "ssm_norm", n=N_STATE)
        self.put(b + "attn_output.weight", N_EMBD, n)

    def experts(self, b, shared=False):
        self.put(b + "ffn_gate_inp.weight", N_EXPERT, N_EMBD)
        self.swiglu(b, "_exps", (N_EXPERT,))
        if shared:
            self.swiglu(b, "_shexp")

    def add_experts(self, used=1):
        self.w.add_expert_count(N_EXPERT)
        self.w.add_expert_used_count(used)
        self.w.add_expert_feed_forward_length(N_FF)

    def add_ssm(self, inner, rank, groups):
        self.w.add_ssm_conv_kernel(N_CONV)
        self.w.add_ssm_inner_size(inner)
        self.w.add_ssm_state_size(N_STATE)
        self.w.add_ssm_time_step_rank(rank)
        if groups:
            self.w.add_ssm_group_count(groups)

    def mamba2(self, b, inner=2*N_EMBD, n_head=4, groups=N_GROUP):
        n = inner + 2*groups*N_STATE
        self.put(b + "ssm_in.weight", inner + n + n_head, N_EMBD)
        self.put(b + "ssm_conv1d.weight", n, N_CONV)
        self.put(b + "ssm_conv1d.bias", n)
        self.put(b + "ssm_dt.bias", n_head)
        self.w.add_tensor(b + "ssm_a", -np.ones((n_head, 1), np.float32))
        self.w.add_tensor(b + "ssm_d", np.ones((n_head, 1), np.float32))
        self.w.add_tensor(b + "ssm_norm.weight", np.ones((groups, inner//groups), np.float32))
        self.put(b + "ssm_out.weight", N_EMBD, inner)

    def mamba(self, b, rank=4):
        n = 2*N_EMBD
        self.put(b + "ssm_in.weight", 2*n, N_EMBD)
        self.put(b + "ssm_conv1d.weight", n, N_CONV)
        self.put(b + "ssm_conv1d.bias", n)
        self.put(b + "ssm_x.weight", rank + 2*N_STATE, n)
        self.put(b + "ssm_dt.weight", n, rank)
        self.put(b + "ssm_dt.bias", n)
        self.w.add_tensor(b + "ssm_a", -np.ones((n, N_STATE), np.float32))
        self.ones(b + "ssm_d", n)
        self.put(b + "ssm_out.weight", N_EMBD, n)
        self.norms(b, "ssm_dt_norm", n=rank)
        self.norms(b, "ssm_b_norm", "ssm_c_norm", n=N_STATE)

    def delta_net(self, b, ba, n_v=4):
        """ba: beta and alpha in one matrix."""
        n_key, n_value = N_STATE*N_GROUP, N_STATE*n_v
        self.put(b + "attn_qkv.weight", 2*n_key + n_value, N_EMBD)
        self.put(b + "attn_gate.weight", n_value, N_EMBD)
        self.put(b + "ssm_conv1d.weight", 2*n_key + n_value, N_CONV)
        self.put(b + "ssm_dt.bias", n_v)
        self.w.add_tensor(b + "ssm_a", -np.ones(n_v, np.float32))
        for name, n in (("ssm_ba", 2*n_v),) if ba else (("ssm_beta", n_v), ("ssm_alpha", n_v)):
            self.put(f"{b}{name}.weight", n, N_EMBD)
        self.norms(b, "ssm_norm", n=N_STATE)
        self.put(b + "ssm_out.weight", N_EMBD, n_value)

    def per_layer(self, n):
        self.put("per_layer_token_embd.weight", self.n_vocab, n*self.n_layer)
        self.put("per_layer_model_proj.weight", n*self.n_layer, N_EMBD)
        self.ones("per_layer_proj_norm.weight", n)

    def per_layer_of(self, b, n):
        self.put(b + "inp_gate.weight", n, N_EMBD)
        self.put(b + "proj.weight", N_EMBD, n)
        self.norms(b, "post_norm")

    def heads_kv(self, attends):
        self.w.add_head_count_kv([N_HEAD_KV if attends(i) else 0 for i in range(self.n_layer)])


def write_eye(path: Path) -> Path:
    """What sees for qwen2vl: a vision encoder of one layer for llama-server's --mmproj, with random weights."""
    n, rng = 32, np.random.default_rng(0)
    w = gguf.GGUFWriter(path, "clip")
    w.add_bool("clip.has_vision_encoder", True)
    w.add_string("clip.projector_type", "qwen2vl_merger")
    for key, value in {"embedding_length": n, "attention.head_count": 2, "feed_forward_length": n, "block_count": 1, "projection_dim": N_EMBD,
                       "image_size": 56, "patch_size": 14}.items():
        w.add_uint32(f"clip.vision.{key}", value)
    w.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    for key in ("image_mean", "image_std"):
        w.add_array(f"clip.vision.{key}", [0.5]*3)
    shapes = {"v.patch_embd.weight": (n, 3, 14, 14), "v.patch_embd.weight.1": (n, 3, 14, 14), "v.post_ln.weight": (n,), "v.post_ln.bias": (n,)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down", "ln1", "ln2"):
        shapes |= {f"v.blk.0.{name}.weight": (n,) if name.startswith("ln") else (n, n), f"v.blk.0.{name}.bias": (n,)}
    shapes |= {"mm.0.weight": (4*n, 4*n), "mm.0.bias": (4*n,), "mm.2.weight": (N_EMBD, 4*n), "mm.2.bias": (N_EMBD,)}
    for name, shape in shapes.items():
        w.add_tensor(name, (rng.standard_normal(shape)/10).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def write_draft(path: Path, n_vocab: int) -> Path:
    """What drafts for gemma4 (dense): two layers that read the cells of its last window and its last global layer."""
    n, rng = 32, np.random.default_rng(1)
    w = gguf.GGUFWriter(path, "gemma4-assistant")
    w.add_context_length(4096)
    w.add_embedding_length(n)
    w.add_embedding_length_out(N_EMBD)
    w.add_block_count(2)
    w.add_nextn_predict_layers(2)
    w.add_head_count(N_HEAD)
    w.add_head_count_kv([4, N_HEAD_KV])
    w.add_key_length(32)
    w.add_value_length(32)
    w.add_key_length_swa(16)
    w.add_value_length_swa(16)
    w.add_rope_dimension_count(32)
    w.add_rope_dimension_count_swa(16)
    w.add_sliding_window(32)
    w.add_sliding_window_pattern([True, False])
    w.add_feed_forward_length(N_FF)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_vocab_size(n_vocab)
    w.add_tokenizer_model("no_vocab")
    shapes = {"token_embd": (n_vocab, n), "output_norm": (n,), "rope_freqs": (16,), "nextn.pre_projection": (n, 2*N_EMBD), "nextn.post_projection": (N_EMBD, n)}
    for i, d in enumerate((16, 32)):
        b = f"blk.{i}."
        shapes |= {b + "attn_q": (N_HEAD*d, n), b + "attn_output": (n, N_HEAD*d), b + "attn_q_norm": (d,), b + "layer_output_scale": (1,),
                   b + "ffn_gate": (N_FF, n), b + "ffn_up": (N_FF, n), b + "ffn_down": (n, N_FF)}
        shapes |= {b + name: (n,) for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")}
    for name, shape in shapes.items():
        data = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape)/4
        w.add_tensor(name + ".weight", data.astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def every_fourth(i):
    return i % 4 == 3


def qwen35(t: Tensors, next_gen: bool = False) -> None:
    """Three layers of a gated delta net to one with gated attention; positions of four components (qwen3next: of one,
    and experts)."""
    t.heads(n_rot=16, sections=None if next_gen else [3, 3, 2, 0])
    t.w.add_head_count_kv(N_HEAD_KV)
    t.w.add_feed_forward_length(N_FF)
    t.w.add_full_attention_interval(4)
    t.add_ssm(4*N_STATE, 4, N_GROUP)
    if next_gen:
        t.add_experts()
        t.w.add_expert_shared_feed_forward_length(N_FF)
    t.norms("", "output_norm")
    for i in range(t.n_layer):
        b = f"blk.{i}."
        t.norms(b, "attn_norm", "post_attention_norm")
        if every_fourth(i):
            t.attention(b, n_q=2)
            t.norms(b, "attn_q_norm", "attn_k_norm", n=t.head_dim)
        else:
            t.delta_net(b, next_gen)
        if next_gen:
            t.experts(b, shared=True)
            t.put(b + "ffn_gate_inp_shexp.weight", N_EMBD)
        else:
            t.swiglu(b)


def granite_hybrid(t: Tensors) -> None:
    """Mamba 2, and every fourth layer attends (nine to one in Granite 4)."""
    t.heads()
    t.heads_kv(every_fourth)
    t.w.add_feed_forward_length(N_FF)
    t.add_ssm(2*N_EMBD, 4, N_GROUP)
    t.norms("", "output_norm")
    for i in range(t.n_layer):
        b = f"blk.{i}."
        t.norms(b, "attn_norm", "ffn_norm")
        t.attention(b) if every_fourth(i) else t.mamba2(b)
        t.swiglu(b)


def falcon_h1(t: Tensors) -> None:
    """Every layer is both."""
    t.heads()
    t.w.add_head_count_kv(N_HEAD_KV)
    t.w.add_feed_forward_length(N_FF)
    t.add_ssm(N_EMBD, 4, N_GROUP)
    t.norms("", "output_norm")
    for i in range(t.n_layer):
        b = f"blk.{i}."
        t.norms(b, "attn_norm")
        t.ones(b + "ffn_norm", N_EMBD)  # without .weight
        t.attention(b)
        t.mamba2(b, N_EMBD)
        t.swiglu(b)


def jamba(t: Tensors) -> None:
    """Mamba, and every fourth layer attends (seven to one in Jamba)."""
    t.head_dim = N_EMBD//N_HEAD
    t.heads()
    t.heads_kv(every_fourth)
    t.w.add_feed_forward_length(N_FF)
    t.add_ssm(2*N_EMBD, 4, 0)
    t.norms("", "output_norm")
    for i in range(t.n_layer):
        b = f"blk.{i}."
        t.norms(b, "attn_norm", "ffn_norm")
        t.attention(b) if every_fourth(i) else t.mamba(b)
        t.swiglu(b)


def nemotron_h(t: Tensors) -> None:
    """A layer is Mamba 2, a feed-forward or attention."""
    kinds = ["M-M*"[i % 4] for i in range(t.n_layer)]
    t.heads()
    t.heads_kv(lambda i: kinds[i] == "*")
    t.w.add_feed_forward_length([N_FF if kind == "-" else 0 for kind in kinds])
    t.w.add_layer_norm_eps(1e-5)
    t.add_ssm(2*N_EMBD, 4, N_GROUP)
    t.norms("", "output_norm")
    for i, kind in enumerate(kinds):
        b = f"blk.{i}."
        t.norms(b, "attn_norm")
        if kind == "M":
            t.mamba2(b)
        elif kind == "*":
            t.attention(b)
        else:
            t.put(b + "ffn_up.weight", N_FF, N_EMBD)
            t.put(b + "ffn_down.weight", N_EMBD, N_FF)


def lfm2(t: Tensors) -> None:
    """Short convolutions, and every fourth layer attends."""
    t.head_dim = N_EMBD//N_HEAD
    t.heads()
    t.heads_kv(every_fourth)
    t.w.add_feed_forward_length(N_FF)
    t.w.add_shortconv_l_cache(3)
    t.norms("", "token_embd_norm")
    for i in range(t.n_layer):
        b = f"blk.{i}."
        t.norms(b, "attn_norm", "ffn_norm")
        if every_fourth(i):
            t.attention(b)
            t.norms(b, "attn_q_norm", "attn_k_norm", n=t.head_dim)
        else:
            t.put(b + "shortconv.conv.weight", N_EMBD, 3)
            t.put(b + "shortconv.in_proj.weight", 3*N_EMBD, N_EMBD)
            t.put(b + "shortconv.out_proj.weight", N_EMBD, N_EMBD)
        t.swiglu(b)


def gemma4(t: Tensors, n_shared: int = 0) -> None:
    """A global layer after five with a window of 32: larger heads, fewer of them, and values are the keys before their norm. n_shared (as in E2B
    and E4B): of the last layers, which read the caches of the last global one and the last window before them."""
    n_each = 16 if n_shared else 0  # of an embedding for each layer
    windows = [i % 6 != 5 for i in range(t.n_layer)]
    t.heads()
    t.w.add_key_length_swa(16)
    t.w.add_value_length_swa(16)
    t.w.add_sliding_window(32)
    t.w.add_sliding_window_pattern(windows)
    t.w.add_embedding_length_per_layer_input(n_each)
    t.w.add_shared_kv_layers(n_shared)
    t.w.add_head_count_kv([4 if window else N_HEAD_KV for window in windows])
    t.w.add_feed_forward_length(N_FF)
    t.w.add_rope_dimension_count(t.head_dim)
    t.w.add_rope_dimension_count_swa(16)
    t.norms("", "output_norm")
    t.w.add_tensor("rope_freqs.weight", np.repeat([1, 1e30], t.head_dim//4).astype(np.float32))  # a part of a head is not rotated
    if n_each:
        t.per_layer(n_each)
    for i, window in enumerate(windows):
        b, d = f"blk.{i}.", 16 if window else t.head_dim
        t.norms(b, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        t.norms(b, "attn_q_norm", "attn_k_norm", n=d)
        t.attention(b, d, 4 if window else N_HEAD_KV, v=window)
        t.swiglu(b)
        if n_each:
            t.per_layer_of(b, n_each)


def gemma3n(t: Tensors) -> None:
    """A global layer after four with a window of 32. From layer 20 on they read the caches of layers 18 and 19."""
    n_each, n_altup, n_laurel = 256, 4, 64  # as llama.cpp has them
    t.heads()
    t.w.add_sliding_window(32)
    t.w.add_sliding_window_pattern([i % 5 != 4 for i in range(t.n_layer)])
    t.w.add_head_count_kv(N_HEAD_KV)
    t.w.add_feed_forward_length(N_FF)
    t.norms("", "output_norm")
    t.per_layer(n_each)
    t.put("altup_proj.weight", n_altup - 1, N_EMBD, N_EMBD)
    t.put("altup_unembd_proj.weight", n_altup - 1, N_EMBD, N_EMBD)
    for i in range(t.n_layer):
        b = f"blk.{i}."
        t.norms(b, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "altup_correct_scale", "altup_router_norm", "laurel_post_norm")
        t.norms(b, "attn_q_norm", "attn_k_norm", n=t.head_dim)
        t.attention(b)
        t.swiglu(b)
        t.per_layer_of(b, n_each)
        t.put(b + "altup_correct_coef.weight", n_altup, n_altup)
        t.put(b + "altup_predict_coef.weight", n_altup**2, n_altup)
        t.put(b + "altup_router.weight", n_altup, N_EMBD)
        t.put(b + "laurel_l.weight", n_laurel, N_EMBD)
        t.put(b + "laurel_r.weight", N_EMBD, n_laurel)


def qwen3(t: Tensors, vision: bool = False) -> None:
    """Norms of queries and keys; experts, or positions of four components (vision)."""
    t.heads(sections=[6, 4, 6, 0] if vision else None)
    t.w.add_head_count_kv(N_HEAD_KV)
    t.w.add_feed_forward_length(N_FF)
    if not vision:
        t.add_experts()
    t.norms("", "output_norm")
    for i in range(t.n_layer):
        b = f"blk.{i}."
        t.norms(b, "attn_norm", "ffn_norm")
        t.norms(b, "attn_q_norm", "attn_k_norm", n=t.head_dim)
        t.attention(b)
        t.swiglu(b) if vision else t.experts(b)


def llama4(t: Tensors) -> None:
    """Every fourth layer is global and has no RoPE; the others see chunks of 8,192. Queries and keys are normed behind
    RoPE."""
    t.heads()
    t.w.add_head_count_kv(N_HEAD_KV)
    t.w.add_feed_forward_length(N_FF)
    t.w.add_interleave_moe_layer_step(1)
    t.add_experts()
    t.norms("", "output_norm")
    for i in range(t.n_layer):
        b = f"blk.{i}."
        t.norms(b, "attn_norm", "ffn_norm")
        t.attention(b)
        t.experts(b, shared=True)


def phi3(t: Tensors) -> None:
    """Queries, keys and values of one matrix, gate and up of another."""
    t.head_dim = N_EMBD//N_HEAD
    t.heads(n_rot=t.head_dim)
    t.w.add_head_count_kv(N_HEAD_KV)
    t.w.add_feed_forward_length(N_FF)
    t.w.add_rope_scaling_orig_ctx_len(4096)
    t.norms("", "output_norm")
    for i in range(t.n_layer):
        b = f"blk.{i}."
        t.norms(b, "attn_norm", "ffn_norm")
        t.put(b + "attn_qkv.weight", (N_HEAD + 2*N_HEAD_KV)*t.head_dim, N_EMBD)
        t.put(b + "attn_output.weight", N_EMBD, N_EMBD)
        t.put(b + "ffn_up.weight", 2*N_FF, N_EMBD)
        t.put(b + "ffn_down.weight", N_EMBD, N_FF)


def deepseek2(t: Tensors, n_draft: int = 0) -> None:
    """A latent row for a token and layer, which keys and values of all heads are made from; the first layer is dense, the
    others have experts, one for every token. n_draft: of the last layers, which draft (MTP)."""
    t.add_latent()
    if n_draft:
        t.w.add_nextn_predict_layers(n_draft)
    t.w.add_q_lora_rank(48)
    t.w.add_leading_dense_block_count(1)
    t.w.add_feed_forward_length(N_FF)
    t.add_experts()
    t.w.add_expert_shared_count(1)
    t.w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    t.w.add_rope_scaling_factor(4)
    t.w.add_rope_scaling_orig_ctx_len(1024)
    t.w.add_rope_scaling_yarn_log_mul(0.1*0.707)
    t.norms("", "output_norm")
    for i in range(t.n_layer):
        b = f"blk.{i}."
        t.norms(b, "attn_norm", "ffn_norm")
        t.latent(b, 48)
        t.experts(b, shared=True) if i else t.swiglu(b)
        if i >= t.n_layer - n_draft:
            t.put(b + "nextn.eh_proj.weight", N_EMBD, 2*N_EMBD)
            t.norms(b, "nextn.enorm", "nextn.hnorm")


def kimi_linear(t: Tensors) -> None:
    """Three layers of a delta net to one with latent rows, which are not rotated."""
    t.add_latent([int(every_fourth(i)) for i in range(t.n_layer)])
    t.w.add_kda_head_dim(N_STATE)
    t.w.add_ssm_conv_kernel(N_CONV)
    t.w.add_leading_dense_block_count(1)
    t.w.add_feed_forward_length(N_FF)
    t.add_experts()
    t.w.add_expert_shared_count(1)
    t.w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    t.norms("", "output_norm")
    t.put("output.weight", t.n_vocab, N_EMBD)
    for i in range(t.n_layer):
        b = f"blk.{i}."
        t.norms(b, "attn_norm", "ffn_norm")
        t.latent(b) if every_fourth(i) else t.kimi_delta(b)
        if i == 0:
            t.swiglu(b)
        else:
            t.experts(b, shared=True)
            t.put(b + "exp_probs_b.bias", N_EXPERT)


HYBRID = {"qwen35": qwen35, "qwen3next": lambda t: qwen35(t, True), "granitehybrid": granite_hybrid, "falcon-h1": falcon_h1, "jamba": jamba,
          "nemotron_h": nemotron_h, "lfm2": lfm2, "kimi-linear": kimi_linear}
LATENT = {"deepseek2": deepseek2, "kimi-linear": kimi_linear}  # rows that are keys and values at once
SHARED = {"gemma4:shared": lambda t: gemma4(t, 6), "gemma3n": gemma3n}  # caches that several layers read
OTHERS = {"gemma4": gemma4, **SHARED, "deepseek2": deepseek2, "qwen3vl": lambda t: qwen3(t, True), "qwen3moe": qwen3, "llama4": llama4, "phi3": phi3}
WRITE = HYBRID | OTHERS
DRAFTS = {"deepseek2:draft": lambda t: deepseek2(t, 1)}  # whose last layer drafts
N_LAYER = {**dict.fromkeys(WRITE, 8), "gemma4": 12, "gemma4:shared": 12, "gemma3n": 30, "falcon-h1": 3, "qwen3vl": 3, "qwen3moe": 3, "phi3": 3, "deepseek2": 4}
