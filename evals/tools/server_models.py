"""Stand-ins for the models that llama-server's own tests download: random weights of the same kinds, with the real
tokenizers' tokens."""
from pathlib import Path

import gguf
import numpy as np

import tiny  # of tests/, which server_suite puts on the path


def text(path: Path, vocab: Path, arch: str = "llama") -> None:
    """A model of three layers (gemma3: six, one without a window) and the 512 tokens of `small`."""
    tiny.write(path, arch, n_layer=6 if arch == "gemma3" else 3, n_vocab=512, tokenizer=tokenizer(vocab, small(vocab)))


def encoder(path: Path, vocab: Path, pooling: gguf.PoolingType, n: int = 64, n_ctx: int = 1024) -> None:
    """A BERT of two layers; with RANK a head that scores."""
    w = gguf.GGUFWriter(path, "bert")
    tokenizer(vocab)(w)
    w.add_context_length(n_ctx)
    w.add_embedding_length(n)
    w.add_block_count(2)
    w.add_feed_forward_length(2*n)
    w.add_head_count(4)
    w.add_layer_norm_eps(1e-12)
    w.add_causal_attention(False)
    w.add_pooling_type(pooling)
    shapes = {"token_embd": (len(tokens(vocab)), n), "position_embd": (n_ctx, n), "token_types": (2, n),
              "token_embd_norm": (n,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": (n, n) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{i}.ffn_up": (2*n, n), f"blk.{i}.ffn_down": (n, 2*n)}
        shapes |= {f"blk.{i}.{name}": (n,) for name in ("attn_output_norm", "layer_output_norm")}
    if pooling == gguf.PoolingType.RANK:
        shapes |= {"cls": (n, n), "cls.output": (1, n)}
    for name in [name for name, shape in shapes.items() if len(shape) == 1]:
        w.add_tensor(name + ".bias", np.zeros(n, np.float32))
    finish(w, {name + ".weight": shape for name, shape in shapes.items()})


def images(path: Path, n: int = 64, side: int = 64, patch: int = 8, n_out: int = tiny.N_EMBD) -> None:
    """SigLIP of two layers and gemma3's projector: an image is (side/patch/2)^2 tokens."""
    w = gguf.GGUFWriter(path, "clip")
    w.add_clip_has_vision_encoder(True)
    w.add_clip_projector_type("gemma3")
    w.add_vision_image_size(side)
    w.add_vision_patch_size(patch)
    w.add_vision_embedding_length(n)
    w.add_vision_feed_forward_length(2*n)
    w.add_vision_projection_dim(n_out)
    w.add_vision_block_count(2)
    w.add_vision_head_count(4)
    w.add_vision_attention_layernorm_eps(1e-6)
    w.add_vision_image_mean([0.5]*3)
    w.add_vision_image_std([0.5]*3)
    w.add_vision_use_gelu(True)
    w.add_uint32("clip.vision.projector.scale_factor", 2)
    shapes = {"v.patch_embd": (n, 3, patch, patch), "v.position_embd": ((side//patch)**2, n), "v.post_ln": (n,),
              "mm.input_projection": (n, n_out), "mm.soft_emb_norm": (n,)}
    for i in range(2):
        shapes |= {f"v.blk.{i}.{name}": (n, n) for name in ("attn_q", "attn_k", "attn_v", "attn_out")}
        shapes |= {f"v.blk.{i}.ffn_up": (2*n, n), f"v.blk.{i}.ffn_down": (n, 2*n), f"v.blk.{i}.ln1": (n,),
                   f"v.blk.{i}.ln2": (n,)}
    finish(w, {name + ".weight": shape for name, shape in shapes.items()})


def adapter(path: Path, base: Path, rank: int = 4) -> None:
    """A LoRA adapter of every query projection of base, a llama."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", rank)
    shapes = {}
    for t in gguf.GGUFReader(base).tensors:
        if t.name.endswith("attn_q.weight"):
            shapes |= {t.name + ".lora_a": (rank, int(t.shape[0])), t.name + ".lora_b": (int(t.shape[1]), rank)}
    finish(w, shapes)


def tokens(vocab: Path) -> list[str]:
    return gguf.GGUFReader(vocab).fields["tokenizer.ggml.tokens"].contents()


def small(vocab: Path) -> list[int]:
    """512 of llama's tokens, as many as stories260K has: control, bytes, letters, and the first merges."""
    all = tokens(vocab)
    letters = [i for i in range(259, len(all)) if len(all[i]) == 1][:90]
    merges = [i for i in range(259, 1000) if all[i].strip("▁") and i not in letters]
    return [*range(259), *merges[:512 - 259 - len(letters)], *letters]


def tokenizer(vocab: Path, ids: list[int] | None = None):
    """Writes the tokenizer of a GGUF file, or only these of its tokens."""
    def write(w: gguf.GGUFWriter) -> None:
        for key, field in gguf.GGUFReader(vocab).fields.items():
            value = field.contents()
            if key.startswith("tokenizer."):
                value = [value[i] for i in ids] if ids and isinstance(value, list) else value
                w.add_key_value(key, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    return write


def finish(w: gguf.GGUFWriter, shapes: dict[str, tuple[int, ...]]) -> None:
    """Random matrices and norms of one, in numpy's order of dimensions."""
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        n_in = np.prod(shape[1:])
        w.add_tensor(name, np.ones(shape, np.float32) if len(shape) == 1
                     else (rng.standard_normal(shape)*n_in**-0.5).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
