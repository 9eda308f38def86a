"""The cache as a state machine: whatever is done to it, it equals a fresh run of the steps that count."""
import os

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

import families
import tiny
from pykvc import _core

SPECS = [  # spec, budget, decode budget
    ("streaming_llm:sinks=2,interval=8", "24", "8"),
    ("h2o:interval=8", "24", "50%"),
    ("tova:interval=8", "0.5", "4"),
    ("knorm:interval=8", "20", "8"),
    ("keydiff:sinks=2,recent=0.25,interval=8", "50%", ""),
    ("snapkv:window=8,kernel=3", "24", ""),
    ("adakv:window=8,kernel=3,alpha=0.1", "16", ""),
    ("pyramidkv:window=8,kernel=3,beta=3", "16", ""),
    ("pyramidinfer:window=8,sinks=2,interval=8", "24", "12"),
    ("chunkkv:window=8,chunk=4", "24", ""),
    ("expected_attention:window=8,future=8,sinks=2,recent=4", "24", ""),
    ("shotkv:window=8,sinks=2,interval=8,recent=4", "32", "8"),
    ("random_shot:window=8,sinks=2,interval=8,recent=4", "32", "8"),
    ("random:seed=3,interval=8", "16", "16"),
    ("random_head:seed=3,interval=8", "", "16"),
    ("keydiff:share=layers,interval=8", "24", "8"),
    ("snapkv:window=8,kernel=3,share=layers", "50%", ""),
    ("keydiff:share=all", "30%", ""),
    ("snapkv:window=8,kernel=3,share=layer", "20", ""),
]
CACHES = [("f16", "on"), ("f16", "off"), ("q8_0", "on"), ("f32", "off"), ("bf16", "on"), ("q5_0", "on"), ("q4_1", "on")]  # type, flash attention


SEQ = st.runner().flatmap(lambda machine: st.integers(0, machine.n_seq - 1))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny")/"llama.gguf")


class Slow:
    """One sequence, replayed from the list of its steps in a context of its own."""

    def __init__(self, make, steps):
        self.ctx = make(1)
        for step, arg in steps:
            apply(self.ctx, 0, step, arg)


def apply(ctx, seq, step, arg):
    if step == "decode":
        ctx.decode(np.array(arg, np.int32), seq)
    elif step == "evict":
        ctx.set_spans(arg, seq)
        ctx.evict(seq)
        ctx.end_prompt(seq)
    elif step == "remove":
        return ctx.remove_tail(arg, seq)


