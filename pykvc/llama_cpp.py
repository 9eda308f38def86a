"""llama-cpp-python on this package's libllama: its Llama, with a cache that evicts.

    from pykvc.llama_cpp import Llama
    llm = Llama("model.gguf", n_ctx=8192, kv_policy="snapkv", kv_budget=512)
    llm.create_chat_completion([{"role": "user", "content": "..."}]); llm.kv_stats()

    CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install 'pykvc[llama-cpp-python]'     without a second libllama
"""
import functools
import importlib
import inspect
import os
import sys
import weakref
from importlib import metadata
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any, Callable, Generator, Iterable, Iterator, Sequence

from jinja2 import TemplateSyntaxError

from . import _core, chat, models, options, prompts, sampling, weights
from .policy import I32, Policy
from .turns import Steps, Turns

VERSION = "0.3.36"  # whose source our library is built from: its structs are the same
LIB = Path(_core.__file__).parent / "lib"


def _load() -> Any:
    """Their package on our library. ImportError: not installed, another version, or already loaded on another
    library."""
    how = f"CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install llama-cpp-python=={VERSION}"
    try:
        found = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        raise ImportError(f"pykvc.llama_cpp is llama-cpp-python on pykvc's library, and that is not installed: {how}") from None
    if found != VERSION:
        raise ImportError(f"pykvc's library is built from the source of llama-cpp-python {VERSION}, but {found} is installed: {how}")
    before, os.environ["LLAMA_CPP_LIB_PATH"] = os.environ.get("LLAMA_CPP_LIB_PATH"), str(LIB)
    try:
        theirs = importlib.import_module("llama_cpp")
    finally:
        del os.environ["LLAMA_CPP_LIB_PATH"]
        if before is not None:
            os.environ["LLAMA_CPP_LIB_PATH"] = before
    loaded = Path(theirs.llama_cpp._lib._name)
    if not loaded.parent.samefile(LIB):
        raise ImportError(f"llama_cpp was imported before, on {loaded}: import pykvc.llama_cpp first, or set LLAMA_CPP_LIB_PATH={LIB}")
    return theirs


class _NoImages(MetaPathFinder):
    """libmtmd of another build would be given our contexts, and crash."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in ("llama_cpp.mtmd_cpp", "llama_cpp.llava_cpp"):
            raise ImportError("images and audio need llama.cpp's libmtmd, which pykvc does not build")


theirs = _load()
sys.meta_path.insert(0, _NoImages())


def __getattr__(name: str) -> Any:
    """LlamaGrammar, LlamaDiskCache, llama_log_set ...: what is not ours is theirs."""
    try:
        return getattr(theirs, name)
    except AttributeError:
        raise AttributeError(f"neither pykvc.llama_cpp nor llama_cpp has {name!r}") from None


class _Cache:
    """The sequence of a Llama, between it and what was evicted."""

    def __init__(self, ctx: "_core.Context", evicts: bool, spans: bool) -> None:
        self.ctx, self.evicts, self.needs_spans = ctx, evicts, spans
        self.phase = "prompt"   # being evaluated, then "sampled": the first token of the answer, then "answer"
        self.n_seen = 0         # tokens the last eviction saw: a text that branches before would have evicted something else
        self.n_evictions = 0
        self.spans: list[tuple[int, int]] = []

    def remove_tail(self, seq: int, begin: int, end: int) -> bool:
        """In the place of LlamaContext.kv_cache_seq_rm, which Llama calls before it evaluates. False: it then begins
        anew."""
        if 0 < begin < self.n_seen:
            return False
        removed = self.ctx.remove_tail(max(begin, 0)) if end < 0 else False
        if removed and begin <= 0:
            self.n_seen = self.n_evictions = 0
        if removed and self.spans:
            self.ctx.set_spans(self.spans)
        return removed

    def begin(self, tokens: Sequence[int], n_before: int, before: Sequence[int]) -> None:
        """Tokens are to be evaluated after n_before. Those after a sampled one are an answer: what came before is
        evicted now."""
        if self.phase == "prompt":
            self.ctx.begin_prompt()
            if self.needs_spans and tokens:
                self.spans = prompts.encode(self.ctx.model, True, None, [*before, *tokens], None, "tokens", None, first=True)[1]
        elif self.phase == "sampled":
            if self.ctx.evict():
                self.n_seen = n_before
            self.ctx.end_prompt()
            self.n_evictions, self.phase = self.ctx.n_evictions(), "answer"

    def end(self, n_tokens: int) -> None:
        """n_tokens are evaluated; evictions while that was done came before the last of them."""
        n, self.n_evictions = self.n_evictions, self.ctx.n_evictions()
        if self.n_evictions != n:
            self.n_seen = n_tokens - 1


class _Format:
    """In the place of their Jinja2ChatFormatter: the prompts, and the one BOS, of pykvc.LLM and llama-server.

    name: of one of the model's templates; "default" gives way to "tool_use" where there are tools."""

    def __init__(self, llama: "Llama", name: str) -> None:
        self.llama, self.name = weakref.proxy(llama), name

    def __call__(self, *, messages: Sequence[chat.Message], tools: Sequence[chat.Tool] | None = None,
                 functions: Any = None, function_call: Any = None, tool_choice: Any = None, **variables: Any) -> Any:
        model = self.llama._opened.model
        template = chat.template_of(model, tools) if self.name == "default" else chat.templates(model)[self.name]
        theirs_too = {"functions": functions, "function_call": function_call, "tool_choice": tool_choice}
        text = chat.prompt(model, messages, template, tools=tools, variables={**theirs_too, **variables})
        eos, eos_text = model.eos, chat.token_text(model, model.eos)
        return theirs.llama_chat_format.ChatFormatterResponse(
            prompt=text, stop=[eos_text] if eos_text else None, added_special=False,
            stopping_criteria=theirs.StoppingCriteriaList([lambda tokens, logits: tokens[-1] == eos]))


