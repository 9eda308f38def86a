"""kv_cells: fewer cells than the context has tokens. Random weights."""
import numpy as np
import pytest

import tiny
from pykvc import _core

EVICT = [p["name"] for p in _core.policies() if p["name"] not in ("full", "kvzip")]  # kvzip needs LLM


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return {arch: _core.Model(str(tiny.write(folder/f"{arch}.gguf", arch, n_layer=7 if arch == "gemma3" else 3)))
            for arch in ("llama", "gemma3")}


def context(model, policy="snapkv:window=8,kernel=3", cells="256", **kwargs):
    return _core.Context(model, **{"n_ctx": 2048, "n_batch": 512, "n_ubatch": 64, "n_threads": 1, "policy": policy, "cells": cells, **kwargs})


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, tiny.N_VOCAB, n, dtype=np.int32)


def n_layer(context):
    return len(context.kept())


def rows(context):
    return [k.shape[1] for k in context.kept()]


def held(context, seq=0):
    """Cells of the mean head."""
    kept = context.kept(seq)
    return sum((k >= 0).sum() for k in kept)/sum(len(k) for k in kept)


def is_ascending(kept):
    return all((np.diff(head[head >= 0]) > 0).all() and (np.diff(head) >= 0).all() for head in kept)  # -1s first


@pytest.mark.parametrize("policy", EVICT)
@pytest.mark.parametrize("kwargs", [{}, {"flash_attn": "off"}])
def test_any_prompt_fits(models, policy, kwargs):
    c = context(models["llama"], policy, **kwargs)
    full = context(models["llama"], "full", "", **kwargs)
    for i in range(0, 1000, 100):  # batches that are no multiple of n_ubatch, and larger than what is free
        c.decode(ids(1000)[i:i + 100])
        assert held(c) <= 256
    stats = c.stats()
    assert stats["n_evictions"] > 5 and c.pos_max() == 999 and stats["cells_allocated"] == 256
    assert stats["bytes_allocated"] - stats["bytes_signals"] <= full.stats()["bytes_allocated"]/8 + 1024*n_layer(c)
    assert all(is_ascending(k) for k in c.kept())
    c.end_prompt()
    for t in ids(400, 1):          # an answer longer than what the prompt left
        c.decode(np.array([t], np.int32))
    assert c.pos_max() == 1399 and held(c) <= 256 and np.isfinite(c.logits()).all()


SHARED = ["keydiff", "snapkv:window=8,kernel=3,share=layers", "knorm:share=layers", "expected_attention:share=layers,window=16", "keydiff:share=all",
          "snapkv:window=8,kernel=3,share=layer", "adakv:window=8"]


@pytest.mark.parametrize("types", ["f16", "q8_0"])
@pytest.mark.parametrize("policy", SHARED)
def test_layers_draw_their_rows_from_a_pool(models, policy, types):
    """They hold different numbers of cells, never more than the pool has together, and a row for each next token is free in all."""
    c, seen = context(models["llama"], policy, type_k=types, type_v=types), set()
    for i in range(0, 1800, 100):
        c.decode(ids(1800)[i:i + 100])
        assert held(c) <= 256 and max(rows(c)) - min(rows(c)) < 1024
        seen.add(tuple(rows(c)))
    assert any(len(set(n)) > 1 for n in seen)
    assert all(is_ascending(k) for k in c.kept()) and np.isfinite(c.logits()).all()
    c.end_prompt()
    for t in ids(240, 1):
        c.decode(np.array([t], np.int32))
    assert c.pos_max() == 2039 and held(c) <= 256 and np.isfinite(c.logits()).all()
    c.clear()
    assert rows(c) == [0]*n_layer(c)


@pytest.mark.parametrize("types", ["f16", "q8_0"])
@pytest.mark.parametrize("policy", SHARED)
def test_a_pool_changes_nothing(models, policy, types):
    """Cells, bytes and logits are those of a cache with a cell for each token, evicted at the same moments to the same budgets."""
    how = dict(type_k=types, type_v=types, n_ctx=1024)
    bounded, free = context(models["llama"], policy, budget="100", **how), context(models["llama"], policy, "", budget="100", **how)
    for turn in range(3):
        for c in (bounded, free):
            c.decode(ids(60 if turn else 250, turn))
            c.evict()
            c.end_prompt()
            for t in ids(20, turn):
                c.decode(np.array([t], np.int32))
        assert all(map(np.array_equal, bounded.kept(), free.kept())) and len(set(rows(free))) > 1
        assert bounded.stats()["n_evictions"] == free.stats()["n_evictions"] == turn + 1
        assert np.array_equal(bounded.logits(), free.logits())
    assert bounded.stats()["bytes_used"] == free.stats()["bytes_used"]


