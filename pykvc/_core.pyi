"""The compiled half of pykvc: libllama with the eviction engine, as thin classes. Users want `pykvc.LLM`."""
from typing import Any, Callable, Sequence
import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]

# -- the policy table and the host half of the engine: no model needed ---------------------------------------------

def policies() -> list[dict[str, Any]]:
    """The table: name, title, paper, decode ('none' | 'whole' | 'generated'), layers_differ, heads_differ, share (its
    default, None: it cannot share), recommended (for a budget without a policy), needs (of the default parameters: window,
    newest, sums, keys, spans), params [{name, value, doc, min, max, choices, integer}]."""

def architectures() -> list[str]: """Names of all that llama.cpp knows: docs/architectures.md says what evicts."""

def parse_spec(spec: str) -> str:
    """The canonical form of a spec: every parameter, in declared order. ValueError names what is valid."""

def needs(spec: str) -> dict[str, Any]:
    """What a policy with these parameters is given, as the table has it for the default ones."""

def lacks(has: str, wants: str) -> str:
    """Why Context.set_policy(wants) is refused in a context that was made for `has`; '' where it is not."""

def parse_budget(text: str, name: str = "kv_budget") -> tuple[str, float]:
    """('none' | 'tokens' | 'ratio', value)."""

def score(spec: str, pos: I32, *, il: int = 0, n_layer: int = 1, n_head: int = ..., n_query: int = ..., head_dim: int = ...,
          attn: F32 | None = None, sums: F32 | None = None, keys: F32 | None = None, probed: F32 | None = None,
          q_mean: F32 | None = None, q_cov: F32 | None = None, v_norm: F32 | None = None, o_norm: F32 | None = None,
          attn_rows: F32 | None = None, value_rows: F32 | None = None, budget: int = 0) -> F32:
    """score() of a policy: pos [n_head_kv, n_kv], attn [n_head, n_kv], sums [n_head_kv, n_kv], keys [n_head_kv, n_kv, head_dim],
    probed, v_norm [n_head_kv, n_kv], o_norm [n_head, n_kv], q_mean [n_head, head_dim], q_cov [n_head, head_dim, head_dim],
    attn_rows [n_head, n_query, n_kv], value_rows [n_head_kv, n_kv, value_dim], budget: slots a head is to keep (0: all)
    -> [n_head_kv, n_kv]."""

def plan(spec: str, pos: Sequence[I32], score: Sequence[F32], budget: int, *, prompt: bool = True,
         n_frozen: Sequence[int] | None = None, spans: Sequence[tuple[int, int]] = (), room: bool = False,
         n_block: int = 1) -> list[I32]:
    """budgets() and keep() of a policy: pos, score a layer [n_head_kv, n_kv] -> slots kept a layer, I32 [n_head_kv, n_keep],
    -1 where a head keeps fewer. n_block: layers and heads differ by whole blocks of so many slots, 256 on a GPU."""

# -- units of a UTF-8 text, spans of bytes: pykvc/spans.py has them in characters --------------------------------------

def sentence_spans(text: bytes) -> list[tuple[int, int]]: ...
def separator_spans(text: bytes, separator: bytes) -> list[tuple[int, int]]: """ValueError: an empty separator"""

# -- llama.cpp ------------------------------------------------------------------------------------------------------

def system_info() -> str: ...
RPC_VERSION: int | None  # major version of llama.cpp's RPC; None: this build has none
def devices() -> list[tuple[str, str, str]]: """name, description, kind: CPU, GPU, IGPU, ACCEL"""
def device_memory() -> list[tuple[str, str, int, int]]:
    """name, kind, free and total bytes; of the CPU no measure of what is free"""
def pretend_lacking(ops: Sequence[str]) -> None: """Tests: no device runs these ops of ggml, if it is asked."""
def set_log(callback: Callable[[int, str], None] | None) -> None: """level (1 debug .. 4 error), text; None: silent."""
def next_context(policy: Any, budget: str = "", decode_budget: str = "", cells: str = "") -> None:
    """The policy of the next context this thread creates, by whatever program (see Context); None: what the environment
    says."""
def begin_call() -> None: """Forgets what failed before on this thread."""
def end_calls() -> None:
    """Before the interpreter ends: a call in another thread is a SystemExit after its llama_decode."""
def why_failed(what: str) -> str: """what, and why, as llama.cpp or the engine said since begin_call()."""

