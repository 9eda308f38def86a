"""Threads that share an LLM or a Llama, streams that are left, forks: nothing aborts or hangs, and what is answered is right."""
import gc
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import pykvc
import tiny
from conftest import N_GPU_LAYERS
from pykvc import _core, turns

PROMPTS = [list(range(i, 40 + 7*i)) for i in range(8)]  # tokens of a tiny model
HOW = dict(n_ctx=256, n_threads=1, kv_policy="snapkv:window=8", kv_budget=16)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("threads")/"model.gguf")


@pytest.fixture(scope="module")
def llm(path):
    with pykvc.LLM(path, n_seq_max=2, **HOW) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(llm):
    """The answers, as one thread gets them."""
    return [llm.generate(tokens=prompt, max_tokens=6).tokens for prompt in PROMPTS]


def at_once(*work):
    """Runs functions in threads of their own, all begun together; their results, or what the first of them raised."""
    begin = threading.Barrier(len(work))
    with ThreadPoolExecutor(len(work)) as pool:
        return [done.result() for done in [pool.submit(lambda do=do: (begin.wait(), do())[1]) for do in work]]


# -- one LLM --------------------------------------------------------------------------------------------------------

def test_calls_queue(llm, alone):
    """8 threads, 50 calls each."""
    def work(i):
        return [llm.generate(tokens=PROMPTS[(i + n) % 8], max_tokens=6).tokens == alone[(i + n) % 8] for n in range(50)]
    assert all(map(all, at_once(*(lambda i=i: work(i) for i in range(8)))))


def test_every_call_of_an_llm_may_meet_every_other(llm, alone, tmp_path):
    llm.generate(tokens=PROMPTS[0], max_tokens=2)
    llm.save(tmp_path/"state")

    def stream():
        return len(list(llm.generate(tokens=PROMPTS[2], max_tokens=6, stream=True)))

    def batch():
        return list(llm.generate_batch(PROMPTS[:3], max_tokens=4, stream=True))

    def look():
        stats, kept = llm.stats(), llm.kept()
        assert len(kept) == len(stats["kept"]) and all(k.shape[0] == tiny.N_HEAD_KV for k in kept)
        assert llm.n_tokens >= 0 and llm.n_ctx == 256

    def ask():
        context = llm.context(tokens=PROMPTS[7])
        context.compress(budget=20)
        return context.ask(tokens=[5, 6, 7], max_tokens=4).tokens

    def compress():
        llm.prefill(tokens=PROMPTS[5][:8])
        llm.compress()
        llm.scores()
        llm.evaluate(PROMPTS[4][:4])
        llm.reset()

    def go_back():
        llm.load(tmp_path/"state")
        llm.save(tmp_path/"other")
        llm.truncate(llm.n_tokens)

    def tried(do):
        try:
            return do()
        except (RuntimeError, ValueError) as error:  # what was there has gone, by the call of another thread
            assert any(why in str(error) for why in ("is over", "is empty", "n_tokens is a whole number", "can be truncated to")), error
    expected = ask()
    right = [llm.generate_batch(PROMPTS[:3], max_tokens=4)[i].tokens for i in range(3)]
    found = at_once(*(lambda do=do: [tried(do) for _ in range(15)] for do in (
        stream, batch, look, ask, compress, go_back, lambda: llm.generate(tokens=PROMPTS[1], max_tokens=6).tokens,
        lambda: [g.tokens for g in llm.generate_batch(PROMPTS[:3], max_tokens=4)])))
    assert all(tokens == expected for tokens in found[3] if tokens is not None)
    assert all(tokens == alone[1] for tokens in found[6]) and all(tokens == right for tokens in found[7])
    assert llm.generate(tokens=PROMPTS[3], max_tokens=6).tokens == alone[3]


class Meets(pykvc.Policy):
    """Waits in score() until another one is there."""
    name = "meets"

    def __init__(self, meeting: threading.Barrier) -> None:
        self.meeting = meeting

    def score(self, layer):
        self.meeting.wait(60)
        return np.zeros((layer.n_head_kv, layer.n_kv), np.float32)


def test_two_llms_do_not_wait_for_each_other(path):
    policy = Meets(threading.Barrier(2))
    how = {**HOW, "kv_policy": policy}
    with pykvc.LLM(path, **how) as one, pykvc.LLM(path, **how) as two:
        a, b = at_once(*(lambda llm=llm: llm.generate(tokens=PROMPTS[2], max_tokens=4).tokens for llm in (one, two)))
    assert a == b