_Theirs: Any = theirs.Llama
_KNOWN = inspect.signature(_Theirs.__init__).parameters.keys() - {"self", "kwargs"}


class Llama(_Theirs):
    """llama_cpp.Llama with kv_policy, kv_budget, kv_decode_budget and kv_cells as pykvc.LLM takes them; everything else is
    theirs (n_ctx 512 and flash_attn False by default). Every prompt is evicted to kv_budget when its first token was sampled.

    A prompt that extends what was evaluated goes on from it. One that branches before the last eviction is evaluated from
    its beginning, and so is the same prompt again: the answer is that of a new Llama. ValueError names what is valid.

    Threads may share it: their calls queue, and a call that evaluates something ends the streams of before (RuntimeError)."""

    _requires_eval: bool  # theirs
    n_tokens: int

    def __init__(self, model_path: str, *, kv_policy: str | Policy | None = None, kv_budget: int | float | str | None = None,
                 kv_decode_budget: int | float | str | None = None, kv_cells: int | str | None = None, **kwargs: Any) -> None:
        self._turns, self._closed, self._n_rows = Turns(), False, 0
        budget, decode_budget = options.budget("kv_budget", kv_budget), options.budget("kv_decode_budget", kv_decode_budget)
        cells = options.cells(kv_cells)
        policy = options.policy(kv_policy, budget, decode_budget, cells)
        needs, evicts = options.needs(policy), policy != "full"
        if needs["probe"] != "none":
            raise ValueError(f"{kv_policy} evaluates questions of its own, which only pykvc.LLM asks: choose another policy")
        if evicts and kwargs.get("draft_model") is not None and (decode_budget or cells or needs["sums"]):
            raise ValueError("draft_model: drafts that are refused are taken out of the cache again, which kv_decode_budget, kv_cells and "
                             "h2o do not allow")
        _check_names(kwargs)
        _check_numbers(kwargs)
        if kwargs.get("lora_path") is not None:
            kwargs["lora_path"] = _lora(kwargs["lora_path"], policy, needs)
        self._kv_given = dict(kv_policy=kv_policy, kv_budget=kv_budget, kv_decode_budget=kv_decode_budget, kv_cells=kv_cells)
        _core.set_log(_log)  # LLM may have set its own
        _core.begin_call()
        _core.next_context(policy, budget, decode_budget, cells)
        try:
            super().__init__(model_path, **kwargs)
        except (ValueError, MemoryError) as error:
            raise ValueError(_core.why_failed(str(error))) from None
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template of {model_path} is not Jinja: {error.message} "
                             f"(line {error.lineno})") from None
        finally:
            _core.next_context(None)  # if there was none
        if kwargs.get("lora_path") and not self._lora_adapter:  # theirs goes on without, and crashes later
            super().close()
            raise ValueError(_core.why_failed(f"{kwargs['lora_path']} is not a LoRA of this model"))
        self._kv = _Cache(_core.Context.borrow(self._ctx.ctx), evicts, needs["spans"])
        if evicts:
            self._ctx.kv_cache_seq_rm = self._kv.remove_tail
        self._model.detokenize = _checked(self._model.detokenize, self._opened.model)
        self._use_templates(kwargs)

    def _use_templates(self, kwargs: dict[str, Any]) -> None:
        """Theirs guesses a format of its own for four well-known templates, and writes other prompts than these do."""
        handler = theirs.llama_chat_format.chat_formatter_to_chat_completion_handler
        for name in chat.templates(self._opened.model):
            self._chat_handlers[f"chat_template.{name}"] = handler(_Format(self, name))
        chosen = kwargs.get("chat_format") is not None or self.chat_handler is not None
        if not chosen and "chat_template.default" in self._chat_handlers:
            self.chat_format = "chat_template.default"

    def kv_stats(self) -> dict[str, Any]:
        """As pykvc.LLM.stats(), but for prefill_ms and decode_ms."""
        stats = self._opened.stats()
        cells = int(stats["cells_used"][0])
        return {"n_tokens": self._opened.pos_max() + 1, "cells": cells, "bytes_resident": self._opened.bytes_resident(),
                **{key: value for key, value in stats.items() if key not in ("prefill_ms", "decode_ms")}}

    def kept(self) -> list[I32]:
        """Per layer that evicts [n_head_kv, n_kept]: original positions of what the cache holds, ascending, -1 first where a head
        holds fewer (adakv)."""
        return self._opened.kept()

    @property
    def _opened(self) -> "_core.Context":
        return self._kv.ctx

    # -- theirs, with evictions in between ------------------------------------------------------------------------------

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Iterator[int]:
        self._kv.phase = "prompt"
        yield from super().generate(tokens, *args, **kwargs)

    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        if self._requires_eval:
            raise ValueError("there are no logits to sample from: eval() something first")
        n_back = 1 if idx is None else self.n_tokens - idx
        if not 0 < n_back <= self._n_rows:
            raise ValueError(f"sample(idx={idx}): there are logits of the last {self._n_rows} tokens that were evaluated"
                             f"{'' if self._logits_all else ', of more with logits_all=True'}")
        if self._kv.phase == "prompt":
            self._kv.phase = "sampled"
        return super().sample(*args, idx=idx, **kwargs)

    def _init_sampler(self, *args: Any, grammar: Any = None, **kwargs: Any) -> Any:
        if grammar is not None:
            text = getattr(grammar, "_grammar", None)
            if not isinstance(text, str):
                raise ValueError(f"grammar is a LlamaGrammar, not {grammar!r}")
            sampling.Sampler(self._opened.model, sampling.SamplingParams(grammar=text), 0)  # at mistakes theirs crashes
        return super()._init_sampler(*args, grammar=grammar, **kwargs)

    def embed(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        texts = [input] if isinstance(input, str) else list(input) if isinstance(input, Iterable) else []
        if not texts or not all(isinstance(text, str) and self.tokenize(text.encode()) for text in texts):
            raise ValueError(f"embed() takes a text, or a list of them, none of them empty, not {input!r}")
        return super().embed(input if isinstance(input, str) else texts, *args, **kwargs)

    def reset(self) -> None:
        self._kv.phase = "prompt"
        super().reset()

    def eval(self, tokens: Sequence[int]) -> None:
        if not self._kv.evicts:
            self._count_rows(len(tokens))
            self._requires_eval = self._requires_eval or len(tokens) > 0  # until it has
            super().eval(tokens)
            return
        _core.begin_call()
        if len(tokens) > 1 and self.draft_model is None:
            self._kv.phase = "prompt"
        if not self._kv.remove_tail(0, self.n_tokens, -1):
            raise ValueError(f"the cache was compressed: it goes on from {self._kv.n_seen} tokens or more, or from 0, not from {self.n_tokens}")
        tokens = [*self._unheard(len(tokens)), *tokens]
        self._count_rows(len(tokens))
        self._kv.begin(tokens, self.n_tokens, self._input_ids.tolist())
        try:
            super().eval(tokens)
        except RuntimeError as error:
            self.reset()  # of what was evaluated a part is there; the next call begins anew
            raise RuntimeError(_core.why_failed(str(error))) from None
        self._kv.end(self.n_tokens)

    def _count_rows(self, n: int) -> None:
        if n > 0:  # of what theirs evaluates at once
            self._n_rows = (n - 1) % self.n_batch + 1 if self._logits_all else 1

    def _unheard(self, n_new: int) -> list[int]:
        """Of a prompt that goes on with n_new tokens what it is scored by, where an answer has taken the place of these
        queries: it is taken out of the cache, to be evaluated again."""
        n: int = self.n_tokens
        first = self._opened.heard_from(n, n + n_new) if self._kv.phase == "prompt" and n_new > 0 else n
        if first < n and self._kv.remove_tail(0, first, -1):
            self.n_tokens = first
        return [int(token) for token in self.input_ids[self.n_tokens:n]]

    @classmethod
    def from_pretrained(cls, repo_id: str, filename: str, additional_files: Sequence[str] | None = None, local_dir: str | os.PathLike | None = None,
                        local_dir_use_symlinks: bool | str = "auto", cache_dir: str | os.PathLike | None = None, **kwargs: Any) -> "Llama":
        """A file of a Hugging Face repository, by its name or a pattern that fits one file alone; additional_files: further parts of it.

        Theirs, of 0.3.36, passes local_dir_use_symlinks on to huggingface_hub, which does not take it since 1.0; here it has no effect."""
        paths = [models.hub_file(repo_id, pattern, local_dir, cache_dir) for pattern in (filename, *(additional_files or ()))]
        return cls(str(paths[0]), **kwargs)

    def save_state(self) -> Any:
        state = super().save_state()
        state.kv = self._kv.phase, self._kv.n_seen
        return state

    def load_state(self, state: Any) -> None:
        _core.begin_call()
        try:
            super().load_state(state)
        except RuntimeError as error:
            self._ctx.kv_cache_clear()
            self.reset()
            raise RuntimeError(_core.why_failed(str(error))) from None
        self._kv.phase, self._kv.n_seen = getattr(state, "kv", ("prompt", state.n_tokens))
        self._kv.n_evictions = self._opened.n_evictions() if self._kv.evicts else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **self._kv_given}

    def close(self) -> None:
        """Frees the model, when the calls of other threads have ended; every later call is a ValueError."""
        if not hasattr(self, "_stack") or self._turns.lost:  # it was never opened, or is not ours to free
            return
        with self._turns:
            self._turns.next()
            self._closed = True
            super().close()


