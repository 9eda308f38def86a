"""pykvc as a model of lm-evaluation-harness 0.4: every task of it, with a cache that evicts.

    python -m pykvc.lm_eval --model pykvc --tasks gsm8k_cot --limit 20 --batch_size 16 \\
        --model_args model=model.gguf,kv_policy=shotkv,kv_budget=0.25,protocol=question-out

is their command line, which knows one model more. Two protocols:

question-in (query-aware): a context is evaluated whole, then evicted, and the answer is scored or generated. The first
token of an answer is predicted before the eviction, so a task whose answers are one token cannot change; hold_back=N
evaluates the last N tokens of every context after the eviction instead.

question-out (query-agnostic): what stands before the question is evaluated and evicted, then the question is read. The
harness does not say where a question begins, so it is what follows the last few-shot delimiter.

Neighbours with the same examples share them: they are evaluated once, under question-out evicted once, too.
"""
import random
import sys
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, Iterator, Sequence, cast

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from . import chat, command, options
from .context import Context, Mark
from .llm import LLM
from .policy import F32
from .sampling import SamplingParams
from .spans import Span, piece_spans, token_lengths

PROTOCOLS = ("question-in", "question-out")
N_AUTO = 16  # sequences of --batch_size auto

Scored = tuple[float, bool]  # log-likelihood in nats, is every token the most likely one


@dataclass(frozen=True)
class Prompt:
    """A context of the harness, in two parts; the first is empty where there is no delimiter. White space between them
    may be in either."""
    text: str            # of the first part; "" where only its tokens are known
    head: list[int]      # tokens before the question
    question: list[int]
    query: str           # the question's text, for a policy that asks

    @property
    def ids(self) -> list[int]:
        return self.head + self.question


