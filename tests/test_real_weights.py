"""Qwen 2.5 and Gemma 3 with real weights: sizes of heads, windows and vocabularies that SmolLM2 and random weights do not have.

What is not in the folder of models is skipped: 491 MB and 253 MB."""
import numpy as np
import pytest

import pykvc

PROMPT = "".join(f"{n}, " for n in range(1, 31)).strip()
SNAPKV = "snapkv:window=16"


def answer_of(path, **how):
    """(answer, logits of its first token, stats)"""
    with pykvc.LLM(path, n_ctx=512, n_threads=1, **how) as llm:
        llm.prefill(PROMPT)
        logits = llm.logits()
        answer = llm.generate(max_tokens=3, reset=False)
        return answer, logits, llm.stats(), llm.kept()


def check(path, n_layer, n_head_kv, n_embd_head, n_window_layers):
    full, logits, whole, _ = answer_of(path)
    n = whole["n_tokens"]
    assert full.text == " 31" and len(whole["kept"]) == n_layer
    row = n_head_kv*n_embd_head*2*2  # bytes: K and V of F16
    assert whole["bytes_used"] == whole["bytes_full"] == (n_layer + n_window_layers)*n*row

    same, same_logits, _, _ = answer_of(path, kv_policy=SNAPKV, kv_budget="100%")
    assert same.tokens == full.tokens and np.array_equal(same_logits, logits)

    quarter, first, stats, kept = answer_of(path, kv_policy=SNAPKV, kv_budget="25%")
    n_kept = int(0.25*full.n_prompt + 0.5)
    assert np.array_equal(first, logits) and quarter.text == " 31"
    assert quarter.kv["kept"] == [n_kept]*n_layer and quarter.kv["evictions"] == 1
    n_now = n_kept + stats["n_tokens"] - full.n_prompt
    assert [layer.shape for layer in kept] == [(n_head_kv, n_now)]*n_layer
    assert stats["bytes_used"] == (n_layer*n_now + n_window_layers*stats["n_tokens"])*row
    assert stats["bytes_full"] == whole["bytes_full"]


def test_qwen(qwen_path):
    check(qwen_path, n_layer=24, n_head_kv=2, n_embd_head=64, n_window_layers=0)
    with pykvc.LLM(qwen_path, n_ctx=512, n_threads=1, kv_policy="shotkv", kv_budget="50%") as llm:
        prompt = llm.apply_chat_template([{"role": "user", "content": "What is the capital of Italy? One word."}])
        assert prompt == ("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
                          "<|im_start|>user\nWhat is the capital of Italy? One word.<|im_end|>\n<|im_start|>assistant\n")
        assert llm.tokenize(prompt)[0] == llm.tokenize("<|im_start|>")[0]  # one token, and no BOS
        conv = llm.conversation()
        assert "Rome" in conv.ask("What is the capital of Italy? One word.", max_tokens=4).text


def test_gemma(gemma_path):
    check(gemma_path, n_layer=3, n_head_kv=1, n_embd_head=256, n_window_layers=15)
    with pykvc.LLM(gemma_path, n_ctx=512) as llm:
        with pytest.raises(ValueError, match="no chat template"):  # a base model
            llm.chat([{"role": "user", "content": "Hi"}])
        assert llm.tokenize("Hi")[0] == llm.tokenize("<bos>", add_special=False)[0]
