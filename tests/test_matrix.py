"""cpp/ggml/mul_mat.h: a prompt times quantized weights on the CPU, against ggml's own (PYKVC_STOCK_MATRIX): the same bits. On a CPU
without AVX-512 VNNI both are ggml's."""
import numpy as np
import pytest

import tiny
from pykvc import _core


def logits(path, calls, n_threads, n_seq_max=1):
    """Of every token of every call: F32 [n_tokens, n_vocab]."""
    c = _core.Context(_core.Model(str(path)), n_ctx=1024*n_seq_max, n_threads=n_threads, n_seq_max=n_seq_max)
    tokens = np.random.default_rng(0).integers(0, tiny.N_VOCAB, 1024, dtype=np.int32)
    rows, begin = [], 0
    for n in calls:
        c.decode(tokens[begin:begin + n], n_seq_max - 1, "all")
        rows.append(c.logits().copy())
        begin += n
    return np.concatenate(rows)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("quant", ["Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_same_bits_as_ggml(tmp_path, monkeypatch, quant, n_threads):
    """Tokens that end inside a tile of 8, and on its edge, and too few of them; 131 rows of the last matrix do not fill tiles of 4."""
    path = tiny.write(tmp_path/"tiny.gguf", quant=quant, n_vocab=131)
    ours = logits(path, (300, 64, 1, 3, 4, 9, 512), n_threads)
    monkeypatch.setenv("PYKVC_STOCK_MATRIX", "1")
    assert np.array_equal(ours, logits(path, (300, 64, 1, 3, 4, 9, 512), n_threads))
    assert np.ptp(ours) > 1 and np.isfinite(ours).all()


def test_same_bits_on_a_real_model(model_path, monkeypatch):
    """Matrices of 576 and 1,536 columns, in several tasks."""
    ours = logits(model_path, (130,), 2)
    monkeypatch.setenv("PYKVC_STOCK_MATRIX", "1")
    assert np.array_equal(ours, logits(model_path, (130,), 2))
