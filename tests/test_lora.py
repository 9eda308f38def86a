"""LoRA adapters: what they compute, which policies they go with, and whose state is whose."""
import shutil

import gguf
import numpy as np
import pytest
import tiny

import pykvc

TOKENS = list(range(1, 60))
EXACT = dict(n_ctx=256, type_k="f32", type_v="f32", flash_attn=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(base, LoRA, the two merged by numpy)."""
    folder = tmp_path_factory.mktemp("lora")
    base, merged = tiny.write(folder/"base.gguf"), folder/"merged.gguf"
    added = tiny.lora(folder/"lora.gguf", base)
    shutil.copy(base, merged)
    reader = gguf.GGUFReader(merged, "r+")
    for tensor in reader.tensors:
        if tensor.name in added:
            tensor.data[:] += added[tensor.name]
    reader.data.flush()
    return base, folder/"lora.gguf", merged


def logits(model, **how):
    with pykvc.LLM(model, **EXACT, **how) as llm:
        llm.prefill(tokens=TOKENS)
        if how.get("kv_policy"):
            llm.compress()
        return llm.evaluate([5, 6, 7]), [k.tolist() for k in llm.kept()] if how.get("kv_policy") else None


@pytest.mark.parametrize("how", [{}, {"kv_policy": "snapkv:window=8", "kv_budget": 24}])
def test_a_lora_is_its_merged_model(files, how):
    base, lora, merged = files
    there, kept = logits(base, lora=lora, **how)
    expected, expected_kept = logits(merged, **how)
    np.testing.assert_allclose(there, expected, atol=2e-3)
    assert kept == expected_kept
    assert np.abs(there - logits(base, **how)[0]).max() > 0.1


def test_scales_and_several(files):
    base, lora, merged = files
    plain = logits(base)[0]
    np.testing.assert_array_equal(logits(base, lora=[(lora, 0.0)])[0], plain)
    np.testing.assert_allclose(logits(base, lora=[(lora, 0.5), (lora, 0.5)])[0], logits(base, lora=lora)[0], atol=2e-3)
    with pykvc.LLM(base, **EXACT, lora=lora) as one, pykvc.LLM(base, **EXACT) as other:  # they share the weights
        for llm in (one, other):
            llm.prefill(tokens=TOKENS)
        np.testing.assert_array_equal(other.evaluate([5, 6, 7]), plain)
        one.close()
        other.evaluate([8])


def test_a_state_is_of_the_same_adapters(files):
    base, lora, _ = files
    with pykvc.LLM(base, n_ctx=256, lora=lora) as with_it, pykvc.LLM(base, n_ctx=256) as without:
        with_it.prefill(tokens=TOKENS)
        without.prefill(tokens=TOKENS)
        for one, other in ((with_it, without), (without, with_it)):
            with pytest.raises(ValueError, match="lora"):
                other.load_state(one.save_state())
        with pykvc.LLM(base, n_ctx=256, lora=lora) as same:
            same.load_state(with_it.save_state())
            assert same.n_tokens == len(TOKENS)


def test_refused(files, tmp_path):
    base, lora, _ = files
    other = tiny.write(tmp_path/"other.gguf", n_layer=2, head_dim=64)
    for given, words in (("nowhere.gguf", "no file"), (base, "not a LoRA"), ([(lora, "much")], "scale"), (3, "lora is"), ([(lora, 1, 2)], "lora is")):
        with pytest.raises(ValueError, match=words):
            pykvc.LLM(base, n_ctx=256, lora=given)
    with pytest.raises(ValueError, match="not a LoRA of this model"):
        pykvc.LLM(other, n_ctx=256, lora=lora)
    for policy in ("criticalkv:window=8", "snapkv:window=8,values=wo", "defensive:window=8"):
        with pytest.raises(ValueError, match="output projection"):
            pykvc.LLM(base, n_ctx=256, lora=lora, kv_policy=policy, kv_budget=24)
