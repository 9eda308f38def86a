"""Numbers at the edges of what C counts in, at every door: each is right, or a sentence that names what is valid."""
import numpy as np
import pytest
from typer.testing import CliRunner

import pykvc
import tiny
from pykvc import _core, cli

EDGES = [-2**63, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**64]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("numbers")/"model.gguf")


@pytest.fixture(scope="module")
def llm(path):
    with pykvc.LLM(path, n_ctx=256, n_threads=1, kv_policy="tova", kv_budget=8) as llm:
        yield llm


class Sinks(pykvc.Policy):
    name = "first"

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def score(self, layer):
        return -layer.pos.astype(np.float32)


@pytest.mark.parametrize("name", ["n_ctx", "n_batch", "n_ubatch", "n_threads", "n_seq_max", "n_gpu_layers", "seed", "kv_budget", "kv_decode_budget",
                                  "kv_cells"])
def test_arguments_of_an_llm(path, name):
    """In one sentence: nothing of pybind11, no allocation that no memory stands behind."""
    for value in EDGES:
        how = {"n_ctx": 256, "n_threads": 1, **({"kv_policy": "tova", "n_ubatch": 64} if name.startswith("kv_") else {}), name: value}
        try:
            with pykvc.LLM(path, **how) as llm:
                assert llm.generate(tokens=range(20), max_tokens=2).n_predicted == 2
        except ValueError as error:
            assert name in str(error) and "\n" not in str(error), error


@pytest.mark.parametrize("name", ["window", "future", "sinks", "recent"])
@pytest.mark.parametrize("value", [2**31, 2**64])
def test_attributes_of_a_policy(path, name, value):
    with pytest.raises(ValueError, match=f"Sinks.{name} is at most"):
        pykvc.LLM(path, n_ctx=256, kv_policy=Sinks(**{"window": 1, name: value}), kv_budget=8)


@pytest.mark.parametrize("name, valid", [("max_tokens", {-1, 2**31 - 1}), ("top_k", {2**31 - 1}), ("seed", {-1, 2**31 - 1, 2**31, 2**32 - 1}),
                                         ("kv_budget", {2**31 - 1}), ("kv_decode_budget", {2**31 - 1})])
def test_arguments_of_generate(llm, name, valid):
    for value in EDGES:
        how = {"max_tokens": 2, "temperature": 1.0, name: value}
        if value in valid:
            assert llm.generate(tokens=range(20), **how).n_predicted >= 1  # a random seed may end it
        else:
            with pytest.raises(ValueError, match=name):
                llm.generate(tokens=range(20), **how)


def test_tokens_and_places(llm):
    """-1 is llama.cpp's LLAMA_TOKEN_NULL."""
    for value in EDGES:
        for call in (lambda: llm.generate(tokens=[1, value]), lambda: llm.prefill(tokens=[value]), lambda: llm.evaluate([value]),
                     lambda: llm.detokenize([value]), lambda: llm.generate_batch([[1, value]])):
            with pytest.raises(ValueError, match="a token id is a whole number of"):
                call()
        with pytest.raises(ValueError, match="n_tokens is a whole number"):
            llm.truncate(value)
        with pytest.raises(ValueError):
            llm.generate(tokens=range(20), spans=[(0, value)] if value != -1 else [(-1, 5)])
    for tokens in (5, "abc", None):
        with pytest.raises(ValueError, match="tokens"):
            llm.evaluate(tokens)


def test_the_last_seed_is_no_random_one(path):
    with pykvc.LLM(path, n_ctx=256, n_threads=1, seed=2**32 - 1) as llm:
        a, b, c = (llm.generate(tokens=range(20), max_tokens=24, temperature=9.0, top_k=0, top_p=1.0, min_p=0.0, **how).tokens
                   for how in ({}, {}, {"seed": 1}))
    assert a == b != c


