"""generate_batch(): many prompts, each as if it were alone."""
import numpy as np
import pytest

import pykvc
from pykvc import _core
from pykvc.prose import prose

WORDS = prose(60).split()


def prompt(i, n):
    return f"Story {i}. " + " ".join(WORDS[7*i:7*i + n])


PROMPTS = [prompt(i, n) for i, n in enumerate((40, 70, 20, 60, 50))]


@pytest.fixture(scope="module")
def llm():
    with pykvc.LLM(n_ctx=1024, n_seq_max=3, n_threads=2, kv_policy="snapkv:window=16", kv_budget=0.5) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone():
    with pykvc.LLM(n_ctx=1024, n_threads=2, kv_policy="snapkv:window=16", kv_budget=0.5) as llm:
        yield llm


def test_as_if_alone(llm, alone):
    """The kept sets are those of a run alone; so are the tokens, for a model whose best token leads by more than the
    last bits in which matrix products of another shape differ."""
    batch = llm.generate_batch(PROMPTS, max_tokens=12)
    assert [b.n_prompt for b in batch] == [len(llm.tokenize(p)) for p in PROMPTS]
    for p, b in zip(PROMPTS, batch):
        a = alone.generate(p, max_tokens=12)
        assert b.kv["kept"] == a.kv["kept"] and b.kv["evictions"] == 1
        assert b.tokens[0] == a.tokens[0] and b.stop_reason == a.stop_reason
        assert b.tokens == a.tokens
    assert llm.n_tokens == 0
    assert llm.generate(PROMPTS[0], max_tokens=12).tokens == batch[0].tokens  # and the conversation works as before


@pytest.mark.parametrize("cells", [None, 256])
@pytest.mark.parametrize("policy", ["keydiff", "keydiff:share=all", "adakv:window=16"])
def test_lengths_of_their_own_as_if_alone(policy, cells):
    """Layers and heads of different lengths, four prompts at once; with kv_cells longer than the cells, so that all evict in
    mid-prompt, too."""
    how = dict(n_ctx=1024, n_threads=1, n_ubatch=64, kv_policy=policy, kv_budget=100, kv_cells=cells)
    prompts = [" ".join(WORDS[5*i:5*i + n]) for i, n in enumerate((300, 420, 240, 360))]
    with pykvc.LLM(n_seq_max=4, **how) as llm, pykvc.LLM(**how) as alone:
        for p, b in zip(prompts, llm.generate_batch(prompts, max_tokens=10)):
            a = alone.generate(p, max_tokens=10)
            assert b.tokens == a.tokens and b.kv["kept"] == a.kv["kept"] and b.kv["evictions"] == a.kv["evictions"] > (1 if cells else 0)
            assert b.kv["bytes_used"] == a.kv["bytes_used"] and len(set(b.kv["kept"])) > 1


@pytest.mark.parametrize("policy, budget", [("full", ""), ("snapkv", "200")])
def test_same_bits_alone(model_path, policy, budget):
    """With one thread, long sequences too. With several, flash attention divides the cells of a lone token among them, and the
    parts' sums come in another order (ggml does so from 512 cells on): then a batch is the more exact of the two."""
    model = _core.Model(str(model_path))
    tokens = np.array(model.tokenize(prose(60).encode()), np.int32)

    def logits(seqs):  # F32 [len(seqs), 8, n_vocab]
        c = _core.Context(model, n_ctx=1024*len(seqs), n_threads=1, n_seq_max=len(seqs), policy=policy, budget=budget)
        for i, seq in enumerate(seqs):
            c.decode(tokens[10*seq:600 + 30*seq], i)
            if budget:
                c.evict(i)
                c.end_prompt(i)
        rows = []
        for step in range(8):
            c.decode_batch(np.array([tokens[50*seq + step] for seq in seqs], np.int32), np.arange(len(seqs), dtype=np.int32))
            rows.append(c.logits().copy())
        return np.swapaxes(rows, 0, 1)

    together = logits(range(3))
    for seq in range(3):
        assert np.array_equal(together[seq], logits([seq])[0])