class PykvcLM(TemplateLM):
    """model and the rest: as pykvc.LLM takes them. protocol: question-in or question-out. delimiter: the question
    begins behind the last one of a context, or with what of the delimiter is no white space ("\\n\\nQ:": with Q:).
    hold_back: tokens. batch_size: requests that generate at once. ValueError names what is valid."""

    def __init__(self, model: str | None = None, *, protocol: str = "question-in", delimiter: str = "\n\n",
                 hold_back: int = 0, max_gen_toks: int = 256, batch_size: int | str | None = None,
                 max_batch_size: Any = None, device: Any = None, **how: Any) -> None:
        super().__init__()
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol is {' or '.join(PROTOCOLS)}, not {protocol!r}")
        if not isinstance(delimiter, str) or not delimiter:
            raise ValueError(f"delimiter is the text between two examples, not {delimiter!r}")
        self.question_out, self.delimiter = protocol == "question-out", delimiter.replace("\\n", "\n")
        self.hold_back = options.whole("hold_back", hold_back, 0)
        if self.hold_back and self.question_out:
            raise ValueError("hold_back is for question-in: question-out reads the whole question after the eviction")
        self.max_gen_toks = options.whole("max_gen_toks", max_gen_toks, 1)
        self.n_parallel = _sequences(batch_size, how)
        self.llm = LLM(model, n_seq_max=self.n_parallel, **how)
        self.seeds = random.Random(self.llm.seed)
        self.session = self.llm._session
        self.evicts = self.session.evicts and self.session.has_budget
        self._questions: dict[str, int] = {}     # where they begin in chats that apply_chat_template() wrote
        self._shared: tuple[Any, Context] | None = None

    # -- text --------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.session.model.eos

    @property
    def prefix_token_id(self) -> int:
        return self.session.model.bos if self.session.model.bos >= 0 else self.eot_token_id

    @property
    def max_length(self) -> int:
        return self.llm.n_ctx

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.llm.tokenize(string, add_special=add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Without the beginning of an answer the last message is one, and goes on (a task's gen_prefix)."""
        text = self.llm.apply_chat_template(chat_history, add_assistant=add_generation_prompt)
        if not add_generation_prompt:
            text = chat.continued(text, chat_history)
        last = next((m["content"] for m in reversed(chat_history) if m["role"] == "user"), "")
        begin = text.rfind(last.strip()) if last.strip() else -1
        if begin >= 0:
            self._questions[text] = begin + self._question_of(last.strip())
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return (self.llm.chat_template or chat.template_of(self.session.model)) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self.llm.path.name

    def _question_of(self, text: str) -> int:
        """Where the question begins: behind the last delimiter that something follows; 0: there is none."""
        at = text.rstrip().rfind(self.delimiter)
        return 0 if at < 0 else at + len(self.delimiter) - len(self.delimiter.lstrip())

    def _prompt(self, text: str, ids: list[int], n_more: int) -> Prompt:
        """A context, whose tokens the harness has chosen, without what leaves no room for n_more."""
        begin = self._questions.get(text) or self._question_of(text)
        head, n_head = self._split(text[:begin], ids) if begin else ("", 0)
        fitting = self._fit(ids, n_more)
        n_cut = len(ids) - len(fitting)
        n_left = max(0, n_head - n_cut)
        if self.hold_back >= len(fitting) - n_left:  # some of the examples are held back, too
            n_left, head = 0, ""
        return Prompt("" if n_cut else head, fitting[:n_left], fitting[n_left:], text[begin:].strip())

    def _split(self, head: str, ids: list[int]) -> tuple[str, int]:
        """(head, its number of tokens) of those in ids. Without its white space where the tokenizer joins that with
        what follows; "" where it is no text of its own, and a token that begins in it is not of it."""
        for part in (head, head.rstrip()):
            if ids[:len(self._encoded(part))] == self._encoded(part):
                return part, len(self._encoded(part))
        pieces = [self.session.model.piece(token, True) for token in ids]
        if ids[0] == self.session.model.bos and self.session.model.add_bos:
            pieces[0] = b""
        ends = accumulate(token_lengths(self.llm.detokenize(ids).encode(), pieces))
        return "", sum(end <= len(head.encode()) for end in ends)

    @cached_property
    def _encoded(self) -> Any:
        return lru_cache(maxsize=64)(lambda text: self.tok_encode(text))

    def _spans(self, text: str) -> list[Span]:
        """Of characters: the examples, for a policy that keeps or evicts them whole."""
        pieces = text.split(self.delimiter)
        return piece_spans([*(piece + self.delimiter for piece in pieces[:-1]), pieces[-1]])

    # -- what the harness asks ---------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
                              **_: Any) -> list[Scored]:
        scored: list[Scored] = []
        n_before = self.llm.stats()["n_evictions"]
        now: list[int] | None = None
        prompts = [self._prompt(given[0] if given else "", tokens, len(continuation) - 1)
                   for given, tokens, continuation in requests]
        if any(given for given, *_ in requests):
            self._check(prompts)
        bar = tqdm(prompts, desc="loglikelihood", disable=disable_tqdm)
        for prompt, (given, _ids, continuation) in zip(bar, requests):
            if now is None or prompt.ids != now:  # choices of one question have the same
                self._evaluate(prompt)
                now, first, mark = prompt.ids, self.llm.logits(), Mark(self.session)
            else:
                mark.return_to()
            scored.append(self._score(first, continuation))
            if given is not None:
                self.cache_hook.add_partial("loglikelihood", given, scored[-1])
        self._report(len(requests), self.llm.stats()["n_evictions"] - n_before)
        return scored

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """A text in windows of max_length tokens, the first after BOS: kv_cells and kv_decode_budget evict while they
        are scored."""
        if self.session.evicts and not (self.session.setup["kv_cells"] or self.session.setup["kv_decode_budget"]):
            raise ValueError("loglikelihood_rolling scores a text from its first token on, so there is no prompt that "
                             "kv_budget could evict: give kv_cells or kv_decode_budget, or kv_policy=full")
        sums = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text, add_special_tokens=False), self.prefix_token_id,
                                                self.max_length, context_len=1)
            sums.append(sum(score for score, _ in self._loglikelihood_tokens(
                [(None, *make_disjoint_window(window)) for window in windows], disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), sums[-1])
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        asked = [request.args for request in requests]
        sampling = [self._sampling(given) for _, given in asked]
        prompts = [self._prompt(text, self.tok_encode(text) or [self.prefix_token_id], how.max_tokens)
                   for (text, _), how in zip(asked, sampling)]
        self._check(prompts)
        texts, n_evictions = [""]*len(asked), 0
        with tqdm(total=len(asked), desc="generate_until", disable=disable_tqdm) as bar:
            for i, text, evictions in (self._at_once if self._batched(prompts) else self._in_turn)(prompts, sampling):
                texts[i], n_evictions = text, n_evictions + evictions
                self.cache_hook.add_partial("generate_until", asked[i], text)
                bar.update()
        self._report(len(asked), n_evictions)
        return texts

    def _sampling(self, given: dict[str, Any]) -> SamplingParams:
        how = normalize_gen_kwargs(given, self.max_gen_toks)
        drawn = {name: how[name] for name in ("top_k", "top_p", "min_p") if name in how} if how["do_sample"] else {}
        return SamplingParams(max_tokens=how["max_gen_toks"], stop=[stop for stop in how["until"] if stop],
                              temperature=float(how.get("temperature", 1.0)) if how["do_sample"] else 0.0,
                              seed=self.seeds.randrange(2**32 - 1), **drawn)  # repeats of a request are other samples

    # -- the cache ---------------------------------------------------------------------------------------------------

    def _batched(self, prompts: Sequence[Prompt]) -> bool:
        """Can sequences side by side hold them? Their shared beginnings are given as texts; a question that the policy
        has to know, or a probe behind a whole prompt, takes one after the other."""
        if self.n_parallel == 1 or len(prompts) == 1 or self.hold_back:
            return False
        if self.session.probe.kind != "none":
            return self.question_out and self.session.probe.kind == "max" and all(prompt.text for prompt in prompts)
        return all(prompt.text or not prompt.head for prompt in prompts)

    def _at_once(self, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams]) -> Iterator[tuple[int, str, int]]:
        """(index, text, evictions), as they are done. A context that was evicted once counts in its first question."""
        counted: set[str] = set()
        heads = cast(list[str], [prompt.text or None for prompt in prompts])  # None: it has no prefix
        spans = cast(list[list[Span]], [self._spans(prompt.text) if prompt.text else None for prompt in prompts])
        answers = self.llm.generate_batch(
            [prompt.question for prompt in prompts], prefix=heads, spans=spans, span_unit="chars",
            compress_prefix=self.question_out, compress=self.evicts and not self.question_out,
            sampling_params=list(sampling), stream=True)
        for i, answer in answers:
            n = answer.kv["evictions"]
            if self.question_out and prompts[i].text not in counted:
                n += answer.kv.get("prefix_evictions", 0)
            counted.add(prompts[i].text)
            yield i, answer.text, n

    def _in_turn(self, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams]) -> Iterator[tuple[int, str, int]]:
        for i, (prompt, how) in enumerate(zip(prompts, sampling)):
            n_before = self.llm.stats()["n_evictions"]
            self._evaluate(prompt)
            text = self.llm.generate(reset=False, compress=False, sampling_params=how).text
            yield i, text, self.llm.stats()["n_evictions"] - n_before

    def _check(self, prompts: Sequence[Prompt]) -> None:
        if self.question_out and self.evicts and not any(prompt.head for prompt in prompts):
            raise ValueError(f"no request has {self.delimiter!r} before its question, so question-out has nothing to "
                             "evict: give --num_fewshot, another delimiter= or protocol=question-in")

    def _fit(self, ids: list[int], n_more: int) -> list[int]:
        """The end of a context that leaves room for n_more tokens, as the harness' other models cut it."""
        room = self.max_length - n_more
        if room < 1:
            raise ValueError(f"n_ctx is {self.max_length} tokens, of which an answer needs {n_more}: "
                             "give a larger n_ctx")
        if len(ids) > room:
            tqdm.write(f"a context of {len(ids)} tokens is cut at its beginning to {room}: n_ctx is {self.max_length}",
                       file=sys.stderr)
        return ids[-room:]

    def _evaluate(self, prompt: Prompt) -> None:
        """A prompt, evicted as the protocol says; its last logits are there."""
        n_held = min(self.hold_back, len(prompt.question) - 1) if self.evicts else 0
        end, kv_query = len(prompt.question) - n_held, self._query(prompt)
        if prompt.head:
            self._context(prompt).go_back()
            self.llm.prefill(tokens=prompt.question[:end], spans=())
        else:
            self.llm.reset()
            self.llm.prefill(tokens=prompt.question[:end], kv_query=kv_query)
        if self.evicts and not (self.question_out and prompt.head):
            self.llm.compress(kv_query)
        if n_held:
            self.llm.prefill(tokens=prompt.question[end:], spans=())
        self.session.end_prompt(compress=False)

    def _context(self, prompt: Prompt) -> Context:
        """Of the head, under question-out evicted; that of the prompt before, where it is the same."""
        kv_query = self._query(prompt)
        key = prompt.head, kv_query
        if self._shared is None or self._shared[0] != key:
            self._shared = None  # what it copied goes first
            if prompt.text:
                context = self.llm.context(prompt.text, spans=self._spans(prompt.text), span_unit="chars",
                                           kv_query=kv_query)
            else:
                context = self.llm.context(tokens=prompt.head, kv_query=kv_query)
            if self.evicts and self.question_out:
                context.compress()
            self._shared = key, context
        return self._shared[1]

    def _query(self, prompt: Prompt) -> str | None:
        return prompt.query if self.session.probe.kind == "mean" else None

    def _score(self, first: F32, continuation: list[int]) -> Scored:
        rows, done = [_picked(first[None], continuation[:1])], 1
        for logits in self.session.each_logits(continuation[:-1], generated=True):
            rows.append(_picked(logits, continuation[done:done + len(logits)]))
            done += len(logits)
        return sum(row[0] for row in rows), all(row[1] for row in rows)

    def _report(self, n: int, n_evictions: int) -> None:
        if self.session.evicts:
            tqdm.write(f"{self.llm.policy}: {n_evictions} evictions in {n} requests", file=sys.stderr)


