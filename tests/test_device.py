"""What the engine asks of a device, and what it does where the answer is no. The CPU plays the device: it lacks what a test says."""
import numpy as np
import pytest

import tiny
from pykvc import _core


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return _core.Model(str(tiny.write(tmp_path_factory.mktemp("tiny")/"llama.gguf")))


@pytest.fixture
def lacking():
    yield _core.pretend_lacking
    _core.pretend_lacking([])


@pytest.fixture
def warnings():
    """What the engine has logged of its devices."""
    lines = []
    _core.set_log(lambda level, text: lines.append(text) if " has no " in text else None)
    yield lines
    _core.set_log(None)


def context(model, policy, **kwargs):
    c = _core.Context(model, n_ctx=512, n_ubatch=64, n_threads=1, policy=policy, budget="24", **kwargs)
    for seq in range(c.n_seq_max):
        c.decode(np.random.default_rng(seq).integers(0, tiny.N_VOCAB, 150, dtype=np.int32), seq)
    return c


@pytest.mark.parametrize("policy, signal", [("snapkv:window=8,kernel=3", "attn"), ("h2o", "sums")])
@pytest.mark.parametrize("n_seq_max", [1, 3])
def test_without_out_prod(model, lacking, warnings, policy, signal, n_seq_max):
    """Metal has none: the sums over queries come from a matrix product, and are the same but for the last bits."""
    usual = context(model, policy, n_seq_max=n_seq_max)
    assert not warnings
    lacking(["OUT_PROD"])
    without = context(model, policy, n_seq_max=n_seq_max)
    assert len(warnings) == 1 and "OUT_PROD" in warnings[0]  # once, not for each layer
    for seq in range(n_seq_max):
        for a, b in zip(usual.signals(seq), without.signals(seq)):
            assert a[signal].max() > 0
            np.testing.assert_allclose(a[signal], b[signal], rtol=1e-5, atol=1e-9)
        assert usual.evict(seq) and without.evict(seq)
        assert all(map(np.array_equal, usual.kept(seq), without.kept(seq)))


@pytest.mark.parametrize("policy, op", [("snapkv:window=8,kernel=3", "SET_ROWS"), ("h2o", "CPY")])
def test_a_device_that_cannot_write_signals_is_refused(model, lacking, policy, op):
    """llama.cpp would abort in the first decode."""
    lacking([op])
    with pytest.raises(ValueError, match=rf"CPU \(.*\) cannot run {op} .*n_gpu_layers 0"):
        context(model, policy)
    assert context(model, "knorm").evict()  # a policy without signals needs neither


def test_what_the_scheduler_can_move_is_only_told(model, lacking, warnings):
    lacking(["SOFT_MAX", "MUL_MAT"])
    assert context(model, "snapkv:window=8,kernel=3").evict()
    assert sorted(line.partition(" has no ")[2].partition(":")[0] for line in warnings) == ["MUL_MAT", "SOFT_MAX"]


def test_devices():
    assert "CPU" in [kind for *_, kind in _core.devices()]