def test_one_sequence_is_generate(alone):
    batch = alone.generate_batch(PROMPTS[:2], max_tokens=8)
    assert [b.tokens for b in batch] == [alone.generate(p, max_tokens=8).tokens for p in PROMPTS[:2]]


def test_prefix_is_compressed_once(llm, alone):
    prefix, questions = prompt(0, 90), [" Who came?", " Where?", " Why was it so late?", " When?"]
    batch = llm.generate_batch(questions, prefix=prefix, max_tokens=8)
    for q, b in zip(questions, batch):
        alone.reset()
        alone.prefill(prefix)
        alone.compress()
        n_prefix = alone.stats()["kept"]
        a = alone.generate(q, reset=False, max_tokens=8)
        alone_kept = [n + b.n_prompt for n in n_prefix]
        assert b.tokens == a.tokens
        assert b.kv["kept"] == alone_kept and b.n_prompt == len(llm.tokenize(q, add_special=False))


def test_shots_are_spans():
    with pykvc.LLM(n_ctx=1024, n_seq_max=2, n_threads=2, kv_policy="shotkv:window=8", kv_budget=0.6) as llm:
        shots = [f"Q: {i}+{i}?\nA: {2*i}\n\n" for i in range(12)]
        batch = llm.generate_batch(["Q: 3+4?\nA:", "Q: 2+2?\nA:"], shots=shots, max_tokens=4, stop="\n")
        assert all(b.kv["kept"][0] < 0.7*len(llm.tokenize("".join(shots))) for b in batch)


def test_a_budget_for_each(llm):
    batch = llm.generate_batch([PROMPTS[1]]*3, kv_budget=[40, 0.25, None], max_tokens=2)
    n = batch[0].n_prompt
    assert [b.kv["kept"][0] for b in batch] == [40, round(n*0.25), round(n*0.5)]


class Seen(pykvc.Policy):
    """The newest stay; `seen` is what spans it was asked about."""
    name, spans, recent, seen = "seen", True, 4, []

    def score(self, layer):
        return layer.pos

    def budgets(self, request):
        self.seen.append([(int(begin), int(end)) for begin, end in request.spans])
        return [request.budget]*len(request.layers)


def test_spans_for_each(model_path):
    """Of the prompts, in tokens or characters; None: sentences, as where none are given."""
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[2]]
    spans = [[(0, 90), (90, 150)], None, [(5, 60)]]
    policy = Seen()
    with pykvc.LLM(model_path, n_ctx=512, n_seq_max=2, n_threads=2, kv_policy=policy, kv_budget=10) as llm:
        llm.generate_batch(prompts, spans=spans, span_unit="chars", max_tokens=1)
        batch = list(policy.seen)
        policy.seen.clear()
        for prompt, own in zip(prompts, spans):
            llm.generate(prompt, spans=own, span_unit="chars", max_tokens=1)
        assert sorted(batch) == sorted(policy.seen) and len(policy.seen) == 3
    how = dict(n_ctx=512, n_threads=2, kv_policy="shotkv:window=8,recent=8", kv_budget=0.5)
    with pykvc.LLM(model_path, n_seq_max=2, **how) as llm, pykvc.LLM(model_path, **how) as alone:
        for own, b in zip(spans, llm.generate_batch(prompts, spans=spans, span_unit="chars", max_tokens=6)):
            a = alone.generate(prompts.pop(0), spans=own, span_unit="chars", max_tokens=6)
            assert b.tokens == a.tokens and b.kv["kept"] == a.kv["kept"]


def test_a_decode_budget_for_each(model_path):
    how = dict(n_ctx=512, n_threads=2, kv_policy="streaming_llm:interval=4", kv_budget=24)
    decode = [4, None, 20]
    with pykvc.LLM(model_path, n_seq_max=3, kv_decode_budget=8, **how) as llm:
        batch = llm.generate_batch(PROMPTS[:3], kv_decode_budget=decode, max_tokens=32)
        both = llm.generate_batch(PROMPTS[:2], kv_budget=[None, 30], kv_decode_budget=4, max_tokens=32)
    for prompt, own, b in zip(PROMPTS, decode, batch):
        with pykvc.LLM(model_path, kv_decode_budget=own or 8, **how) as alone:
            a = alone.generate(prompt, max_tokens=32)
        assert b.tokens == a.tokens and b.kv["cells"] == a.kv["cells"] and b.kv["evictions"] == a.kv["evictions"]
    assert len({b.kv["cells"] for b in batch}) == 3
    assert both[0].tokens == batch[0].tokens and both[1].kv["kept"][0] == 30