# Calls that change what the cache holds end the streams of before; the others only wait for their turn.
_ENDING = ("__call__", "create_completion", "create_chat_completion", "create_chat_completion_openai_v1", "create_embedding",
           "embed", "generate", "eval", "reset", "load_state")
_WAITING = ("sample", "save_state", "tokenize", "detokenize", "tokenizer", "n_ctx", "n_embd", "n_vocab", "token_eos",
            "token_bos", "token_nl", "pooling_type", "kv_stats", "kept")


def _in_turn(call: Callable[..., Any], ends: bool) -> Callable[..., Any]:
    @functools.wraps(call)
    def alone(self: Llama, *args: Any, **kwargs: Any) -> Any:
        with self._turns as outermost:
            if self._closed:
                raise ValueError("this Llama was closed")
            number = self._turns.next() if ends and outermost else self._turns.number
            result = call(self, *args, **kwargs)
        return Steps(self._turns, number, result) if outermost and isinstance(result, Generator) else result
    return alone


for _name in (*_ENDING, *_WAITING):
    setattr(Llama, _name, _in_turn(getattr(Llama, _name), ends=_name in _ENDING))


_CACHE_TYPES = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 30: "bf16"}  # ggml_type


def _check_names(given: dict[str, Any]) -> None:
    """Theirs passes over a name that it does not know."""
    if "compression_ratio" in given:
        raise ValueError("compression_ratio is kvpress': here kv_budget is the share that stays, 1 - compression_ratio")
    valid = {*_KNOWN, "kv_policy", "kv_budget", "kv_decode_budget", "kv_cells"}
    for name in sorted(given.keys() - valid):
        raise ValueError(f"Llama takes no argument {name!r}{options.nearest(name, valid)}")


