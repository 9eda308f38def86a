"""pykvc as a model of lm-evaluation-harness 0.4: every task of it, with a cache that evicts.

    python -m pykvc.lm_eval --model pykvc --model_args model=model.gguf,kv_policy=shotkv,kv_budget=0.25 --tasks gsm8k --limit 20

is their command line, which knows one model more. Question-in: a context is evaluated whole, then evicted, and the answer is scored
or generated. The first token of an answer is then predicted before the eviction, so a task whose answers are one token cannot
change; hold_back=N evaluates the last N tokens of every context after the eviction instead.
"""
import sys
from typing import Any, Sequence

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from . import chat, command, options
from .context import Mark
from .llm import LLM
from .policy import F32

Scored = tuple[float, bool]  # log-likelihood in nats, is every token the most likely one


class PykvcLM(TemplateLM):
    """model and the rest: as pykvc.LLM takes them. hold_back: tokens. ValueError names what is valid."""

    def __init__(self, model: str | None = None, *, hold_back: int = 0, max_gen_toks: int = 256, batch_size: Any = None,
                 max_batch_size: Any = None, device: Any = None, **how: Any) -> None:
        super().__init__()
        self.hold_back = options.whole("hold_back", hold_back, 0)
        self.max_gen_toks = options.whole("max_gen_toks", max_gen_toks, 1)
        self.llm = LLM(model, **how)
        self.session = self.llm._session
        self.evicts = self.session.evicts and self.session.has_budget

    # -- text -----------------------------------------------------------------------------------------------------------

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
        return text if add_generation_prompt else chat.continued(text, chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return (self.llm.chat_template or chat.template_of(self.session.model)) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self.llm.path.name

    # -- what the harness asks --------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any) -> list[Scored]:
        scored: list[Scored] = []
        context: list[int] = []
        n_before = self.llm.stats()["n_evictions"]
        for given, ids, continuation in tqdm(requests, desc="loglikelihood", disable=disable_tqdm):
            ids = self._fit(ids, len(continuation) - 1)
            if ids != context:  # choices of one question have the same
                self._evaluate(ids)
                context, first, mark = ids, self.llm.logits(), Mark(self.session)
            else:
                mark.return_to()
            scored.append(self._score(first, continuation))
            if given is not None:
                self.cache_hook.add_partial("loglikelihood", given, scored[-1])
        self._report(len(requests), n_before)
        return scored

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """A text in windows of max_length tokens, the first after BOS: kv_cells and kv_decode_budget evict while they are scored."""
        if self.session.evicts and not (self.session.setup["kv_cells"] or self.session.setup["kv_decode_budget"]):
            raise ValueError("loglikelihood_rolling scores a text from its first token on, so there is no prompt that kv_budget could evict: "
                             "give kv_cells or kv_decode_budget, or kv_policy=full")
        sums = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text, add_special_tokens=False), self.prefix_token_id, self.max_length, context_len=1)
            sums.append(sum(score for score, _ in self._loglikelihood_tokens(
                [(None, *make_disjoint_window(window)) for window in windows], disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), sums[-1])
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        texts = []
        n_before = self.llm.stats()["n_evictions"]
        for context, given in tqdm([request.args for request in requests], desc="generate_until", disable=disable_tqdm):
            how = normalize_gen_kwargs(given, self.max_gen_toks)
            sampling = {name: how[name] for name in ("top_k", "top_p", "min_p") if name in how} if how["do_sample"] else {}
            temperature = float(how.get("temperature", 1.0)) if how["do_sample"] else 0.0
            n_most = how["max_gen_toks"]
            self._evaluate(self._fit(self.tok_encode(context) or [self.prefix_token_id], n_most))
            texts.append(self.llm.generate(reset=False, compress=False, max_tokens=n_most, stop=[stop for stop in how["until"] if stop],
                                           temperature=temperature, **sampling).text)
            self.cache_hook.add_partial("generate_until", (context, given), texts[-1])
        self._report(len(requests), n_before)
        return texts

    # -- the cache --------------------------------------------------------------------------------------------------------

    def _fit(self, ids: list[int], n_more: int) -> list[int]:
        """The end of a context that leaves room for n_more tokens, as the harness' other models cut it."""
        room = self.max_length - n_more
        if room < 1:
            raise ValueError(f"n_ctx is {self.max_length} tokens, of which an answer needs {n_more}: give a larger n_ctx")
        if len(ids) > room:
            tqdm.write(f"a context of {len(ids)} tokens is cut at its beginning to {room}: n_ctx is {self.max_length}", file=sys.stderr)
        return ids[-room:]

    def _evaluate(self, ids: list[int]) -> None:
        """A new context, evicted but for what is held back; its last logits are there."""
        n_held = min(self.hold_back, len(ids) - 1) if self.evicts else 0
        self.llm.reset()
        self.llm.prefill(tokens=ids[:len(ids) - n_held])
        if self.evicts:
            self.llm.compress()
        if n_held:
            self.llm.prefill(tokens=ids[len(ids) - n_held:])
        self.session.end_prompt(compress=False)

    def _score(self, first: F32, continuation: list[int]) -> Scored:
        rows, done = [_picked(first[None], continuation[:1])], 1
        for logits in self.session.each_logits(continuation[:-1], generated=True):
            rows.append(_picked(logits, continuation[done:done + len(logits)]))
            done += len(logits)
        return sum(row[0] for row in rows), all(row[1] for row in rows)

    def _report(self, n: int, n_before: int) -> None:
        if self.session.evicts:
            tqdm.write(f"{self.llm.policy}: {self.llm.stats()['n_evictions'] - n_before} evictions in {n} requests", file=sys.stderr)


def _picked(logits: F32, ids: list[int]) -> Scored:
    """logits [n, n_vocab], ids [n]: the sum of their log-probabilities, and whether all of them are the first choice."""
    x = logits.astype(np.float64)
    top = x.max(axis=1)
    chosen = x[np.arange(len(ids)), ids]
    return float((chosen - top - np.log(np.exp(x - top[:, None]).sum(axis=1))).sum()), bool((x.argmax(axis=1) == ids).all())


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
