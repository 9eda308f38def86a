"""llama-server's own tests (tools/server/tests of the pinned llama.cpp) on models of this machine, and their comparison.

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36      # unpack it; SOURCE is its vendor/llama.cpp
    pip install -r SOURCE/tools/server/tests/requirements.txt gguf pytest-timeout
    python evals/server_suite.py prepare SOURCE WORK                       # a copy of the tests, and stand-ins for their models
    python evals/server_suite.py run WORK LLAMA_SERVER ours.xml [PYTEST_ARGS ...]      # LLAMA_ARG_KV_POLICY and the like apply
    python evals/server_suite.py compare stock.xml ours.xml

The tests name models of Hugging Face. `prepare` writes a cache as llama-server keeps it, with stand-ins under those names:
random weights with the real tokenizers' tokens where the test only needs a model, SmolLM2 and Qwen2.5-Coder where it needs text.
So tests that expect the words or token counts of a certain model fail; `compare` also says whether they fail with the same message.
"""
import os
import re
import shutil
import socket
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import gguf
import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent))
from tests import tiny  # noqa: E402

MODELS = Path(os.environ.get("PYKVC_CACHE") or Path.home()/".cache/pykvc")/"models"
COMMIT = "0"*40


def tokenizer(vocab: Path, ids: list[int] | None = None):
    """Writes the tokenizer of a GGUF file, or those of its tokens."""
    def add(w: gguf.GGUFWriter) -> None:
        for key, field in gguf.GGUFReader(vocab).fields.items():
            value = field.contents()
            if key.startswith("tokenizer."):
                value = [value[i] for i in ids] if ids and isinstance(value, list) else value
                w.add_key_value(key, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    return add


def small_vocabulary(vocab: Path) -> list[int]:
    """512 of llama's tokens, as many as stories260K has: control, bytes, letters, and the first merges."""
    tokens = gguf.GGUFReader(vocab).fields["tokenizer.ggml.tokens"].contents()
    letters = [i for i in range(259, len(tokens)) if len(tokens[i]) == 1][:90]
    merges = [i for i in range(259, 1000) if tokens[i].strip("▁") and i not in letters]
    return [*range(259), *merges[:512 - 259 - len(letters)], *letters]


def encoder(path: Path, vocab: Path, pooling: gguf.PoolingType, n: int = 64, n_ctx: int = 1024) -> None:
    """A BERT of two layers with random weights; with RANK a head that scores."""
    rng, w = np.random.default_rng(0), gguf.GGUFWriter(path, "bert")
    tokenizer(vocab)(w)
    w.add_context_length(n_ctx)
    w.add_embedding_length(n)
    w.add_block_count(2)
    w.add_feed_forward_length(2*n)
    w.add_head_count(4)
    w.add_layer_norm_eps(1e-12)
    w.add_causal_attention(False)
    w.add_pooling_type(pooling)
    n_vocab = len(gguf.GGUFReader(vocab).fields["tokenizer.ggml.tokens"].contents())
    shapes = {"token_embd": (n_vocab, n), "position_embd": (n_ctx, n), "token_types": (2, n), "token_embd_norm": (n,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": (n, n) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{i}.ffn_up": (2*n, n), f"blk.{i}.ffn_down": (n, 2*n)}
        shapes |= {f"blk.{i}.{name}": (n,) for name in ("attn_output_norm", "layer_output_norm")}
    if pooling == gguf.PoolingType.RANK:
        shapes |= {"cls": (n, n), "cls.output": (1, n)}
    for name, shape in shapes.items():
        w.add_tensor(name + ".weight", (rng.standard_normal(shape)*n**-0.5).astype(np.float32) if len(shape) > 1 else np.ones(shape, np.float32))
        if "embd" not in name and name != "token_types" or name == "token_embd_norm":
            w.add_tensor(name + ".bias", np.zeros(shape[0], np.float32))
    finish(w)


def adapter(path: Path, base: Path, rank: int = 4) -> None:
    """A LoRA adapter with random weights for every query projection."""
    rng, w = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", rank)
    for t in gguf.GGUFReader(base).tensors:
        if t.name.endswith("attn_q.weight"):
            n_in, n_out = map(int, t.shape)
            w.add_tensor(t.name + ".lora_a", (rng.standard_normal((rank, n_in))*n_in**-0.5).astype(np.float32))
            w.add_tensor(t.name + ".lora_b", rng.standard_normal((n_out, rank)).astype(np.float32))
    finish(w)


def finish(w: gguf.GGUFWriter) -> None:
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def prepare(source: Path, work: Path) -> None:
    tests = work/"tools/server/tests"
    shutil.copytree(source/"tools/server/tests", tests)
    (work/"models").symlink_to((source/"models").resolve())  # chat templates
    with open(tests/"conftest.py", "a") as conftest:
        conftest.write("\nServerPreset.load_all = staticmethod(lambda: None)  # nothing is downloaded\n")

    def cached(repo: str, name: str) -> Path:
        folder = work/"cache"/f"models--ggml-org--{repo}"
        (folder/"refs").mkdir(parents=True, exist_ok=True)
        (folder/"refs/main").write_text(COMMIT)
        path = folder/"snapshots"/COMMIT/name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    llama, bert = source/"models/ggml-vocab-llama-spm.gguf", source/"models/ggml-vocab-bert-bge.gguf"
    smollm2, coder = MODELS/"smollm2-135m.gguf", MODELS/"qwen2.5-0.5b.gguf"
    tiny.write(cached("test-model-stories260K", "stories260K-F32.gguf"), n_vocab=512, tokenizer=tokenizer(llama, small_vocabulary(llama)))
    encoder(cached("models", "bert-bge-small/ggml-model-f16.gguf"), bert, gguf.PoolingType.CLS)
    encoder(cached("models", "jina-reranker-v1-tiny-en/ggml-model-f16.gguf"), bert, gguf.PoolingType.RANK)
    cached("test-model-stories260K-infill", "stories260K-infill-F32.gguf").symlink_to(coder)
    cached("stories15M_MOE", "stories15M_MOE-F16.gguf").symlink_to(smollm2)
    cached("tinygemma3-GGUF", "tinygemma3-Q8_0.gguf").symlink_to(smollm2)
    (tests/"tmp").mkdir(exist_ok=True)
    (tests/"tmp/stories15M-q4_0.gguf").symlink_to(smollm2)
    adapter(tests/"tmp/moe_shakespeare15M.gguf", smollm2)


def run(work: Path, server: Path, report: Path, args: list[str]) -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "LLAMA_SERVER_BIN_PATH": str(server.resolve()), "LLAMA_CACHE": str((work/"cache").resolve()),
           "LLAMA_ARG_OFFLINE": "1", "PORT": str(port)}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", "-m", "not slow", "--timeout=120",
                           f"--junitxml={report.resolve()}", *args], cwd=work/"tools/server/tests", env=env).returncode


def outcomes(report: Path) -> dict[str, tuple[str, str]]:
    """Of each test: passed, failed, error or skipped, and the message without what differs from run to run."""
    found = {}
    for case in xml.parse(report).iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        message = "" if bad is None else re.sub(r"0x[0-9a-f]+|port=\d+|:\d{4,5}\b|pid=\d+|chatcmpl-\w+", "_", bad.get("message") or "")
        found[f"{case.get('classname')}::{case.get('name')}"] = ("passed" if bad is None else bad.tag, message)
    return found


def compare(first: Path, *others: Path) -> None:
    base = outcomes(first)
    for report in (first, *others):
        results = outcomes(report)
        print(report.name, {kind: sum(r[0] == kind for r in results.values()) for kind in ("passed", "failure", "error", "skipped")})
        for test in sorted({*base, *results}):
            was, now = base.get(test, ("absent", "")), results.get(test, ("absent", ""))
            if was != now:
                print(f"  {test}\n    {was[0]}: {was[1][:300]!r}\n    {now[0]}: {now[1][:300]!r}")


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "run":
        sys.exit(run(*map(Path, rest[:3]), rest[3:]))
    {"prepare": prepare, "compare": compare}[command](*map(Path, rest))
