"""A GGUF model with a KV cache that evicts.

    llm = pykvc.LLM(kv_policy="shotkv", kv_budget=0.25)
    llm.generate(shots=examples, question="Q: 17 + 25?\\nA:", max_tokens=32).text

Two protocols. Question-in: generate(prompt) evaluates everything, then evicts. Question-out: the eviction does not
see the question, and the compressed context can be asked again and again:

    llm.prefill(context); llm.compress(); llm.generate(question, reset=False)

One LLM is one conversation (sequence 0); generate_batch() uses all n_seq_max sequences. Threads may share it: their calls
queue, and a call that changes what the cache holds ends the streams of before (pykvc/turns.py).
"""
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Literal, Sequence, overload

from . import _core, arguments, batch_request, chat, memory, models, options, prompts as prompts_of, sampling, spans as units, state, weights
from .batch import answers
from .chat import Message, Tool
from .context import Context
from .conversation import Conversation
from .generation import Generation, Request, Stream, answer
from .history import Chat
from .messages import message_spans
from .pipeline import pipeline
from .policy import F32, I32, Policy
from .sampling import Sampler, SamplingParams
from .session import Session
from .text import check_stop
from .turns import Steps, Turns, queued

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LLM:
    """model: a .gguf file, a name, user/repo[:quant], or None for the default model, fetched on the first use.

    kv_policy: "name:key=value,..." (`pykvc policies` lists them), or a pykvc.Policy: an instance, or "module:Class:key=value,...".
        None: "full", or with a budget the recommended one, which is told on stderr.
    kv_budget, kv_decode_budget: cells a layer keeps of the prompt and of the generated tokens: an int is tokens, a
    float in (0, 1] the retained ratio (of generated tokens: of the answer so far, which is little at its beginning), a
    string either ("512", "25%"). n_ctx 0: the model's own, at most 8192.

    kv_cells: fewer cells than n_ctx has tokens, for a sequence (an int, rounded up to 256), or bytes for all of them
    ("512MiB"): a prompt that is longer is evaluated n_ubatch tokens at a time, and evicted before each; an answer goes
    on until n_ctx. kv_budget is then at most kv_cells - n_ubatch, and that if not given. "auto": bytes, nine tenths of what is free.

    n_gpu_layers: how many lie on the GPU, -1: all; main_gpu: all on that one, or tensor_split: proportions, one for each GPU, e.g. [3, 1].
    rpc_servers: "host:port,host:port", where llama.cpp's ggml-rpc-server runs: they hold layers as GPUs do, and come
    first.
    offload_kqv=False: their cache stays on the CPU. lora: a GGUF, or a list of them or of (path, scale).
    chat_template: Jinja, instead of what the model brings, for chat() and apply_chat_template().
    ValueError names what is valid."""

    def __init__(self, model: str | os.PathLike | None = None, *, n_ctx: int = 0, n_batch: int = 512, n_ubatch: int = 512,
                 n_threads: int | None = None, n_threads_batch: int | None = None, n_gpu_layers: int = 0, main_gpu: int | None = None,
                 tensor_split: Sequence[float] | None = None, rpc_servers: str | Sequence[str] | None = None,
                 offload_kqv: bool = True, use_mmap: bool = True, use_mlock: bool = False,
                 type_k: str = "f16", type_v: str = "f16", flash_attn: bool | str = "auto", n_seq_max: int = 1, seed: int = 0,
                 lora: str | os.PathLike | Sequence[Any] | None = None, kv_policy: str | Policy | None = None,
                 kv_budget: int | float | str | None = None, kv_decode_budget: int | float | str | None = None,
                 kv_cells: int | str | None = None, chat_template: str | None = None, verbose: bool = False) -> None:
        budget = options.budget("kv_budget", kv_budget)
        decode_budget = options.budget("kv_decode_budget", kv_decode_budget)
        cells = options.cells(kv_cells)
        policy = options.policy(kv_policy, budget, decode_budget, cells)
        context: dict[str, Any] = dict(
            n_batch=options.whole("n_batch", n_batch, 1), n_ubatch=options.whole("n_ubatch", n_ubatch, 1),
            n_seq_max=options.whole("n_seq_max", n_seq_max, 1, 256),
            n_threads=0 if n_threads is None else options.whole("n_threads", n_threads, 1, 512),
            n_threads_batch=0 if n_threads_batch is None else options.whole("n_threads_batch", n_threads_batch, 1, 512),
            type_k=options.cache_type("type_k", type_k), type_v=options.cache_type("type_v", type_v), offload_kqv=bool(offload_kqv),
            flash_attn=options.flash_attn(flash_attn), policy=policy, budget=budget, decode_budget=decode_budget)
        n_ctx = options.whole("n_ctx", n_ctx, 0, options.N_CTX_MAX)
        adapters = options.lora(lora)
        where = options.devices(n_gpu_layers, main_gpu, tensor_split, rpc_servers)
        options.checked_seed(seed)
        self.seed = seed  # -1: of each answer another
        self.chat_template = chat_template

        _core.set_log(_log if verbose else None)
        self._turns = Turns()
        self.path = models.resolve(model)
        loaded = weights.load(self.path, use_mmap=bool(use_mmap), use_mlock=bool(use_mlock), **where)
        n_bytes = memory.for_cache(loaded, where, offload_kqv) if cells == "auto" else 0
        ctx = _core.Context(loaded, n_ctx=n_ctx or min(loaded.n_ctx_train, 8192), cells=f"{n_bytes//2**20}MiB" if n_bytes else cells, **context)
        if n_ctx > loaded.n_ctx_train > 0:
            print(f"n_ctx {n_ctx}: this model was trained for {loaded.n_ctx_train} tokens, and what it writes beyond them "
                  "may be gibberish", file=sys.stderr)
        needs = options.needs(policy)
        if adapters:
            weights.adapt(ctx, adapters, needs["outputs"])
        setup = {"arch": loaded.arch, "model": loaded.desc, "weights": state.fingerprint(self.path), "n_params": loaded.n_params, "n_vocab": loaded.n_vocab,
                 "kv_policy": ctx.policy, "kv_budget": budget, "kv_decode_budget": decode_budget, "kv_cells": cells, "n_ctx": ctx.n_ctx,
                 "type_k": type_k, "type_v": type_v, "flash_attn": ctx.flash_attn, "n_seq_max": n_seq_max,
                 "lora": [[state.fingerprint(Path(path)), scale] for path, scale in adapters] or None}
        self._opened: Session | None = Session(loaded, ctx, setup, policy != "full", needs["spans"], needs["probe"],
                                              options.parameter(ctx.policy, "window"), options.parameter(ctx.policy, "chunk"), self._turns)

    # -- text -------------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids. add_special: with BOS where the model wants it; parse_special: "<|im_start|>" is one token."""
        return prompts_of.tokenize(self._session.model, text, add_special, parse_special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The tokens' text, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        return self._session.model.detokenize(prompts_of.check_ids(self._session.model, tokens)).decode("utf-8", "replace")

    def apply_chat_template(self, messages: Sequence[Message], add_assistant: bool = True,
                            tools: Sequence[Tool] | None = None, enable_thinking: bool | None = None,
                            **variables: Any) -> str:
        """The prompt of a chat, as the model's own Jinja template writes it and transformers renders it.

        messages: dicts of role, content and what else the template reads. tools: schemas of functions.
        enable_thinking None: what the template does by itself. variables: further ones that the template reads.
        BOS is left to tokenize(), where that puts it first.
        ValueError: the model has no template, or the template refuses these messages."""
        return chat.prompt(self._session.model, messages, self.chat_template, tools=tools,
                           enable_thinking=enable_thinking, add_generation_prompt=add_assistant, variables=variables)

    # -- the cache --------------------------------------------------------------------------------------------------

    @queued
    def prefill(self, text: str | None = None, *, tokens: Sequence[int] | None = None, spans: Sequence[units.Span] | None = None,
                span_unit: str = "tokens", segment: str | None = None, kv_query: str | None = None) -> int:
        """Appends text or tokens to the cache, evicts nothing (but for kv_cells), and returns how many tokens that were.
        Spans, kv_query: as generate()."""
        ids, found = prompts_of.encode(self._session.model, self._session.needs_spans, text, tokens, spans, span_unit, segment, first=self.n_tokens == 0)
        self._session.check_room(len(ids), self.n_tokens, spare=0)
        query = prompts_of.query(self._session, kv_query)
        if self._session.setup["kv_cells"]:
            self._session.probe.check_asked(query or self._session.query)
        self._session.begin_turn()
        self._session.query = query or self._session.query
        self._session.feed(ids, found)
        return len(ids)

    @queued
    def evaluate(self, tokens: Sequence[int], *, generated: bool = False) -> F32:
        """Appends tokens as prefill() does and returns the logits after each of them: [len(tokens), n_vocab]. generated=True: they are
        an answer's, as if generate() had sampled them, so that kv_decode_budget evicts them (teacher forcing)."""
        ids = prompts_of.check_ids(self._session.model, tokens)
        if generated and not self.n_tokens:
            raise ValueError("there is no prompt that these tokens could answer: prefill() one first")
        self._session.check_room(len(ids), self.n_tokens, spare=0)
        self._session.begin_turn()
        return self._session.evaluate(ids, generated)

    @queued
    def compress(self, kv_query: str | None = None, *, kv_budget: int | float | str | None = None,
                 kv_decode_budget: int | float | str | None = None, budget: int | float | str | None = None) -> bool:
        """Evicts down to kv_budget, now. False: nothing was over it. ValueError if no kv_budget was given. kv_query and
        budgets: as generate(); budget is kv_budget. Another policy: LLM.context()."""
        if self._session.probe.kind != "mean" and str(kv_query).partition(":")[0] in options.names():
            raise ValueError("compress() evicts by the LLM's own policy: "
                             f"llm.context(text).compress({kv_query!r}) evicts by another")
        kv_budget = options.one_of("kv_budget", kv_budget, "budget", budget)
        (own,) = options.budgets(kv_budget, kv_decode_budget, 1, self._session)
        if not (own and own[0]):
            self._session.check_compress()
        self._session.settle()
        query = prompts_of.query(self._session, kv_query) or self._session.query
        self._session.probe.check_asked(query)
        self._session.query = query
        if own:
            self._session.set_budget(*own)
        evicted = self._session.compress()
        self._session.by_hand = True
        return evicted

    @queued
    def context(self, text: str | None = None, *, tokens: Sequence[int] | None = None, spans: Sequence[units.Span] | None = None,
                span_unit: str = "tokens", segment: str | None = None, kv_query: str | None = None) -> Context:
        """Evaluates a context that is to be asked several times, compressed by several policies and budgets: pykvc/context.py.
        The conversation before is over. Arguments as prefill()."""
        self.reset()
        return Context(self, self.prefill(text, tokens=tokens, spans=spans, span_unit=span_unit, segment=segment, kv_query=kv_query))

    @queued
    def reset(self) -> None:
        """Empties the cache."""
        self._session.begin_turn()
        self._session.clear()

    @queued
    def truncate(self, n_tokens: int) -> None:
        """Removes the tail, so that n_tokens remain. After an eviction there is a floor: ValueError names it."""
        n_tokens = options.whole("n_tokens", n_tokens, 0, self.n_tokens)
        self._session.begin_turn()
        self._session.truncate(n_tokens)

    @queued
    def save(self, path: str | os.PathLike) -> None:
        """Writes what the cache holds to a file (pykvc/state.py), at once or not at all."""
        state.write(path, self._session.state())

    @queued
    def load(self, path: str | os.PathLike) -> None:
        """Goes on where save() was called. ValueError says what differs or is damaged; the cache is then as it was,
        or empty if only llama.cpp found out."""
        data = state.read(path)
        self._session.begin_turn()
        self._session.load(data, path)

    @queued
    def save_state(self) -> bytes:
        """What save() writes to a file, in memory."""
        return b"".join(self._session.state())

    @queued
    def load_state(self, data: bytes) -> None:
        """Goes on where save_state() was called, in this LLM or another of the same set-up. ValueError as load()."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise ValueError(f"a state is the bytes of save_state(), not {data!r}; load() reads a file")
        self._session.begin_turn()
        self._session.load(bytes(data), "given to load_state()")

    # -- answers ----------------------------------------------------------------------------------------------------

    @overload
    def generate(self, prompt: str | None = ..., *, stream: Literal[False] = ..., **how: "Unpack[arguments.Prompt]") -> Generation: ...
    @overload
    def generate(self, prompt: str | None = ..., *, stream: Literal[True], **how: "Unpack[arguments.Prompt]") -> Stream: ...
    @overload
    def generate(self, prompt: str | None = ..., *, stream: bool, **how: "Unpack[arguments.Prompt]") -> Generation | Stream: ...

    @queued
    def generate(self, prompt: str | None = None, **how: Any) -> Generation | Stream:
        """Evaluates a prompt and goes on from it: a Generation, or with stream=True a Stream of its text.

        The prompt: a string, `tokens`, or `shots` + `question`, where each shot is a span. None with reset=False goes
        on from what the cache holds. max_tokens, temperature, stop, grammar and the other fields of pykvc.SamplingParams go by name, or
        together as sampling_params, which a name beside them overrules.

        spans: (begin, end) of the prompt, in `span_unit` "tokens" (the default) or "chars"; or segment= "sentence", a separator,
        "sep:...", "re:...". Policies that do not work on spans pass them over; those that do take sentences if there
        are none. kv_query: the text that a policy which asks (finch) evaluates after each chunk and takes out again; without
        one, `question`, and ValueError without both. kv_budget, kv_decode_budget: instead of the LLM's own. All three
        stay until the next reset or load().
        reset=False appends to the cache. compress: evict down to kv_budget when the prompt was evaluated and its first token
        sampled; None: at every prompt, unless compress() was called since the last reset (question-out).

        ValueError for every mistake, before anything is evaluated. Ctrl-C leaves the LLM usable."""
        return self._generate(None, prompt, **how)

    def _generate(self, rendered: Chat | None, prompt: str | None = None, /, *, shots: Sequence[str] | None = None,
                  question: str | None = None, tokens: Sequence[int] | None = None, spans: Sequence[units.Span] | None = None, span_unit: str = "tokens",
                  segment: str | None = None, kv_query: str | None = None, kv_budget: int | float | str | None = None,
                  kv_decode_budget: int | float | str | None = None, stream: bool = False, reset: bool = True, compress: bool | None = None,
                  echo: bool = False, sampling_params: SamplingParams | None = None, **own: Any) -> Generation | Stream:
        """generate(). rendered: the chat that the prompt is, to go on from what the cache holds of it. own: fields of
        SamplingParams."""
        how = sampling.of_call(sampling_params, own)
        if shots is not None or question is not None:
            if any(given is not None for given in (prompt, tokens, spans, segment)):
                raise ValueError("shots and question are the prompt and its spans: give no prompt, tokens, spans or segment beside them")
            prompt, spans = prompts_of.join(shots, question)
            span_unit = "chars"
        session = self._session
        query = prompts_of.query(session, kv_query or (question if session.probe.kind == "mean" else None))
        n_before = 0 if reset else session.n_tokens
        goes_on = prompt is None and tokens is None and n_before > 0
        if goes_on and session.pending is None and not session.can_sample:
            raise ValueError("there is nothing to go on from since the cache was truncated: give a prompt")
        ids, found = ([], []) if goes_on else prompts_of.encode(
            session.model, session.needs_spans, prompt, tokens, spans, span_unit, segment, first=n_before == 0)
        session.check_room(len(ids), n_before, spare=1 if how.max_tokens else 0)
        (budget,) = options.budgets(kv_budget, kv_decode_budget, 1, session)
        if compress and not (budget and budget[0]):
            session.check_compress()
        if session.will_evict(compress, bool(budget and budget[0]), by_hand=session.by_hand and not reset):
            session.probe.check_asked(query or (not reset and session.query))
        echoed = "" if not echo else prompt if prompt is not None else self.detokenize(ids)
        request = Request(ids, found, reset, compress, how.max_tokens, check_stop(how.stop), Sampler(session.model, how, self.seed),
                          echoed, query, budget, rendered)
        pieces = Stream(Steps(self._turns, session.begin_turn(), answer(session, request)))
        if stream:
            return pieces
        for _ in pieces:
            pass
        return pieces.result

    @overload
    def generate_batch(self, prompts: Sequence[str | Sequence[int]], *, stream: Literal[False] = ..., **how: "Unpack[arguments.Batch]") -> list[Generation]: ...
    @overload
    def generate_batch(self, prompts: Sequence[str | Sequence[int]], *, stream: Literal[True], **how: "Unpack[arguments.Batch]") -> Iterator[tuple[int, Generation]]: ...
    @overload
    def generate_batch(self, prompts: Sequence[str | Sequence[int]], *, stream: bool, **how: "Unpack[arguments.Batch]") -> list[Generation] | Iterator[tuple[int, Generation]]: ...

    @queued
    def generate_batch(self, prompts: Sequence[str | Sequence[int]], *, stream: bool = False,
                       **how: Any) -> list[Generation] | Iterator[tuple[int, Generation]]:
        """Answers many prompts, n_seq_max of them at a time: their Generations in order, or with stream=True
        (index, Generation) as they are done. prompts: strings or token ids. The conversation before is over.

        prefix, or shots (each of them a span): what all prompts begin with, evaluated once, and compressed once for each budget; or a list of
        one for each prompt, evaluated once where neighbours have the same. spans (for a list of prefixes a list of them), span_unit, segment and
        kv_query: of the prefix; without one, of the prompts: a list of spans for each (None: as generate() without), or `segment` for all.
        compress_prefix=False: prefixes stay whole, and each prompt is compressed together with its own (question-in).
        kv_budget, kv_decode_budget: of every prompt and its prefix, or a list of one for each; None: the LLM's own.
        compress None: every prompt where there is no compressed prefix, else only the prefix (question-out).
        A Generation's kv has prefix_kept [n_layer] and prefix_evictions, too.
        sampling_params, or by name: as generate(), of every prompt, or a list of one for each.
        ValueError for every mistake, before anything is evaluated."""
        session = self._session
        asked = batch_request.read(session, prompts, self.seed, **how)
        done = Steps(self._turns, session.begin_turn(), answers(session, *asked), "batch")
        if stream:
            return done
        return [generation for _, generation in sorted(done, key=lambda pair: pair[0])]

    @overload
    def chat(self, messages: Sequence[Message], *, stream: Literal[False] = ..., **how: "Unpack[arguments.Chat]") -> Generation: ...
    @overload
    def chat(self, messages: Sequence[Message], *, stream: Literal[True], **how: "Unpack[arguments.Chat]") -> Stream: ...
    @overload
    def chat(self, messages: Sequence[Message], *, stream: bool, **how: "Unpack[arguments.Chat]") -> Generation | Stream: ...

    @queued
    def chat(self, messages: Sequence[Message], *, tools: Sequence[Tool] | None = None,
             enable_thinking: bool | None = None, chat_template_kwargs: dict[str, Any] | None = None,
             reset: bool | None = None, **how: Any) -> Generation | Stream:
        """generate() on a chat. Each message is a span (pykvc/messages.py). kv_query None: the last message's end.

        In no span, so always kept: system messages, what the template puts before the first message, the last message.
        tools, enable_thinking: as apply_chat_template(); chat_template_kwargs: its variables.
        reset None: goes on from what the cache holds of this chat, and evaluates only the rest (pykvc/history.py); a
        Generation's kv has `reused`, the tokens that were there, and `anew`, why an evicted cache was of no use.
        reset=True evaluates everything."""
        session = self._session
        template = chat.template_of(session.model, tools) if self.chat_template is None else self.chat_template
        messages = chat.as_text(messages, template)
        if session.probe.kind == "mean" and not how.get("kv_query") and isinstance(messages[-1].get("content"), str):
            how["kv_query"] = prompts_of.question_in(session, messages[-1]["content"])

        def render(part: Sequence[Message], add_generation_prompt: bool = False) -> str:
            return chat.prompt(session.model, part, template, tools=tools, enable_thinking=enable_thinking,
                               add_generation_prompt=add_generation_prompt, variables=chat_template_kwargs)
        prompt, spans = render(messages, add_generation_prompt=True), None
        if session.needs_spans:
            spans = message_spans(prompt, messages, render, chat.token_text(session.model, session.model.eos))
        return self._generate(Chat(messages, prompt, spans) if reset is None else None, prompt, spans=spans,
                              span_unit="chars", reset=reset is not False, **how)

    def conversation(self, system: str | None = None, messages: Sequence[Message] = (),
                     **template: "Unpack[arguments.Template]") -> Conversation:
        """A chat that keeps its messages: pykvc/conversation.py. messages: what was said before.
        template: tools, enable_thinking, chat_template_kwargs, as chat(). ValueError: the model has no chat template."""
        return Conversation(self, system, messages, **template)

    @queued
    def pipeline(self, context: str, questions: Sequence[str], *, policy: str | Sequence[str] | None = None,
                 budget: int | float | str | Sequence[int | float | str] | None = None,
                 kv_budget: int | float | str | Sequence[int | float | str] | None = None,
                 **how: "Unpack[arguments.Pipeline]") -> list[Generation]:
        """Answers questions about a text that is evaluated once, and compressed before it knows them:
        pykvc/pipeline.py. kv_budget is another name of budget."""
        budget = options.one_of("budget", budget, "kv_budget", kv_budget)
        return pipeline(self, context, questions, policy, budget, **how)

    # -- what there is to see ---------------------------------------------------------------------------------------

    @property
    def n_tokens(self) -> int:
        """Tokens evaluated since the last reset; evicted ones count."""
        return self._session.n_tokens

    @property
    def n_ctx(self) -> int:
        """The most tokens a conversation may have."""
        return self._session.n_ctx

    @property
    def policy(self) -> str:
        """The policy with every parameter."""
        return self._session.setup["kv_policy"]

    @queued
    def logits(self) -> F32:
        """[n_vocab] of the last token evaluated. ValueError if nothing was since the last reset or truncate()."""
        return self._session.logits()

    @queued
    def kept(self) -> list[I32]:
        """Per layer that evicts [n_head_kv, n_kept]: original positions of what the cache holds, ascending. Where heads keep
        different numbers (adakv), n_kept is the longest head's, and a shorter one begins with -1s."""
        return self._session.ctx.kept()

    @queued
    def scores(self) -> list[F32]:
        """Per layer that evicts [n_head_kv, n_kv]: what the policy would rank by now, a column for each of kept(); -inf
        for -1."""
        return self._session.ctx.scores()

    @queued
    def stats(self) -> dict[str, Any]:
        """n_tokens; cells (in use), cells_allocated, kept [n_layer] (a layer's cells, those of its longest head); bytes_allocated, of
        them bytes_signals (the window of queries, the sums) and bytes_past (of a hybrid: its recurrent state where the prompt ended, once
        more tokens have come), bytes_resident (of the allocated ones, in memory now: rows that were never written, or evicted, take none
        on a Linux host), bytes_used, bytes_full (without eviction); n_evictions, n_evicted (cells of the mean layer); score_ms, plan_ms,
        compact_ms, prefill_ms, decode_ms.
        Of a policy that asks: probe_ms since the last reset. Of kvzip: probe_chunk, the tokens of its largest chunk, and repeat_likelihood, the
        geometric mean of the probabilities that the model gave to tokens it was to repeat (None: it has repeated nothing)."""
        stats, probe = self._session.ctx.stats(), self._session.probe
        asked: dict[str, float | None] = {"probe_ms": probe.ms} if probe.kind != "none" else {}
        if probe.kind == "max":
            asked |= {"probe_chunk": probe.n_chunk, "repeat_likelihood": probe.likelihood}
        return {"n_tokens": self.n_tokens, "cells": int(stats["cells_used"][0]), **stats,
                "bytes_resident": self._session.ctx.bytes_resident(), **asked}

    def close(self) -> None:
        """Frees the cache and the model, when the calls of other threads have ended; a later call is a ValueError."""
        if not self._turns.lost:
            with self._turns:
                self._turns.next()
                self._opened = None

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def _session(self) -> Session:
        if self._opened is None:
            raise ValueError("this LLM was closed")
        return self._opened


arguments.show(LLM.generate, LLM._generate, but="rendered")
arguments.show(LLM.generate_batch, batch_request.read, but="llm_seed")


def _log(level: int, text: str) -> None:
    print(text, end="", file=sys.stderr)