@pytest.mark.parametrize("types", ["f16", "q8_0"])
def test_a_pool_is_saved_and_restored(models, types):
    one, other = (context(models["llama"], "keydiff", "512", type_k=types, type_v=types) for _ in range(2))
    one.decode(ids(1000))
    one.end_prompt()
    other.decode(ids(600, 5))  # lies differently
    state = one.save()
    other.load(state)
    assert all(map(np.array_equal, one.kept(), other.kept()))
    for t in ids(300, 2):
        for c in (one, other):
            c.decode(np.array([t], np.int32))
        assert np.array_equal(one.logits(), other.logits())
    assert all(map(np.array_equal, one.kept(), other.kept())) and one.stats()["n_evictions"] > 8
    small = context(models["llama"], "keydiff", type_k=types, type_v=types)
    with pytest.raises((ValueError, RuntimeError)):
        small.load(state)
    small.decode(ids(100))  # and goes on
    assert rows(small) == [100]*n_layer(small)


@pytest.mark.parametrize("policy", ["keydiff", "keydiff:share=all", "snapkv:window=8,share=layer", "adakv:window=8",
                                    "expected_attention:window=16,share=layers"])
def test_sequences_have_pools_of_their_own(models, policy):
    """Evictions in mid-prompt of sequences that are read at once, copied and emptied: each is as if alone."""
    together = context(models["llama"], policy, n_seq_max=3)
    alone = [context(models["llama"], policy) for _ in range(3)]
    for part in range(4):
        for seq, c in enumerate(alone):
            tokens = ids(300 - 60*seq, 10*part + seq)
            together.decode(tokens, seq)
            c.decode(tokens)
            assert all(map(np.array_equal, together.kept(seq), c.kept())) and held(c) <= 256
    assert all(c.stats()["n_evictions"] > 5 for c in alone) and any(len(set(rows(c))) > 1 for c in alone)
    for t in range(80):  # one graph for all
        together.decode_batch(np.full(3, t, np.int32), np.arange(3, dtype=np.int32))
        for c in alone:
            c.decode(np.array([t], np.int32))
    for seq, c in enumerate(alone):
        assert all(map(np.array_equal, together.kept(seq), c.kept()))
        assert together.seq_stats(seq)["bytes_used"] == c.seq_stats(0)["bytes_used"]
        np.testing.assert_allclose(together.logits()[seq], c.logits()[-1], atol=0.02)  # of 20: products of other shapes round differently
    together.copy(1, 2)
    together.clear(0)
    together.decode(ids(500, 7), 0)
    for t in range(20):
        for seq in (1, 2):
            together.decode(np.array([t], np.int32), seq)
        alone[1].decode(np.array([t], np.int32))
    for seq in (1, 2):
        assert all(map(np.array_equal, together.kept(seq), alone[1].kept()))
    np.testing.assert_allclose(together.logits(), alone[1].logits(), atol=0.02)


def test_where_there_is_no_pool_auto_is_head_and_layers_is_refused(models):
    assert "share=head" in context(models["llama"], "keydiff", flash_attn="off").policy
    for share in ("layers", "layer", "all"):
        with pytest.raises(ValueError, match="flash attention.*share=head"):
            context(models["llama"], f"keydiff:share={share}", flash_attn="off")
    assert "share=layers" in context(models["llama"], "keydiff", n_seq_max=2).policy


@pytest.mark.parametrize("policy", ["snapkv:window=8", "pyramidkv:window=8", "adakv:window=8", "h2o", "shotkv:window=8"])
def test_a_prompt_that_fits_is_as_without(models, policy):
    n_fit = 80 if policy.startswith("pyramidkv") else 192  # its smallest layer has as many rows
    bounded, free = context(models["llama"], policy, budget="64"), context(models["llama"], policy, "", budget="64")
    for c in (bounded, free):
        c.set_spans([(i, i + 10) for i in range(0, n_fit - 10, 10)])
        c.decode(ids(n_fit))
        c.evict()
        c.end_prompt()
        for t in ids(20, 1):
            c.decode(np.array([t], np.int32))
    if not policy.startswith("pyramidkv"):
        assert all(map(np.array_equal, bounded.kept(), free.kept()))
        assert np.array_equal(bounded.logits(), free.logits())
    assert bounded.stats()["n_evictions"] == free.stats()["n_evictions"] == 1