def test_stream_gives_answers_as_they_are_done(llm):
    seen = [index for index, _ in llm.generate_batch(PROMPTS, max_tokens=3, stream=True)]
    assert sorted(seen) == list(range(len(PROMPTS)))
    left = llm.generate_batch(PROMPTS, max_tokens=3, stream=True)
    next(left)
    llm.reset()
    with pytest.raises(RuntimeError, match="over"):
        list(left)
    left = llm.generate_batch(PROMPTS, max_tokens=3, stream=True)
    next(left)
    left.close()
    assert llm.stats()["bytes_used"] == 0


@pytest.mark.parametrize("how, why", [
    (dict(prompts="one"), "list"), (dict(prompts=5), "list"), (dict(prompts=(p for p in "ab")), "list"), (dict(prompts=["a"], prefix=5), "prefix"),
    (dict(prompts=["a"], kv_budget=object()), "kv_budget"), (dict(prompts=["a"], shots=5), "shots"),
    (dict(prompts=[]), "empty"), (dict(prompts=["a", ""]), "empty"),
    (dict(prompts=["x "*2000]), "n_ctx"), (dict(prompts=["a"], kv_budget=[1, 2]), "each prompt"),
    (dict(prompts=["a"], shots=["b"], prefix="c"), "shots"), (dict(prompts=["a"], spans=[(0, 1)]), "prefix"),
    (dict(prompts=["a", "b"], spans=[[(0, 1)]]), "each of the 2"), (dict(prompts=["a"], spans=5), "each of the 1"),
    (dict(prompts=["a b c", "a"], spans=[None, [(0, 99)]]), "leaves"), (dict(prompts=["a"], spans=[[(0, 1)]], segment="sentence"), "not both"),
    (dict(prompts=["a"], kv_decode_budget=[1, 2]), "each prompt"), (dict(prompts=["a"], kv_decode_budget=9), "does not evict generated"),
    (dict(prompts=["a"], kv_budget=3), "at least 17"), (dict(prompts=["a"], prefix="x "*1100), "n_ctx"),
])
def test_mistakes_change_nothing(llm, how, why):
    llm.generate(PROMPTS[2], max_tokens=2)
    n = llm.n_tokens
    with pytest.raises(ValueError, match=why):
        llm.generate_batch(**how)
    assert llm.n_tokens == n


def test_a_prefix_for_each(llm, alone):
    """Question-out, with other contexts: each question as after its own, the second time from what is there."""
    prefixes, questions = [prompt(0, 90), prompt(0, 90), prompt(3, 60), prompt(4, 50)], [" Who came?", " Where?", " Why?", " When?"]
    batch = llm.generate_batch(questions, prefix=prefixes, max_tokens=8)
    for prefix, question, b in zip(prefixes, questions, batch):
        alone.reset()
        alone.prefill(prefix)
        alone.compress()
        kept = alone.stats()["kept"]
        a = alone.generate(question, reset=False, max_tokens=8)
        assert b.tokens == a.tokens and b.kv["prefix_kept"] == kept and b.kv["prefix_evictions"] == 1 and b.kv["evictions"] == 0