def test_llms_made_at_once_have_their_own_policies(path):
    names = ["snapkv:window=8", "keydiff", "tova", "streaming_llm"]

    def make(name):
        for _ in range(8):
            with pykvc.LLM(path, n_ctx=256, n_threads=1, kv_policy=name, kv_budget=24) as llm:
                if not llm.policy.startswith(name.partition(":")[0]):
                    return llm.policy
    assert at_once(*(lambda name=name: make(name) for name in names)) == [None]*4


def test_close_waits_for_the_call_of_another_thread(path):
    asked, go = threading.Event(), threading.Event()

    class Slow(pykvc.Policy):
        name = "slow"

        def score(self, layer):
            asked.set()
            go.wait(60)
            return np.zeros((layer.n_head_kv, layer.n_kv), np.float32)
    llm = pykvc.LLM(path, **{**HOW, "kv_policy": Slow()})
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(llm.generate, tokens=PROMPTS[2], max_tokens=4)
        assert asked.wait(60)
        closed = pool.submit(llm.close)
        go.set()
        assert answer.result().n_predicted == 4 and closed.result() is None
    with pytest.raises(ValueError, match="closed"):
        llm.stats()


def test_a_policy_cannot_use_the_llm_that_asks_it(path, alone):
    """Nor can the call amid which it is asked go on; another LLM it may use, and look at its own."""
    class Asks(pykvc.Policy):
        name, do = "asks", None

        def score(self, layer):
            self.do()
            return -layer.pos.astype(np.float32)
    policy = Asks()
    with pykvc.LLM(path, **{**HOW, "kv_policy": policy}) as llm, pykvc.LLM(path, **HOW) as other:
        for do in (lambda: llm.generate(tokens=PROMPTS[1], max_tokens=2), llm.reset, llm.compress, llm.scores, lambda: llm.truncate(3),
                   lambda: llm.evaluate([1]), lambda: llm.save("/nowhere"),
                   lambda: llm._session.ctx.set_policy("", "30"), lambda: llm._session.ctx.set_spans([(0, 3)])):
            policy.do = do
            with pytest.raises(RuntimeError, match="one call at a time"):
                llm.generate(tokens=PROMPTS[2], max_tokens=2)
        policy.do = lambda: (llm.stats(), llm.kept(), other.generate(tokens=PROMPTS[1], max_tokens=2))
        assert llm.generate(tokens=PROMPTS[2], max_tokens=6).n_predicted == 6


ENDS = """
import sys, threading, time, pykvc
begun = threading.Event()
if sys.argv[2] == "llm":
    llm = pykvc.LLM(sys.argv[1], n_ctx=4096, n_threads=2, kv_policy="snapkv", kv_budget=64)
    ask = lambda: llm.generate(tokens=list(range(20, 120))*30, max_tokens=50)
else:
    from pykvc.llama_cpp import Llama
    llm = Llama(sys.argv[1], n_ctx=4096, n_threads=2, n_threads_batch=2, verbose=False)
    ask = lambda: llm(list(range(20, 120))*30, max_tokens=50)
def work():
    while True:
        begun.set()
        ask()
threading.Thread(target=work, daemon=True).start()
begun.wait()
time.sleep(0.05)
sys.exit(7)
"""


@pytest.mark.parametrize("api", ["llm", "llama"])
def test_the_interpreter_ends_while_a_daemon_asks(tmp_path, api):
    """The call ends, and the process does as it was told."""
    path = tiny.write_chat(tmp_path/"model.gguf", {})
    done = subprocess.run([sys.executable, "-I", "-c", ENDS, str(path), api], capture_output=True, text=True, timeout=300)
    assert done.returncode == 7 and not done.stderr, done.stderr


# -- streams --------------------------------------------------------------------------------------------------------

STREAMS = {
    "generate": lambda llm: llm.generate(tokens=PROMPTS[1], max_tokens=4, stream=True),
    "batch": lambda llm: llm.generate_batch(PROMPTS[:2], max_tokens=4, stream=True),
    "ask": lambda llm: llm.context(tokens=PROMPTS[1]).ask(tokens=[1, 2], max_tokens=4, stream=True),
}


