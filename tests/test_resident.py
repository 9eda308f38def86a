"""Rows that nobody holds take no memory on a Linux host: those that were never written, and what an eviction leaves
free."""
import sys

import numpy as np
import pytest

import pykvc
from pykvc import _core

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux")
TOKENS = np.random.default_rng(0).integers(0, 40000, 700, dtype=np.int32)
SLACK = 8*1024*180  # K and V of 30 layers and 3 heads, each to whole pages and not for less than 8 KiB


@pytest.fixture(scope="module")
def model(model_path):
    return _core.Model(str(model_path))


def resident(ctx):
    return ctx.bytes_resident() - ctx.stats()["bytes_signals"]


@pytest.mark.parametrize("how", [{}, {"flash_attn": "off"}, {"type_k": "q8_0", "type_v": "q8_0"}], ids=["f16", "transposed", "q8_0"])
def test_only_what_is_held_is_in_memory(model, how):
    ctx = _core.Context(model, n_ctx=8192, policy="knorm", budget="64", **how)
    allocated = ctx.stats()["bytes_allocated"]
    assert resident(ctx) < allocated/100
    ctx.decode(TOKENS)
    used = ctx.stats()["bytes_used"]
    assert used <= resident(ctx) + 4096*60 and resident(ctx) < allocated*3/4
    assert ctx.evict()
    after = ctx.stats()["bytes_used"]
    assert after <= resident(ctx) + 4096*60 and resident(ctx) < after + (SLACK if how.get("flash_attn") != "off" else allocated/2)
    ctx.decode(TOKENS[:9])
    assert np.isfinite(ctx.logits()).all()
    ctx.clear()
    assert resident(ctx) < SLACK


def test_sequences_and_copies_keep_what_they_hold(model):
    """One is copied, and emptied before the copy was made: the copy has its rows."""
    ctx = _core.Context(model, n_ctx=4096, n_seq_max=2, policy="knorm", budget="300")
    ctx.decode(TOKENS[:600], seq=0)
    ctx.evict(0)
    ctx.copy(0, 1)
    ctx.clear(0)
    ctx.decode(TOKENS[600:620], seq=1)
    alone = _core.Context(model, n_ctx=4096, n_seq_max=2, policy="knorm", budget="300")
    alone.decode(TOKENS[:600], seq=1)
    alone.evict(1)
    alone.decode(TOKENS[600:620], seq=1)
    np.testing.assert_array_equal(ctx.logits(), alone.logits())


@pytest.mark.parametrize("n_kept", [50, 300])
def test_a_copy_takes_what_it_holds(model, n_kept):
    """llama.cpp copies whole streams, used or not."""
    ctx = _core.Context(model, n_ctx=16384, n_seq_max=2, policy="knorm", budget=str(n_kept))
    ctx.decode(TOKENS, seq=0)
    ctx.evict(0)
    one = resident(ctx)
    ctx.copy(0, 1)
    assert resident(ctx) < 2*one + SLACK


def test_stats_tell_used_resident_and_allocated(model_path):
    with pykvc.LLM(model_path, n_ctx=8192, kv_policy="snapkv", kv_budget=64) as llm:
        llm.generate(tokens=TOKENS[:500].tolist(), max_tokens=2)
        stats = llm.stats()
        assert stats["bytes_used"] <= stats["bytes_resident"] < stats["bytes_allocated"]/4
