"""Do pykvc and kvpress 0.5.5 keep the same tokens? A check by hand, not in CI: it needs torch.

    pip install '.[kvpress]'       # a virtual environment of its own; its torch may be CUDA's
    python evals/tools/compare_kvpress.py --model smollm2-135m.gguf --tokens 2000 --budgets 256,512

One GGUF is dequantised twice: to an F32 GGUF for pykvc, and into a float32 transformers LlamaForCausalLM. Both read the
same tokens; one forward pass with hooks asks every press what it keeps. `--capture` stops after the torch half and
`--resume` starts from what it saved, so the halves may run in different environments.

What the table's rows compare, and where kvpress differs from the policy of the same name:

- keydiff, streaming_llm, tova: the same rule. - knorm: the same rule. In layer 0 a key's norm depends on the token
alone, for rotation keeps it: equal tokens tie but for
  the last bit, and which of them stay is a matter of rounding there.
- snapkv: the same rule with kvpress' parameters, window 64 and kernel 5. - pyramidkv: the selection only. kvpress'
budgets take b = B where the authors (and pykvc) take b = B - w, put the window
inside the pyramid, and fall back to SnapKV unless the last layer keeps at least the window: at b / beta >= 64 or where
  the longest layer is capped. So the press gets pykvc's budgets, and "own budgets" shows what it would have kept.
- chunkkv: chunks of 20. As published, kvpress scores pooled attention, lays chunks over the window too (with 64 = 3.2
  chunks, the chunk on the border lives with the window) and keeps a share of the chunks, so the number of tokens is not
  exact: the overlap may be below 100 % by rule. "aligned" uses window 60, and token counts and budgets that are
  multiples of 20: there both rules agree.
- expected_attention: the same rule with a window as long as the prompt, for kvpress fits the queries of all of it but
the sinks.
"""
import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

WINDOW, KERNEL, BETA, CHUNK = 64, 5, 20, 20
MAX_TOKENS = 4096  # the longest window of expected_attention
SPECS = {
    "knorm": "knorm",
    "keydiff": "keydiff:share=head",
    "streaming_llm": "streaming_llm:sinks=4",
    "tova": "tova",
    "snapkv": f"snapkv:window={WINDOW},kernel={KERNEL},pool=avg",
    "pyramidkv": f"pyramidkv:window={WINDOW},kernel={KERNEL},pool=avg,beta={BETA}",
    "chunkkv": f"chunkkv:window={WINDOW},chunk={CHUNK},pool=avg,kernel={KERNEL}",
    "chunkkv aligned": f"chunkkv:window=60,chunk={CHUNK},pool=none",
    "expected_attention": f"expected_attention:window={MAX_TOKENS},recent=0",
}


# -- the weights ----------------------------------------------------------------------------------------------------

def write_f32(src: Path, dst: Path) -> None:
    """The same GGUF with every tensor dequantised to F32."""
    import gguf
    reader = gguf.GGUFReader(src)
    writer = gguf.GGUFWriter(dst, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=sub)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for t in reader.tensors:
        writer.add_tensor(t.name, gguf.dequantize(t.data, t.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_hf(path: Path):
    """transformers' Llama or Qwen2 in float32. llama.cpp stores Llama's Q and K with the two halves of each rotary pair
    interleaved."""
    import gguf
    import torch
    import transformers
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    meta = {k.removeprefix(f"{arch}."): f.contents() for k, f in reader.fields.items() if k.startswith(f"{arch}.")}
    if arch not in ("llama", "qwen2") or any("rope.scaling" in k for k in meta):
        sys.exit("compare_kvpress: only plain llama and qwen2 models, without rope scaling.")
    weight = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).astype(np.float32))
              for t in reader.tensors}
    n_head, n_head_kv = meta["attention.head_count"], meta["attention.head_count_kv"]
    name = {"llama": "Llama", "qwen2": "Qwen2"}[arch]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=weight["token_embd.weight"].shape[0], hidden_size=meta["embedding_length"],
        intermediate_size=meta["feed_forward_length"], num_hidden_layers=meta["block_count"],
        num_attention_heads=n_head, num_key_value_heads=n_head_kv, max_position_embeddings=meta["context_length"],
        rms_norm_eps=meta["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["rope.freq_base"]},
        tie_word_embeddings="output.weight" not in weight, bos_token_id=None, eos_token_id=None)

    def halves(w, heads):
        return w.reshape(heads, w.shape[0] // heads // 2, 2,
                         -1).swapaxes(1, 2).reshape(w.shape) if arch == "llama" else w

    state = {"model.embed_tokens.weight": weight["token_embd.weight"],
             "model.norm.weight": weight["output_norm.weight"],
             "lm_head.weight": weight.get("output.weight", weight["token_embd.weight"])}
    names = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
             "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
             "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    heads = {"attn_q": n_head, "attn_k": n_head_kv}
    for il in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            for part in ("weight", "bias"):
                if (w := weight.get(f"blk.{il}.{ours}.{part}")) is not None:
                    state[f"model.layers.{il}.{theirs}.{part}"] = halves(w, heads[ours]) if ours in heads else w
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    model.load_state_dict(state, strict=True)
    return model