@pytest.mark.parametrize("begin", STREAMS.values(), ids=STREAMS)
def test_a_stream_takes_its_turn_when_it_is_asked_for(llm, begin):
    """And not when its first piece is."""
    early = begin(llm)
    llm.reset()
    n = llm.prefill(tokens=PROMPTS[3])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="^this (stream|batch) is over: the LLM was used for something else meanwhile$"):
            next(early)
    assert llm.n_tokens == n and llm.stats()["n_tokens"] == n


def test_two_streams_do_not_mix(llm, alone):
    a, b = (llm.generate(tokens=PROMPTS[i], max_tokens=6, echo=False, stream=True) for i in (0, 1))
    list(b)
    assert b.result.tokens == alone[1]
    with pytest.raises(RuntimeError, match="is over"):
        next(a)
    assert list(b) == []  # it has ended, and says nothing else
    with pytest.raises(ValueError, match="not ended"):
        a.result


def test_abandoned_streams_leave_it_right(model_path):
    """500 of them: begun, not begun, kept or left to the garbage."""
    text = "The sky is blue. The sea is"
    with pykvc.LLM(model_path, n_ctx=256, n_threads=1, n_seq_max=2, kv_policy="snapkv:window=4", kv_budget=8) as llm:
        expected, kept = llm.generate(text, max_tokens=3).tokens, []
        used = llm.stats()["bytes_used"]
        for i in range(500):
            stream = (llm.generate_batch(["One", "Two"], max_tokens=2, stream=True) if i % 25 == 0 else
                      llm.generate("Hi", max_tokens=2, stream=True))
            if i % 5 == 0:
                next(stream)
            if i % 3 == 0:
                kept.append(stream)
        del stream
        gc.collect()
        assert llm.generate(text, max_tokens=3).tokens == expected and llm.stats()["bytes_used"] == used
        assert all(batch.tokens for batch in llm.generate_batch(["One", "Two"], max_tokens=2))


def test_what_a_batch_leaves_is_not_the_conversation(llm):
    """It goes at the next call that needs the cache, whoever held it when the batch was left."""
    for use in (lambda: llm.prefill(tokens=PROMPTS[1]), lambda: llm.generate(tokens=PROMPTS[1], reset=False, max_tokens=2)):
        batch = llm.generate_batch(PROMPTS[:4], max_tokens=8, stream=True)
        next(batch)
        use()
        assert llm.stats()["n_tokens"] == llm.n_tokens == llm._session.ctx.pos_max() + 1
        with pytest.raises(RuntimeError, match="batch is over"):
            next(batch)


def test_a_stream_read_by_threads(llm, alone):
    """Its pieces go to whoever asks; a call in between ends it."""
    stream = llm.generate(tokens=PROMPTS[0], max_tokens=6, stream=True)
    at_once(*[lambda: list(stream)]*4)
    assert stream.result.tokens == alone[0]


# -- forks ----------------------------------------------------------------------------------------------------------

FORKS = """
import os, sys, threading, pykvc
import numpy as np
path, how = sys.argv[1], dict(n_ctx=256, n_threads=2, kv_policy="snapkv:window=8", kv_budget=16)
ask = lambda llm, n=40: llm.generate(tokens=list(range(n)), max_tokens=6).tokens

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(1)
    return os.waitpid(pid, 0)[1]

with pykvc.LLM(path, **how) as llm:
    expected = ask(llm)
    stream = llm.generate(tokens=list(range(40)), max_tokens=6, stream=True)
    next(stream, None)

    def new():
        with pykvc.LLM(path, **how) as own:
            assert ask(own) == expected
    def same():
        list(stream)
        assert stream.result.tokens == expected and ask(llm) == expected
    assert [child(work) for work in (new, same, new)] == [0, 0, 0]
    assert ask(llm) == expected

asked, go = threading.Event(), threading.Event()
class Slow(pykvc.Policy):
    name = "slow"
    def score(self, layer):
        asked.set()
        go.wait(60)
        return np.zeros((layer.n_head_kv, layer.n_kv), np.float32)

with pykvc.LLM(path, **{**how, "kv_policy": Slow()}) as llm:
    thread = threading.Thread(target=ask, args=(llm,))
    thread.start()
    asked.wait(60)
    def half_done():
        with llm:
            for call in (llm.stats, lambda: ask(llm), llm.reset):
                try:
                    call()
                except RuntimeError as error:
                    assert "forked while another thread" in str(error)
                else:
                    raise AssertionError("it was half-done")
        new()
    status = child(half_done)
    go.set()
    thread.join()
    assert status == 0 and len(ask(llm)) == 6
"""