class CacheMachine(RuleBasedStateMachine):
    model, hybrid, specs = None, False, SPECS

    @initialize(spec=st.runner().flatmap(lambda machine: st.sampled_from(machine.specs)), cache=st.sampled_from(CACHES), cells=st.sampled_from(["", "256"]))
    def start(self, spec, cache, cells):
        name, budget, decode_budget = spec
        fa = "off" if name.startswith("h2o") else cache[1]
        kv = "f16" if name.startswith("h2o") and cache[0][0] == "q" else cache[0]
        cells = "" if fa == "off" and any(share in name for share in ("share=layer", "share=all")) else cells  # no pool there
        self.make = lambda n_seq: _core.Context(self.model, n_ctx=512, n_batch=32, n_ubatch=16, n_seq_max=n_seq, n_threads=1, type_k=kv,
                                                type_v=kv, flash_attn=fa, policy=name, budget=budget, decode_budget=decode_budget, cells=cells)
        self.n_seq = 2
        self.ctx = self.make(self.n_seq)
        self.steps = [[] for _ in range(self.n_seq)]  # what counts, by sequence
        self.length = [0]*self.n_seq
        self.saved = None

    @rule(seq=SEQ, n=st.one_of(st.integers(1, 40), st.integers(1, 150)), seed=st.integers(0, 9))
    def prefill(self, seq, n, seed):
        if self.length[seq] + n > self.ctx.n_ctx:
            return
        before = self.ctx.kept(seq)
        try:
            self.do(seq, "decode", np.random.default_rng(seed).integers(0, tiny.N_VOCAB, n).tolist())
            self.length[seq] += n
        except ValueError as e:  # full cells, and nothing to choose by: fewer tokens would do
            assert "removed with the tail" in str(e) and all(map(np.array_equal, before, self.ctx.kept(seq))), e

    @rule(seq=SEQ, token=st.integers(0, tiny.N_VOCAB - 1), n=st.integers(1, 20))
    def generate(self, seq, token, n):
        for i in range(min(n, self.ctx.n_ctx - self.length[seq])):
            self.do(seq, "decode", [(token + i) % tiny.N_VOCAB])
            self.length[seq] += 1

    @rule(seq=SEQ, n=st.integers(3, 9))
    def compress(self, seq, n):
        end = self.length[seq] - 8  # the window is outside of every shot
        spans = [(b, min(b + n, end)) for b in range(2, end, n)]
        try:
            self.do(seq, "evict", spans)
        except ValueError as e:
            assert "at least" in str(e), e  # a ratio of a short sequence below sinks + window; a window that was removed

    @rule(seq=SEQ, n=st.integers(1, 12))
    def remove_tail(self, seq, n):
        pos = max(0, self.length[seq] - n)
        floor, before = self.ctx.pos_floor(seq), self.ctx.kept(seq)
        done = apply(self.ctx, seq, "remove", pos)
        if done:
            self.steps[seq] = [] if pos == 0 else self.steps[seq] + [("remove", pos)]
            self.length[seq] = pos
        else:  # below the floor, or not to be taken out of sums, or a recurrent state is not of there: nothing has changed
            assert pos < floor or (self.hybrid and floor < pos < self.length[seq])
            assert all(map(np.array_equal, before, self.ctx.kept(seq)))

    @rule(src=SEQ)
    def branch(self, src):
        dst = self.n_seq - 1 - src
        self.ctx.copy(src, dst)
        self.steps[dst], self.length[dst] = list(self.steps[src]), self.length[src]

    @rule(seq=SEQ)
    def clear(self, seq):
        self.ctx.clear(seq)
        self.steps[seq], self.length[seq] = [], 0

    @rule()
    def save(self):
        self.saved = self.ctx.save(), [list(s) for s in self.steps], list(self.length)

    @precondition(lambda self: self.saved)
    @rule(fresh=st.booleans())
    def load(self, fresh):
        data, steps, length = self.saved
        if fresh:
            self.ctx = self.make(self.n_seq)
        self.ctx.load(data)
        self.steps, self.length = [list(s) for s in steps], list(length)

    @rule(src=SEQ, dst=SEQ)
    def move_by_state(self, src, dst):
        self.ctx.load_seq(self.ctx.save_seq(src), dst)
        self.steps[dst], self.length[dst] = list(self.steps[src]), self.length[src]

    def do(self, seq, step, arg):
        apply(self.ctx, seq, step, arg)
        self.steps[seq].append((step, arg))

    @invariant()
    def nothing_is_lost(self):
        if not hasattr(self, "ctx"):
            return
        for seq in range(self.n_seq):
            assert self.ctx.pos_max(seq) == self.length[seq] - 1
            for kept in self.ctx.kept(seq):
                assert all((np.diff(head[head >= 0]) > 0).all() and (np.diff(head) >= 0).all() for head in kept)
                assert kept.min(initial=0) >= 0 or self.ctx.policy.startswith(("adakv", "keydiff", "snapkv"))
                assert self.may_lose_last(seq) or kept.size == 0 or (kept[:, -1] == self.length[seq] - 1).all()

    def may_lose_last(self, seq):
        # a tail removed down to the floor ends where heads disagree; methods without a recent window may evict the newest token
        at_floor = self.ctx.pos_floor(seq) >= self.length[seq] and not self.ctx.policy.startswith("h2o")
        return at_floor or self.ctx.policy.startswith(("knorm", "keydiff", "random"))

    def teardown(self):
        if not hasattr(self, "ctx"):
            return
        for seq in range(self.n_seq):
            slow = Slow(self.make, self.steps[seq])
            assert all(map(np.array_equal, self.ctx.kept(seq), slow.ctx.kept())), self.ctx.policy
            if 0 < self.length[seq] < self.ctx.n_ctx:
                probe = np.array([5], np.int32)
                self.ctx.decode(probe, seq)
                slow.ctx.decode(probe)
                assert np.array_equal(self.ctx.logits(), slow.ctx.logits()), self.ctx.policy


@pytest.mark.parametrize("arch, n_steps", [("llama", 1000), ("qwen35", 400), ("qwen3vl", 200), ("deepseek2", 200)])  # plain; hybrid and M-RoPE; M-RoPE; MLA
def test_state_machine(tmp_path, arch, n_steps):
    """PYKVC_FUZZ_STEPS sets how many steps; the default keeps CI short."""
    CacheMachine.model, CacheMachine.hybrid = _core.Model(str(tiny.write(tmp_path/"model.gguf", arch))), arch in families.HYBRID
    CacheMachine.specs = [spec for spec in SPECS if arch not in families.LATENT or not spec[0].startswith("expected_attention")]  # refused there
    n_steps = int(os.environ.get("PYKVC_FUZZ_STEPS", n_steps))
    run_state_machine_as_test(CacheMachine, settings=settings(
        max_examples=max(1, n_steps//40), stateful_step_count=40, deadline=None, derandomize="PYKVC_FUZZ_STEPS" not in os.environ, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck)))


def test_tail_that_took_the_queries_along(tiny_llama):
    """tova scores by the last token. Removed, and followed by a call that would go over the budget, the next call
    evicts."""
    c = _core.Context(_core.Model(str(tiny_llama)), n_ctx=256, n_threads=1, policy="tova:interval=4", budget="16", decode_budget="4")
    tokens = np.arange(100, dtype=np.int32)
    c.decode(tokens[:40])
    c.evict()
    c.end_prompt()
    for i in range(40, 47):
        c.decode(tokens[i:i + 1])
    n_evictions = c.stats()["n_evictions"]
    assert c.remove_tail(46) and c.kept()[0].shape[1] == 22
    c.decode(tokens[46:58])
    assert c.stats()["n_evictions"] == n_evictions and c.kept()[0].shape[1] == 34
    c.decode(tokens[58:59])
    assert c.stats()["n_evictions"] == n_evictions + 1 and c.kept()[0].shape[1] == 21