def _sequences(batch_size: int | str | None, how: dict[str, Any]) -> int:
    """How many, of --batch_size; one with kv_cells."""
    text = str(batch_size or 1).partition(":")[0]
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise ValueError(f"batch_size is a whole number of 1 or more, or auto, not {batch_size!r}")
    n = N_AUTO if text == "auto" else int(text)
    if n > 1 and how.get("kv_cells"):
        print("kv_cells: one request at a time, since requests side by side share their examples, which cells may evict",
              file=sys.stderr)
        return 1
    return n


def _picked(logits: F32, ids: list[int]) -> Scored:
    """logits [n, n_vocab], ids [n]: the sum of their log-probabilities, and whether each is the first choice."""
    x = logits.astype(np.float64)
    top = x.max(axis=1)
    chosen = x[np.arange(len(ids)), ids]
    total = float((chosen - top - np.log(np.exp(x - top[:, None]).sum(axis=1))).sum())
    return total, bool((x.argmax(axis=1) == ids).all())


def main() -> None:
    """lm_eval's command line. A mistake ends with exit status 2 and one sentence on stderr."""
    from lm_eval.__main__ import cli_evaluate
    try:
        cli_evaluate()
    except ValueError as error:
        sys.exit(command.refuse(str(error)))


if "pykvc" not in model_registry:
    model_registry.register("pykvc", target="pykvc.lm_eval:PykvcLM")

if __name__ == "__main__":
    main()