@pytest.mark.parametrize("n_ctx", [2**31 - 1, 2**31, 2**32 - 1])
def test_context_lengths_of_a_file(tmp_path, n_ctx):
    """u32 there."""
    path = tiny.write(tmp_path/"model.gguf", n_ctx=n_ctx)
    assert _core.Model(str(path)).n_ctx_train == n_ctx
    with pykvc.LLM(path, n_threads=1) as llm:
        assert llm.n_ctx == 8192 and llm.generate(tokens=range(20), max_tokens=2).n_predicted == 2


def test_a_context_longer_than_the_model_knows(tmp_path, capfd):
    path = tiny.write(tmp_path/"model.gguf", n_ctx=256)
    for n_ctx in (0, 100, 256):
        with pykvc.LLM(path, n_ctx=n_ctx, n_threads=1):
            assert not capfd.readouterr().err
    with pykvc.LLM(path, n_ctx=1024, n_threads=1) as llm:
        llm.generate(tokens=range(20), max_tokens=2)
        said = capfd.readouterr().err
    assert said.count("\n") == 1 and said.startswith("n_ctx 1024: this model was trained for 256 tokens")


def test_more_cells_than_memory(path):
    """n_ctx costs nothing where kv_cells say how much is allocated."""
    with pytest.raises(ValueError, match=r"takes \d+ GiB, and this machine has \d+ GiB: give a smaller n_ctx, or kv_cells"):
        pykvc.LLM(path, n_ctx=2**31 - 256)
    with pykvc.LLM(path, n_ctx=2**31 - 256, n_threads=1, n_ubatch=64, kv_policy="keydiff", kv_cells=256) as llm:
        assert llm.n_ctx == 2**31 - 256 and llm.generate(tokens=list(range(100))*10, max_tokens=4).n_predicted == 4


@pytest.mark.parametrize("flag", ["-c", "-b", "-ub", "-t", "-ngl", "-s", "-n", "--top-k", "--kv-budget", "--kv-decode-budget", "--kv-cells"])
def test_flags(path, flag, monkeypatch):
    """Exit status 2 and one sentence, or an answer."""
    monkeypatch.setattr(pykvc.LLM, "generate", lambda self, *args, **how: (_ for _ in ()).throw(ValueError("it came as far as a prompt")))
    for value in EDGES:
        done = CliRunner().invoke(cli.app, ["generate", "-m", str(path), "-p", "x", "--kv-policy", "tova", "--kv-budget", "8", flag, str(value)])
        assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1, done.output


# -- pykvc.llama_cpp ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, valid", [("n_ctx", set()), ("n_batch", set()), ("n_ubatch", {2**31 - 1}), ("n_threads", {-1}), ("n_threads_batch", {-1})])
def test_arguments_of_a_llama(model_path, name, valid):
    """Those that end the process with theirs, or take all memory."""
    from pykvc.llama_cpp import Llama
    for value in EDGES:
        how = {"n_ctx": 128, "n_threads": 1, "verbose": False, name: value}
        if value in valid:
            Llama(str(model_path), **how).close()
        else:
            with pytest.raises(ValueError):
                Llama(str(model_path), **how)


def test_tokens_and_seeds_of_a_llama(model_path):
    from pykvc.llama_cpp import Llama
    llama = Llama(str(model_path), n_ctx=128, n_threads=1, verbose=False)
    for value in EDGES:
        for detokenize in (llama.detokenize, llama.tokenizer().detokenize):
            with pytest.raises(ValueError, match="a token id"):
                detokenize([value])
        with pytest.raises((RuntimeError, OverflowError)):
            llama.eval([value])
        with pytest.raises(ValueError, match="no logits"):  # theirs aborts
            llama.sample()
    hot = dict(max_tokens=8, temperature=2.0, top_k=0, top_p=1.0, min_p=0.0)
    texts = [llama("One", seed=seed, **hot)["choices"][0]["text"] for seed in (7, 7, -1, -1)]
    assert texts[0] == texts[1] and len(set(texts[1:])) == 3  # -1: a random one
    state = llama.save_state()
    llama.load_state(state)
    with pytest.raises(ValueError, match="no logits"):
        llama.sample()
    llama.close()