@pytest.mark.parametrize("how", [{}, {"flash_attn": "off"}, {"type_k": "q8_0", "type_v": "q8_0"}])
def test_eviction_between_ubatches_equals_eviction_between_calls(models, how):
    """A batch of several ubatches evicts inside one llama_decode(), as if it had come one ubatch at a time."""
    for policy in ("snapkv:window=8", "pyramidkv:window=8", "adakv:window=8", "keydiff", "expected_attention"):
        one, many = (context(models["llama"], policy, **how) for _ in range(2))
        one.decode(ids(512))
        for i in range(0, 512, 64):
            many.decode(ids(512)[i:i + 64])
        assert all(map(np.array_equal, one.kept(), many.kept()))
        assert np.array_equal(one.logits(), many.logits())
        assert one.stats()["n_evictions"] == many.stats()["n_evictions"] > 3


@pytest.mark.parametrize("policy", ["pyramidkv:window=8", "pyramidinfer:window=8"])
def test_layers_are_allocated_at_their_own_length(models, policy):
    c, even = context(models["llama"], policy, "512"), context(models["llama"], "snapkv:window=8", "512")
    c.decode(ids(1000))
    n = rows(c)
    assert n == sorted(n, reverse=True) and n[0] > n[-1]
    a, b = (x.stats()["bytes_allocated"] - x.stats()["bytes_signals"] for x in (c, even))
    assert abs(a - b) < 0.05*b


def test_heads_that_differ_stay_within_their_layer(models):
    """adakv without a pool: layers are allocated alike, so what is full in mid-prompt is the same for every head; a budget below
    that is shared by the heads, and the longest has no more than its layer has room for: 256 - n_ubatch."""
    how = dict(policy="adakv:window=8,kernel=1,alpha=0", flash_attn="off")
    shared, tight = context(models["llama"], budget="100", **how), context(models["llama"], budget="188", **how)
    for c, budget in ((shared, 100), (tight, 188)):
        c.decode(ids(1000))
        assert all((k >= 0).all() for k in c.kept()) and max(rows(c)) <= 256
        assert c.evict()
        n_held = np.array([(k >= 0).sum(axis=1) for k in c.kept()])  # [n_layer, n_head_kv]
        assert (n_held.sum(axis=1) == 2*budget).all() and n_held.max(axis=1).tolist() == rows(c) == c.stats()["kept"]
        assert np.ptp(n_held, axis=1).max() > 7 and max(rows(c)) <= 192 and (max(rows(c)) == 192) == (c is tight)
        c.decode(ids(300, 1))   # a second prompt: room is made of what unequal heads hold
        assert c.pos_max() == 1299 and max(rows(c)) <= 256 and all(is_ascending(k) for k in c.kept())
        for t in ids(200, 2):
            c.decode(np.array([t], np.int32))
        assert np.isfinite(c.logits()).all() and max(rows(c)) <= 256
    assert c.stats()["bytes_allocated"] == context(models["llama"], "snapkv:window=8", flash_attn="off").stats()["bytes_allocated"]


def test_bytes_are_cells(models):
    full = context(models["llama"], "full", "").stats()["bytes_allocated"]  # 2048 cells
    for text in (f"{full/8/1024:.3f}KiB", "256"):
        c = context(models["llama"], cells=text)
        assert c.stats()["cells_allocated"] == 256


def test_global_layers_of_a_sliding_window_model(models):
    c = context(models["gemma3"])
    c.decode(ids(1000))
    assert rows(c) and max(rows(c)) <= 256 and np.isfinite(c.logits()).all()


def test_several_sequences(models):
    c = context(models["llama"], n_seq_max=3)
    alone = context(models["llama"])
    for s, n in enumerate((300, 700, 90)):
        c.decode(ids(n, s), seq=s)
    for t in range(40):
        c.decode_batch(np.full(3, t, np.int32), np.arange(3, dtype=np.int32))
    alone.decode(ids(700, 1))
    for t in range(40):
        alone.decode(np.array([t], np.int32))
    assert all(map(np.array_equal, c.kept(1), alone.kept()))