def _lora(path: Any, policy: str | Policy, needs: dict[str, Any]) -> str:
    if not isinstance(path, (str, os.PathLike)) or not os.path.isfile(path):
        raise ValueError(f"lora_path: there is no file {path}")
    if needs["outputs"]:
        weights.refuse_outputs(policy)
    return os.fspath(path)


def _check_numbers(given: dict[str, Any]) -> None:
    """Those that theirs hands on to C as they are, where others become large, or end the process."""
    for name, low, high in (("n_ctx", 0, options.N_CTX_MAX), ("n_batch", 1, 2**31 - 1), ("n_ubatch", 0, 2**31 - 1),
                            ("n_threads", -1, 512), ("n_threads_batch", -1, 512)):
        if given.get(name) is not None:
            options.whole(name, given[name], low, high)
    for name in ("type_k", "type_v"):
        if given.get(name) is not None and given[name] not in _CACHE_TYPES:
            known = ", ".join(f"{number} ({kind})" for number, kind in _CACHE_TYPES.items())
            raise ValueError(f"{name} is one of {known}, not {given[name]!r}")


def _checked(detokenize: Callable[..., bytes], model: "_core.Model") -> Callable[..., bytes]:
    """At a token that is none llama.cpp ends the process."""
    n_vocab = model.n_vocab

    def checked(tokens: Sequence[int], *args: Any, **kwargs: Any) -> bytes:
        if len(tokens) > 0 and not 0 <= min(tokens) <= max(tokens) < n_vocab:
            prompts.check_ids(model, tokens)  # says which
        return detokenize(tokens, *args, **kwargs)
    return checked


def _log(level: int, text: str) -> None:
    theirs._logger.llama_log_callback(level, text.encode(), None)  # prints what their verbose= lets through


_core.set_log(_log)