class Model:
    """A loaded GGUF. ValueError: not a GGUF, truncated, unknown architecture."""
    def __init__(self, path: str, *, n_gpu_layers: int = 0, use_mmap: bool = True, use_mlock: bool = False, vocab_only: bool = False,
                 main_gpu: int = -1, tensor_split: Sequence[float] = (), rpc_servers: Sequence[str] = ()) -> None:
        """main_gpu: the one device that is used; -1: layers are split over all, in the proportions of tensor_split, as
        much to each if that is empty. rpc_servers: host:port of each that holds layers, before GPUs; where none answers
        the process ends."""
    @property
    def desc(self) -> str: ...
    @property
    def arch(self) -> str: ...
    @property
    def meta(self) -> dict[str, str]: ...
    @property
    def size(self) -> int: """bytes of all tensors"""
    @property
    def n_params(self) -> int: ...
    @property
    def n_ctx_train(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def n_head_kv(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def bos(self) -> int: """-1: none"""
    @property
    def eos(self) -> int: ...
    @property
    def add_bos(self) -> bool: """tokenize() puts it in front, with add_special"""
    @property
    def chat_template(self) -> str | None: ...
    def tokenize(self, text: bytes, add_special: bool = True, parse_special: bool = False) -> list[int]: ...
    def detokenize(self, tokens: Sequence[int], remove_special: bool = False, unparse_special: bool = True) -> bytes: ...
    def piece(self, token: int, special: bool = False) -> bytes: ...
    def is_eog(self, token: int) -> bool: ...
    def apply_chat_template(self, messages: Sequence[tuple[str, str]], add_assistant: bool = True, template: str | None = None) -> str: ...

class Adapter:
    """A LoRA of a model, in a GGUF of its own. ValueError: it is none, or another model's."""
    def __init__(self, model: Model, path: str) -> None: ...
    @property
    def is_activated(self) -> bool: """by words of the prompt (aLoRA)"""

class Context:
    """A llama_context with its cache. `policy` is a spec string or an object with the Policy protocol (pykvc/policy.py).
    None: what LLAMA_ARG_KV_POLICY, _BUDGET and _DECODE_BUDGET say, with the prompt's end guessed, as in any llama.cpp program.
    budget, decode_budget: as parse_budget reads them, "" none. cells: "2048" of a sequence or "512MiB" of all, "" n_ctx.
    ValueError names what is valid."""
    def __init__(self, model: Model, *, n_ctx: int = 0, n_batch: int = 2048, n_ubatch: int = 512, n_seq_max: int = 1,
                 n_threads: int = 0, n_threads_batch: int = 0, type_k: str = "f16", type_v: str = "f16",
                 flash_attn: str = "auto", offload_kqv: bool = True, policy: Any = "full", budget: str = "",
                 decode_budget: str = "", cells: str = "") -> None: ...
    @staticmethod
    def borrow(address: int) -> Context:
        """A llama_context that another program of this process made, and frees: valid until then."""
    @property
    def model(self) -> Model: ...
    @property
    def n_ctx(self) -> int: """logical positions of one sequence"""
    @property
    def n_batch(self) -> int: ...
    @property
    def n_ubatch(self) -> int: ...
    @property
    def n_seq_max(self) -> int: ...
    @property
    def flash_attn(self) -> bool: ...
    @property
    def policy(self) -> str: """canonical spec"""
    @property
    def n_layer_kv(self) -> int: """layers that may evict"""

    def set_adapters(self, adapters: Sequence[Adapter], scales: Sequence[float]) -> None:
        """LoRAs of what is evaluated from now on, each times its scale."""
    def decode(self, tokens: I32, seq: int = 0, logits: str = "last") -> None:
        """Appends tokens to a sequence in calls of n_batch. logits: 'none' | 'last' | 'all'. GIL released; checks
        signals between calls."""
    def decode_batch(self, tokens: I32, seqs: I32) -> None:
        """One token for each of several sequences, one call; logits rows in that order."""
    def logits(self) -> F32: """[n_rows, n_vocab] of the last decode"""
    def pos_max(self, seq: int = 0) -> int: """last position, -1: empty"""
    def pos_floor(self, seq: int = 0) -> int: """first position a tail removal may start at"""
    def heard_from(self, pos: int, end: int, seq: int = 0) -> int: ...
    def remove_tail(self, pos: int, seq: int = 0) -> bool:
        """Removes [pos, end); False and unchanged below the floor."""
    def clear(self, seq: int = -1) -> None: ...
    def copy(self, src: int, dst: int) -> None: ...

    def check_budget(self, budget: str, decode_budget: str) -> None: """ValueError where set_budget() would refuse."""
    def check_policy(self, policy: str, budget: str, decode_budget: str = "") -> None:
        """ValueError where set_policy() would refuse."""
    def set_policy(self, policy: str, budget: str, decode_budget: str = "", seq: int = 0) -> None:
        """Another policy of one sequence ("": the context's own), until it is cleared: one that needs no more signals than the context's. ValueError: it does."""
    def set_budget(self, budget: str, decode_budget: str, seq: int = 0) -> None:
        """Of one sequence, until it is cleared."""
    def set_spans(self, spans: Sequence[tuple[int, int]], seq: int = 0) -> None:
        """original positions; ValueError where they overlap"""
    def begin_prompt(self, seq: int = 0) -> None: """Another prompt follows: what was generated belongs to it."""
    def end_prompt(self, seq: int = 0) -> None: """Tokens from here on are generated ones."""
    def evict(self, seq: int = 0, mask_only: bool = False) -> bool:
        """Prompt eviction now. False: nothing was over budget. mask_only (tests): the keep sets as a mask, nothing is
        freed."""
    def ask(self, tokens: I32, seq: int = 0, begin: int = 0, end: int = -1, n_repeated: int = 0) -> tuple[float, int]:
        """Evaluates a probe after the sequence, lets the policy see what it attends to of positions [begin, end), and takes it out.
        Of its last n_repeated tokens up to 64: (sum of their log-probabilities, how many)."""
    def has_room(self, n: int, seq: int = 0) -> bool: ...
    def n_until_eviction(self, seq: int = 0) -> int:
        """tokens of an answer that can be evaluated at once as if one by one, 1 or more"""
    def make_room(self, n: int, seq: int = 0) -> None: """With kv_cells: evicts if n more tokens do not fit."""
    def kept(self, seq: int = 0) -> list[I32]:
        """a layer [n_head_kv, n_kept], original positions ascending, -1 first where a head holds fewer"""
    def scores(self, seq: int = 0) -> list[F32]:
        """a layer [n_head_kv, n_kv], what the policy would rank by now; -inf where a head holds nothing"""
    def signals(self, seq: int = 0) -> list[dict[str, Any]]:
        """a layer: pos, attn, sums, keys, probed, n_query (those the policy needs)"""
    def stats(self) -> dict[str, Any]:
        """cells_used [n_seq_max], cells_allocated (a sequence), kept [n_layer_kv] (rows, those of the longest head; sequence 0),
        bytes_allocated (of them bytes_signals, bytes_past), bytes_used, bytes_full (what the evaluated tokens would take),
        n_evictions, n_evicted (cells of the mean layer), score_ms, plan_ms, compact_ms, prefill_ms, decode_ms."""
    def bytes_resident(self) -> int: """of bytes_allocated, in memory now; it looks at every page"""
    def n_evictions(self, seq: int = 0) -> int: """of the sequence since it was emptied"""
    def seq_stats(self, seq: int = 0) -> dict[str, Any]:
        """Of one sequence: n_tokens (evaluated), cells (in use), kept [n_layer_kv], bytes_used, bytes_full,
        n_evictions, n_evicted."""
    def save(self) -> bytes: """whole state, with what was kept"""
    def load(self, data: bytes) -> None: """ValueError: other model, policy or version; the context is then empty"""
    def save_seq(self, seq: int = 0) -> bytes: ...
    def load_seq(self, data: bytes, seq: int = 0) -> None: ...

def json_schema_to_grammar(schema: str) -> str: """GBNF of the JSON texts that a schema, itself JSON text, allows."""

class Sampler:
    """llama.cpp's chain: logit_bias, penalties, top_k, typical_p, top_p, min_p, temp, dist; temperature 0 is greedy.
    grammar: GBNF."""
    def __init__(self, model: Model, *, temperature: float = 0.0, top_k: int = 40, top_p: float = 0.95, min_p: float = 0.05, typical_p: float = 1.0,
                 repeat_penalty: float = 1.0, presence_penalty: float = 0.0, frequency_penalty: float = 0.0, seed: int = 0,
                 logit_bias: dict[int, float] = ..., grammar: str = "") -> None: ...
    def sample(self, ctx: Context, row: int = -1) -> int: """and accept"""
    def sample_row(self, logits: F32) -> int: """the same from logits [n_vocab] that were kept"""