@pytest.mark.parametrize("policy", ["snapkv:window=8", "pyramidkv:window=8", "adakv:window=8", "h2o", "keydiff", "expected_attention"])
def test_saved_states_go_on(models, policy):
    a, b = context(models["llama"], policy), context(models["llama"], policy)
    a.decode(ids(700))
    b.load(a.save())
    for c in (a, b):
        c.decode(ids(300, 1))
        c.end_prompt()
        for t in ids(30, 2):
            c.decode(np.array([t], np.int32))
    assert all(map(np.array_equal, a.kept(), b.kept())) and np.array_equal(a.logits(), b.logits())


@pytest.mark.parametrize("kwargs, why", [
    (dict(cells="64", n_ubatch=256), "has to hold"),
    (dict(cells="256", budget="200"), "n_ubatch 64"),
    (dict(cells="many"), "MiB"),
    (dict(cells="12.5"), "MiB"),
    (dict(cells="-1"), "MiB"),
    (dict(cells="3TiB"), "MiB"),
    (dict(policy="full", cells="256"), "full"),
])
def test_bad_cells_name_what_is_valid(models, kwargs, why):
    with pytest.raises(ValueError, match=why):
        context(models["llama"], **kwargs)


def test_a_failed_eviction_loses_nothing(models):
    import pykvc

    class Moody(pykvc.Policy):
        name = "moody"
        fails = False

        def score(self, layer):
            if self.fails:
                raise ValueError("not today")
            return -layer.pos.astype(np.float32)

    policy = Moody()
    c = context(models["llama"], policy)
    c.decode(ids(300))
    before, policy.fails = c.kept(), True
    n = c.pos_max()
    with pytest.raises(ValueError, match="not today"):
        c.decode(ids(512))
    kept = c.kept()
    assert c.pos_max() >= n and all(np.array_equal(k[:, :b.shape[1]], b) for k, b in zip(kept, before))
    policy.fails = False
    c.decode(ids(512))
    assert c.pos_max() > n + 500


def test_shots_in_mid_prompt():
    """A shot still to end is kept while it fits; where even what is outside every shot does not, the best tokens are."""
    n = 100
    pos, score = [np.arange(n, dtype=np.int32)[None]], [np.linspace(1, 0, n, dtype=np.float32)[None]]  # older is better
    how = dict(spec="shotkv:window=4,sinks=2", pos=pos, score=score)
    shots, first, last = [(10, 30), (30, 60), (60, 140)], set(range(10)), set(range(96, 100))
    assert set(_core.plan(**how, spans=shots, budget=80, room=True)[0][0]) == first | set(range(10, 40)) | set(range(60, 100))
    assert set(_core.plan(**how, spans=shots, budget=40, room=True)[0][0]) == first | set(range(10, 36)) | last
    assert set(_core.plan(**how, spans=[(60, 80)], budget=40, room=True)[0][0]) == set(range(36)) | last
    with pytest.raises(ValueError, match="outside every span"):
        _core.plan(**how, spans=[(60, 80)], budget=40)


def test_a_sliding_window_has_a_floor_of_its_own(models):
    """The windows' cells are taken again, too: a tail can be removed while the first token after it sees a whole window."""
    def prompt():
        c = context(models["gemma3"], "keydiff:share=head", "256", budget="16", n_ubatch=16, n_batch=16, flash_attn="off")
        c.decode(ids(100))
        assert c.evict() and c.pos_floor() == 100
        c.end_prompt()
        return c

    c, n = prompt(), 100 + 256 - 16  # then the cells are full
    for i in range(100, n):
        c.decode(ids(n, 1)[i:i + 1])
    floor = c.pos_floor()
    assert floor == n - 256 + 32 - 1  # windows of 32, in as many cells
    assert not c.remove_tail(floor - 1) and c.pos_max() == n - 1
    assert c.remove_tail(floor)
    short = prompt()
    for i in range(100, floor):
        short.decode(ids(n, 1)[i:i + 1])
    for each in c, short:
        each.decode(ids(1, 2))
    np.testing.assert_allclose(c.logits(), short.logits(), atol=0.02)  # one cell farther back they differ by 1