def read_tokens(path: Path, n: int, text: Path | None) -> np.ndarray:
    """Real text in the model's vocabulary; pykvc tokenises it where it is there, else gguf's vocabulary, greedily."""
    raw = text.read_text() if text else made_up(n)
    try:
        from pykvc import _core
        tokens = _core.Model(str(path), vocab_only=True).tokenize(raw.encode())
    except ImportError:
        tokens = longest_match(path, raw)
    if len(tokens) < n:
        sys.exit(f"compare_kvpress: the text has {len(tokens)} tokens, --tokens asks for {n}.")
    return np.array(tokens[:n], dtype=np.int32)


def made_up(n: int) -> str:
    """Sentences that repeat their shape and not their facts."""
    rng = np.random.default_rng(0)
    who = ["The harbour master", "A gardener", "My aunt", "The clerk of the court", "An old sailor", "The baker",
           "Our teacher"]
    did = ["counted", "hid", "repaired", "described", "sold", "drew", "forgot", "borrowed"]
    what = ["letters", "lanterns", "copper kettles", "maps of the coast", "apple trees", "clocks", "ledgers",
            "wooden boats"]
    when = ["before the storm", "on a cold morning", "in the year of the flood", "while nobody looked",
            "after the fair"]
    pick = lambda xs: xs[rng.integers(len(xs))]
    return " ".join(f"{pick(who)} {pick(did)} {rng.integers(2, 400)} {pick(what)} {pick(when)}, "
                    f"and said so to number {rng.integers(1, 99)}."
                    for _ in range(n // 10))


def longest_match(path: Path, raw: str) -> list[int]:
    """Not the real merges, but tokens of the model that spell the text: enough to compare two engines."""
    import gguf
    vocab = {t: i for i, t in enumerate(gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents())}
    raw, out, at = raw.replace(" ", "Ġ").replace("\n", "Ċ"), [], 0
    while at < len(raw):
        end = next((e for e in range(min(len(raw), at + 24), at, -1) if raw[at:e] in vocab), None)
        if end is None:
            at += 1  # not in the vocabulary
            continue
        out.append(vocab[raw[at:end]])
        at = end
    return out


# -- kvpress ---------------------------------------------------------------------------------------------------------

def pyramid(n: int, w: int, n_layer: int, budget: int) -> list[int]:
    """pykvc's budgets: the authors' rule, rounded down, the slots left over to the first layers with room."""
    b = budget - w
    low = b / BETA
    high = 2 * b - low
    if high >= n - w:
        high, low = n - w, 2 * b - (n - w)
    out = [int(w + high - il * (high - low) / max(1, n_layer - 1) + 1e-9) for il in range(n_layer)]
    while sum(out) < n_layer * budget:
        room = [il for il in range(n_layer) if out[il] < n][:n_layer * budget - sum(out)]
        for il in room:
            out[il] += 1
    return out


def torch_half(model_path: Path, tokens: np.ndarray, budgets: list[int]) -> dict[str, np.ndarray]:
    """One forward pass; at each layer every press compresses the same keys, and the rows it returns are looked up."""
    import torch
    from kvpress import (BasePress, ChunkKVPress, ExpectedAttentionPress, KeyDiffPress, KnormPress, PyramidKVPress,
                         SnapKVPress, StreamingLLMPress, TOVAPress)
    from transformers import DynamicCache
    model = load_hf(model_path)
    n, n_layer = len(tokens), model.config.num_hidden_layers
    out: dict[str, list] = {}

    class OurPyramid(PyramidKVPress):
        budget = 0

        def get_layer_budget(self, module, q_len):
            return pyramid(q_len, self.window_size, n_layer, self.budget)[module.layer_idx]

    def presses(budget):
        r = 1 - (budget + 0.5) / n  # int(n * (1 - r)) is the budget
        ours = OurPyramid(r, WINDOW, KERNEL, BETA)
        ours.budget = budget
        yield "knorm", KnormPress(r)
        yield "keydiff", KeyDiffPress(r)
        yield "streaming_llm", StreamingLLMPress(r, n_sink=4)
        yield "tova", TOVAPress(r)
        yield "snapkv", SnapKVPress(r, WINDOW, KERNEL)
        yield "pyramidkv", ours
        yield "pyramidkv own budgets", PyramidKVPress(1 - budget / n, WINDOW, KERNEL, BETA)
        yield "chunkkv", ChunkKVPress(SnapKVPress(r, WINDOW, KERNEL), CHUNK)
        yield "chunkkv aligned", ChunkKVPress(SnapKVPress(r, 60, 1), CHUNK)
        yield "expected_attention", ExpectedAttentionPress(r)

    class Ask(BasePress):
        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            index = [{row.tobytes(): j for j, row in enumerate(head.numpy())} for head in keys[0]]
            if any(len(rows) != n for rows in index):
                sys.exit(f"compare_kvpress: layer {module.layer_idx} has two equal keys, kept rows cannot be told "
                         "apart.")
            for budget in budgets:
                for name, press in presses(budget):
                    kept, _ = press.compress(module, hidden_states, keys, values, attentions, kwargs)
                    rows = [sorted(index[h][row.tobytes()] for row in head.numpy()) for h, head in enumerate(kept[0])]
                    out.setdefault(f"{name}|{budget}", []).append(np.array(rows, dtype=np.int32))
            return keys, values

    with torch.no_grad(), Ask()(model):
        logits = model(torch.from_numpy(tokens[None].astype(np.int64)), past_key_values=DynamicCache(),
                       logits_to_keep=1).logits
    save = {"tokens": tokens, "budgets": np.array(budgets), "logits": logits[0, -1].numpy()}
    for key, layers in out.items():  # layers differ in length: one flat array, [layer][head][slot]
        save[key] = np.concatenate([x.ravel() for x in layers])
        save[key + "|kept"] = np.array([x.shape[1] for x in layers])
    save["n_head_kv"] = np.array(model.config.num_key_value_heads)
    return save


def layers_of(saved, name: str, budget: int) -> list[np.ndarray]:
    flat, kept, n_head_kv = saved[f"{name}|{budget}"], saved[f"{name}|{budget}|kept"], int(saved["n_head_kv"])
    return [x.reshape(n_head_kv, -1) for x in np.split(flat, np.cumsum(kept * n_head_kv)[:-1])]


# -- pykvc and the table ---------------------------------------------------------------------------------------------

def pykvc_half(f32_path: Path, tokens: np.ndarray, spec: str, budgets: list[int]):
    """One prefill for all budgets: plans from the scores, and the last of them carried out to see that evict()
    agrees."""
    from pykvc import _core
    model = _core.Model(str(f32_path))
    ctx = _core.Context(model, n_ctx=len(tokens) + 64, type_k="f32", type_v="f32", flash_attn="off", policy=spec,
                        budget=str(budgets[-1]))
    ctx.decode(tokens)
    logits, scores = ctx.logits()[-1].copy(), ctx.scores()
    pos = [np.tile(np.arange(len(tokens), dtype=np.int32), (model.n_head_kv, 1))] * len(scores)
    kept = {budget: _core.plan(spec, pos, scores, budget) for budget in budgets}
    ctx.evict()
    for il, (planned, held) in enumerate(zip(kept[budgets[-1]], ctx.kept(), strict=True)):
        if not np.array_equal(planned, held):
            sys.exit(f"compare_kvpress: {spec} holds other tokens in layer {il} than it planned.")
    return kept, logits


def overlap(ours: list[np.ndarray], theirs: list[np.ndarray]) -> list[float]:
    """A layer and head: the share of positions both keep, of the larger set."""
    return [len(np.intersect1d(a, b)) / max(len(a), len(b)) for x, y in zip(ours, theirs, strict=True)
            for a, b in zip(x, y, strict=True)]


def table(saved, f32_path: Path) -> None:
    tokens, budgets, difference = saved["tokens"], [int(b) for b in saved["budgets"]], []
    print("| method | budget | equal kept positions, % | heads all equal, % | lowest head, % | kvpress keeps |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, spec in SPECS.items():
        kept, logits = pykvc_half(f32_path, tokens, spec, budgets)
        difference.append(np.abs(logits - saved["logits"]).max())
        for budget in budgets:
            theirs = layers_of(saved, name, budget)
            share = np.array(overlap(kept[budget], theirs))
            print(f"| {name} | {budget} | {100 * share.mean():.3f} | {100 * (share == 1).mean():.1f} "
                  f"| {100 * share.min():.2f} | {np.mean([x.shape[1] for x in theirs]):.1f} |", flush=True)
    print()
    for budget in budgets:
        own = saved[f"pyramidkv own budgets|{budget}|kept"]
        print(f"kvpress' own pyramid for {budget}: {own.max()} to {own.min()} a layer"
              + (", which is SnapKV" if len(set(own)) == 1 else ""))
    print(f"the last token's logits differ by {max(difference):.2e} at most, of {np.abs(saved['logits']).max():.1f}")


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--model", type=Path, required=True, help="a GGUF of the llama architecture")
    cli.add_argument("--tokens", type=int, default=2000, help="prompt length; a multiple of 20 for 'chunkkv aligned'")
    cli.add_argument("--budgets", default="256,512", help="tokens kept a layer, with commas")
    cli.add_argument("--text", type=Path, help="read the prompt from this file instead of made-up prose")
    cli.add_argument("--work", type=Path, default=Path(tempfile.gettempdir())/"compare_kvpress",
                     help="folder of the F32 GGUF and the capture")
    cli.add_argument("--capture", action="store_true", help="the torch half only")
    cli.add_argument("--resume", action="store_true", help="the pykvc half only, from the capture")
    args = cli.parse_args()
    budgets = [int(b) for b in args.budgets.split(",")]
    if min(budgets) <= WINDOW or max(budgets) >= args.tokens:
        cli.error(f"--budgets must lie above the window, {WINDOW}, and below --tokens, {args.tokens}")
    if args.tokens > MAX_TOKENS:
        cli.error(f"--tokens: at most {MAX_TOKENS}, which expected_attention can fit")
    args.work.mkdir(parents=True, exist_ok=True)
    f32_path, saved_path = args.work / f"{args.model.stem}-f32.gguf", args.work / "kvpress.npz"
    if not f32_path.exists():
        write_f32(args.model, f32_path)
    if not args.resume:
        np.savez_compressed(saved_path,
                            **torch_half(args.model, read_tokens(args.model, args.tokens, args.text), budgets))
        print(f"wrote {saved_path}")
    if not args.capture:
        table(np.load(saved_path), f32_path)


if __name__ == "__main__":
    main()