@pytest.mark.skipif(N_GPU_LAYERS > 0, reason="a GPU's memory does not come along")
def test_forks_after_use(path):
    done = subprocess.run([sys.executable, "-I", "-c", FORKS, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_gpu_does_not_come_along(path, monkeypatch):
    """What a child of a process that used one is told: of what it holds, and of a new one."""
    with pykvc.LLM(path, **HOW) as llm:
        monkeypatch.setattr(turns, "_all", {llm._turns})
        monkeypatch.setattr(turns, "_forked_from_device", False)
        turns._after_fork()
        assert llm.stats()["n_tokens"] == 0  # on the CPU it does
        monkeypatch.setattr(_core, "devices", lambda: [("CPU", "", "CPU"), ("CUDA0", "", "GPU")])
        turns._after_fork()
        for call in (llm.stats, lambda: pykvc.LLM(path, **HOW)):
            with pytest.raises(RuntimeError, match="forked from one that used a GPU.*spawn"):
                call()
        monkeypatch.undo()
        llm._turns.lost = ""


# -- pykvc.llama_cpp ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def llama(model_path):
    from pykvc.llama_cpp import Llama
    llama = Llama(str(model_path), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, kv_policy="snapkv:window=8", kv_budget=12)
    yield llama
    llama.close()


TEXTS = ["The sky is blue and the", "One, two, three, four,", "A cat sat on the mat, and"]


def test_threads_that_share_a_llama(llama):
    ask = lambda i: llama(TEXTS[i], max_tokens=2, temperature=0)["choices"][0]["text"]
    expected = [ask(i) for i in range(3)]
    found = at_once(*(lambda i=i: [(ask(i), llama.n_tokens >= 0, len(llama.tokenize(b"one two")), llama.kv_stats()["cells"] >= 0)[0] for _ in range(5)]
                      for i in range(3)))
    assert found == [[text]*5 for text in expected]


def test_a_llama_s_stream_that_was_left(llama):
    """Theirs aborts when it is read on."""
    expected = llama(TEXTS[0], max_tokens=4, temperature=0)["choices"][0]["text"]
    streams = [llama(TEXTS[1], max_tokens=8, temperature=0, stream=True), llama.generate(llama.tokenize(TEXTS[1].encode()), temp=0),
               llama.create_chat_completion([{"role": "user", "content": "Hi"}], max_tokens=8, temperature=0, stream=True)]
    for stream in streams[2:] + streams[:2]:
        with pytest.raises(RuntimeError, match="is over"):
            next(stream) if stream is not streams[2] else [next(stream), next(stream), llama(TEXTS[0], max_tokens=1), next(stream)]
    assert llama(TEXTS[0], max_tokens=4, temperature=0)["choices"][0]["text"] == expected
    whole = "".join(chunk["choices"][0]["text"] for chunk in llama(TEXTS[0], max_tokens=4, temperature=0, stream=True))
    assert whole == expected
    tokens = llama.generate(llama.tokenize(TEXTS[0].encode()), temp=0)
    first = next(tokens)
    assert llama.detokenize([first]) and tokens.send(None) >= 0
    with pytest.raises(ValueError, match="logits_all"):  # theirs aborts
        tokens.send([first])


def test_a_closed_llama(model_path):
    """Where theirs reads memory that is free."""
    from pykvc.llama_cpp import Llama
    llama = Llama(str(model_path), n_ctx=128, n_threads=1, verbose=False)
    stream = llama("a", max_tokens=4, stream=True)
    next(stream)
    llama.close()
    llama.close()
    with pytest.raises(RuntimeError, match="is over"):
        next(stream)
    for call in (lambda: llama("a"), lambda: llama.tokenize(b"a"), lambda: llama.detokenize([1]), llama.n_ctx, llama.token_eos, llama.save_state,
                 llama.kept, llama.reset, lambda: llama.generate([1]), lambda: llama.create_chat_completion([{"role": "user", "content": "a"}])):
        with pytest.raises(ValueError, match="closed"):
            call()