@pytest.mark.parametrize("policy", ["snapkv:window=16", "shotkv:window=8,recent=8", "h2o"])
def test_a_prefix_that_is_compressed_with_each_prompt(policy):
    """Question-in: the prefix is evaluated once, and evicted with the question."""
    prefix, questions = prompt(0, 90), [" Who came?", " Where was it?", " Why?"]
    how = dict(n_ctx=512, n_threads=2, kv_policy=policy, kv_budget=0.5)
    with pykvc.LLM(n_seq_max=2, **how) as llm, pykvc.LLM(**how) as alone:
        spans = [(0, len(prefix)//2), (len(prefix)//2, len(prefix))]
        batch = llm.generate_batch(questions, prefix=prefix, spans=spans, span_unit="chars", compress_prefix=False, max_tokens=6)
        for question, b in zip(questions, batch):
            alone.reset()
            n = alone.prefill(prefix, spans=spans, span_unit="chars")
            a = alone.generate(question, spans=(), reset=False, max_tokens=6)
            assert b.kv["kept"] == a.kv["kept"] and b.kv["evictions"] == 1 and b.kv["prefix_evictions"] == 0
            assert b.kv["prefix_kept"] == [n]*len(a.kv["kept"]) and b.tokens == a.tokens


@pytest.mark.parametrize("policy", ["snapkv:window=16", "shotkv:window=8,recent=8", "h2o", "kvzip:recent=8"])
def test_a_prefix_is_evaluated_once_for_several_budgets(policy):
    """Each question as in an LLM of that budget."""
    prefixes, budgets = [prompt(0, 90)]*4 + [prompt(3, 60)]*2, [60, None, 40, 60, 40, 60]
    questions = [" Who came?", " Where was it?", " Why?", " When?", " Who?", " How?"]
    spans = [[(0, len(prefix)//2), (len(prefix)//2, len(prefix))] for prefix in prefixes]
    how = dict(n_ctx=512, n_threads=2, kv_policy=policy)
    with pykvc.LLM(n_seq_max=3, kv_budget=50, **how) as llm:
        batch = llm.generate_batch(questions, prefix=prefixes, spans=spans, span_unit="chars", kv_budget=budgets, max_tokens=6)
    for prefix, own, question, budget, b in zip(prefixes, spans, questions, budgets, batch):
        with pykvc.LLM(kv_budget=budget or 50, **how) as alone:
            alone.prefill(prefix, spans=own, span_unit="chars")
            alone.compress()
            kept = alone.stats()["kept"]
            a = alone.generate(question, reset=False, spans=(), max_tokens=6)
        assert b.kv["prefix_kept"] == list(kept) and b.kv["prefix_evictions"] == 1 and b.kv["evictions"] == 0
        assert b.tokens == a.tokens and b.kv["bytes_used"] == a.kv["bytes_used"]


def test_probes_take_turns():
    prefixes = [prompt(0, 90), prompt(0, 90), prompt(3, 60)]
    how = dict(n_ctx=512, n_threads=2, kv_policy="kvzip", kv_budget=64)
    with pykvc.LLM(n_seq_max=3, **how) as llm, pykvc.LLM(**how) as alone:
        batch = llm.generate_batch([" Who?", " Where?", " Why?"], prefix=prefixes, max_tokens=4)
        for prefix, question, b in zip(prefixes, [" Who?", " Where?", " Why?"], batch):
            alone.reset()
            alone.prefill(prefix)
            alone.compress()
            assert b.tokens == alone.generate(question, reset=False, max_tokens=4).tokens
        with pytest.raises(ValueError, match="compress_prefix"):
            llm.generate_batch([" Who?"], prefix=prefixes[0], compress_prefix=False)


def test_prefixes_are_as_many_as_prompts(llm):
    with pytest.raises(ValueError, match="one for each of the 2"):
        llm.generate_batch(["a", "b"], prefix=["c"])
    with pytest.raises(ValueError, match="one for each of the 2"):
        llm.generate_batch(["a", "b"], prefix=["c", "d"], spans=[[(0, 1)]])


def test_numbers_and_arrays_of_numpy(llm):
    ids = np.array([llm.tokenize("one two", add_special=False)[:2]]*2)
    assert [a.tokens for a in llm.generate_batch(ids, max_tokens=2)] == [a.tokens for a in llm.generate_batch(ids.tolist(), max_tokens=2)]
    for budget in (np.int64(40), np.float32(0.5), [np.int64(40)]):
        llm.generate_batch(["one two"], kv_budget=budget, max_tokens=1)
