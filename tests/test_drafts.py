"""A draft's context that reads another one's cells, or a model's own draft layers: it has no policy, and says so."""
import ctypes

import numpy as np
import pytest

import families
import tiny
from pykvc import _core, llama_cpp

MTP = 1  # LLAMA_CONTEXT_TYPE_MTP
SPEC = b"snapkv:window=16"


@pytest.fixture(scope="module")
def lib():
    lib = ctypes.CDLL(str(next(llama_cpp.LIB.glob("libllama.*"))))
    lib.kvc_last_error.restype = ctypes.c_char_p
    lib.kvc_next_context.argtypes = [ctypes.c_char_p]*4 + [ctypes.c_bool]
    lib.kvc_guess_prompt_end.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    lib.kvc_evict.argtypes = [ctypes.c_void_p, ctypes.c_int]
    lib.kvc_kept.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    return lib


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    import llama_cpp as theirs  # after ours, which has the library
    folder, made = tmp_path_factory.mktemp("drafts"), []

    def load(arch):
        path = folder/f"{arch}.gguf"
        families.write_draft(path, tiny.N_VOCAB) if arch == "draft" else tiny.write(path, arch)
        params = theirs.llama_model_default_params()
        params.load_mtp = True
        made.append(theirs.llama_model_load_from_file(str(path).encode(), params))
        assert made[-1]
        return made[-1]
    yield load
    for model in made:
        theirs.llama_model_free(model)


@pytest.fixture
def said():
    """What llama.cpp has logged since it was asked."""
    lines = []
    _core.set_log(lambda level, text: lines.append(text))

    def read():
        text = "".join(lines)
        lines.clear()
        return text
    yield read
    _core.set_log(None)


@pytest.fixture
def create(lib):
    """create(model, policy="", **how): a context, or None."""
    import llama_cpp as theirs
    made = []

    def create(model, policy="", **how):
        params = theirs.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = 512, 128, 32, 1, 1
        for name, value in how.items():
            setattr(params, name, value)
        if policy:
            assert lib.kvc_next_context(policy, b"40", None, None, False) == 0
        made.append(theirs.llama_init_from_model(model, params))
        return made[-1]
    yield create
    for ctx in reversed(made):
        if ctx:
            theirs.llama_free(ctx)


def decode(ctx, tokens, h=None, first=0):
    """Logits of the last token. h F32 [n_tokens, n_embd]: of the model that it drafts for."""
    import llama_cpp as theirs
    n, n_vocab = len(tokens), tiny.N_VOCAB
    b = theirs.llama_batch_init(n, 0, 1)
    own = b.token
    if h is not None:
        b.embd = h.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    b.n_tokens = n
    for i, token in enumerate(tokens):
        b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0], b.logits[i] = int(token), first + i, 1, 0, i == n - 1
    try:
        assert theirs.llama_decode(ctx, b) == 0
        return np.ctypeslib.as_array(theirs.llama_get_logits_ith(ctx, n - 1), (n_vocab,)).copy()
    finally:
        b.embd, b.token = None, own
        theirs.llama_batch_free(b)


def test_a_context_that_reads_anothers_cells(lib, load, create, monkeypatch, said):
    """Asked for a policy it is refused; the environment's is for its target alone, which evicts while the draft reads on."""
    target, draft = load("gemma4"), load("draft")
    own = create(target, SPEC)
    assert create(draft, SPEC, ctx_other=own) is None and "give it the policy full" in said()
    monkeypatch.setenv("LLAMA_ARG_KV_POLICY", SPEC.decode())
    monkeypatch.setenv("LLAMA_ARG_KV_BUDGET", "40")
    beside = create(draft, ctx_other=own)
    assert "is ignored here: a draft's context reads another one's cells" in said()
    assert beside and lib.kvc_guess_prompt_end(beside, False) == -1 and b"no eviction policy" in lib.kvc_last_error()
    tokens = np.random.default_rng(0).integers(0, tiny.N_VOCAB, 100)
    decode(own, tokens)
    hidden = np.random.default_rng(1).standard_normal((1, families.N_EMBD)).astype(np.float32)
    assert np.isfinite(decode(beside, tokens[-1:], hidden, 100)).all()
    assert lib.kvc_evict(own, 0) == 1 and lib.kvc_kept(own, 0, 0, None) == 40
    assert np.isfinite(decode(beside, tokens[-1:], hidden, 100)).all()
    assert np.isfinite(decode(own, tokens[:1], first=100)).all() and lib.kvc_kept(own, 0, 0, None) == 41


def test_a_models_own_draft_layers(lib, load, create, monkeypatch, said):
    model = load("deepseek2:draft")
    assert create(model, SPEC, ctx_type=MTP) is None and "never evicted" in said()
    monkeypatch.setenv("LLAMA_ARG_KV_POLICY", SPEC.decode())
    beside = create(model, ctx_type=MTP)
    assert beside and lib.kvc_guess_prompt_end(beside, False) == -1
    own = create(model)
    assert own and lib.kvc_guess_prompt_end(own, False) == 0


def test_its_own_context_class_says_why(tmp_path):
    """A draft without the context it drafts for is llama.cpp's to refuse; no policy is left over for the next context."""
    draft = _core.Model(str(families.write_draft(tmp_path/"draft.gguf", tiny.N_VOCAB)))
    with pytest.raises(ValueError, match="cannot be created"):
        _core.Context(draft, n_ctx=256, policy="keydiff", budget="40")
    other = _core.Context(_core.Model(str(tiny.write(tmp_path/"model.gguf"))), n_ctx=256, policy="full")
    assert other.policy == "full"
