"""Do pykvc's kvzip and kvpress 0.5.5's KVzipPress score and keep the same tokens? A check by hand, not in CI: it needs
torch.

    pip install '.[kvpress]'
    python evals/tools/compare_kvzip.py --model smollm2-135m.gguf --tokens 2000 --removed 0.5,0.75

One GGUF, as compare_kvpress.py has it: an F32 GGUF for pykvc, a float32 transformers model for kvpress. Both read the
same tokens and repeat them in the same chunks, behind the same request and the same turn markers. Compared:

- share=head with the best of their scores in each head (kvpress has no such share),
- share=layer with layerwise=True, share=all with their default,
- kvzip with kvzip_plus_normalization=False, kvzip:plus=1 with True.

What differs by rule: pykvc keeps one token at least in every head, and its last `recent` tokens, 0 here.
"""
import argparse
import tempfile
from pathlib import Path

import numpy as np
from compare_kvpress import load_hf, overlap, read_tokens, write_f32

SHARES = {"head": None, "layer": True, "all": False}  # KVzipPress(layerwise=)


class Words:
    """What KVzipPress asks a tokenizer, in the vocabulary of a GGUF."""
    chat_template = "of the GGUF"

    def __init__(self, path: Path) -> None:
        from pykvc import _core, chat
        self.model = _core.Model(str(path), vocab_only=True)
        self.suffix = chat.turn_end(self.model)

    def apply_chat_template(self, messages, **how) -> str:
        return messages[0]["content"] + self.suffix  # nothing before the context: the tokens are all of it

    def encode(self, text: str, **how):
        import torch
        return torch.tensor([list(self.model.tokenize(text.encode(), False))], dtype=torch.long)


def torch_half(path: Path, tokens: np.ndarray, removed: list[float], chunk: int) -> dict[str, np.ndarray]:
    """scores|PLUS F32 [n_layer, n_head_kv, n] and, by plus, share and ratio, the mask of what is kept, of that
    shape."""
    import kvpress.presses.kvzip_press as theirs
    import torch
    from transformers import DynamicCache
    model, words, n = load_hf(path), Words(path), len(tokens)
    theirs.AutoTokenizer = type("Tokenizers", (), {"from_pretrained": staticmethod(lambda name: words)})
    found = {}

    class Press(theirs.KVzipPress):
        def compress_post(self, model):
            scores, plus = self.score_val.clone(), int(self.kvzip_plus_normalization)
            found[f"scores|{plus}"] = scores[:, 0].numpy()
            for self.layerwise in (True, False):
                for self.compression_ratio in removed:
                    self.score_val = scores.clone()
                    super().compress_post(model)
                    kept = np.ones(found[f"scores|{plus}"].shape, bool)
                    for il, layer in enumerate(model.model.layers):
                        _, heads, slots = layer.self_attn.masked_key_indices
                        kept[il, heads.numpy(), slots.numpy()] = False
                        layer.self_attn.masked_key_indices = None
                    found[f"kept|{plus}|{self.layerwise}|{self.compression_ratio}"] = kept

    for plus in (False, True):
        press = Press(compression_ratio=removed[0], chunk_size=chunk, kvzip_plus_normalization=plus)
        with torch.no_grad(), press(model):
            model.model(input_ids=torch.from_numpy(tokens[None].astype(np.int64)), past_key_values=DynamicCache())
    assert n == found["scores|0"].shape[2]
    return found


def best(scores: np.ndarray, n_keep: int) -> list[list[np.ndarray]]:
    """Of each layer and head the positions of the n_keep best, the sinks first."""
    scores = scores.copy()
    scores[..., :4] = np.inf
    return [[np.sort(np.argsort(-head, kind="stable")[:n_keep]) for head in layer] for layer in scores]


def compare(f32_path: Path, tokens: np.ndarray, saved: dict[str, np.ndarray], removed: list[float], chunk: int) -> None:
    import pykvc
    from pykvc import _core
    print("| method | share | removed | equal kept positions, % | lowest head, % "
          "| scores: median relative difference |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for plus in (0, 1):
        spec = f"kvzip:chunk={chunk},plus={plus},recent=0,sinks=4"
        with pykvc.LLM(f32_path, kv_policy=f"{spec},share=all", kv_budget=0.5,
                       n_ctx=len(tokens) + chunk + 128, type_k="f32", type_v="f32", flash_attn=False) as llm:
            llm.prefill(tokens=tokens.tolist())
            llm._session.ask()
            scores = llm._session.ctx.scores()
        theirs = saved[f"scores|{plus}"]
        ours = np.stack(scores)
        seen = theirs > 0
        difference = np.median(np.abs(ours[seen] - theirs[seen])/theirs[seen])
        pos = [np.tile(np.arange(len(tokens), dtype=np.int32), (ours.shape[1], 1))]*len(scores)
        for share, layerwise in SHARES.items():
            for ratio in removed:
                n_keep = round(len(tokens)*(1 - ratio))
                planned = _core.plan(f"{spec},share={share}", pos, scores, n_keep)
                kept = [[head[head >= 0] for head in layer] for layer in planned]
                if layerwise is None:
                    others = best(theirs, n_keep)
                else:
                    others = [[np.flatnonzero(head) for head in layer]
                              for layer in saved[f"kept|{plus}|{layerwise}|{ratio}"]]
                same = sum(len(np.intersect1d(a, b)) for x, y in zip(kept, others) for a, b in zip(x, y))
                most = max(sum(len(a) for x in some for a in x) for some in (kept, others))
                print(f"| kvzip{':plus=1'*plus} | {share} | {ratio} | {100*same/most:.3f} "
                      f"| {100*min(overlap(kept, others)):.2f} | {difference:.1e} |", flush=True)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--model", type=Path, required=True, help="a GGUF of the llama or qwen2 architecture")
    cli.add_argument("--tokens", type=int, default=2000, help="of the context")
    cli.add_argument("--removed", default="0.5,0.75", help="shares of the cache that are removed, with commas")
    cli.add_argument("--chunk", type=int, default=2048, help="tokens that are repeated at once")
    cli.add_argument("--text", type=Path, help="read the context from this file instead of made-up prose")
    cli.add_argument("--work", type=Path, default=Path(tempfile.gettempdir())/"compare_kvpress",
                     help="folder of the F32 GGUF")
    args = cli.parse_args()
    removed = [float(r) for r in args.removed.split(",")]
    if not all(0 < r < 1 for r in removed):
        cli.error(f"--removed: shares between 0 and 1, not {args.removed}")
    args.work.mkdir(parents=True, exist_ok=True)
    f32_path = args.work/f"{args.model.stem}-f32.gguf"
    if not f32_path.exists():
        write_f32(args.model, f32_path)
    tokens = read_tokens(args.model, args.tokens, args.text)
    compare(f32_path, tokens, torch_half(args.model, tokens, removed, args.chunk), removed, args.chunk)


if __name__ == "__main__":
    main()
