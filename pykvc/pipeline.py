"""Questions about one text, which is evaluated once and compressed before it knows them (kvpress' pipeline).

    answers = llm.pipeline(report, ["Who signed it?", "When?"], policy="keydiff", budget=0.25)
    print(answers[0].text)

In the model's chat template text and question are one message of the user, which is cut where the question begins.
"""
from typing import TYPE_CHECKING, Any, Sequence

from . import sampling
from .context import check_asked, steps_of
from .sampling import Sampler, SamplingParams
from .spans import Span, check_spans, segment_spans
from .user_turn import asked

if TYPE_CHECKING:
    from .generation import Generation
    from .llm import LLM


def pipeline(llm: "LLM", context: str, questions: Sequence[str], policy: str | Sequence[str] | None, budget: Any, *, decode_budget: Any = None,
             system: str | None = None, raw: bool = False, spans: Sequence[Span] | None = None, span_unit: str = "chars",
             segment: str | None = None, kv_query: str | None = None, sampling_params: SamplingParams | None = None,
             **own: Any) -> "list[Generation]":
    """One Generation for each question, each asked from the same state.

    policy, budget, decode_budget: as Context.compress(); None: the LLM's own, and without a budget nothing is evicted.
    spans: of the text, in characters; segment: units of it, as generate(). raw, or a model without a template: a question follows the text
    as it is. sampling_params, or its fields by name: as generate(). ValueError for every mistake, before anything is evaluated."""
    if not isinstance(context, str) or not context.strip():
        raise ValueError(f"context is a text that is not empty, not {context!r}")
    listed = isinstance(questions, Sequence) and not isinstance(questions, str) and len(questions) > 0
    if not listed or not all(isinstance(q, str) and q.strip() for q in questions):
        raise ValueError(f"questions is a list of strings, none of them empty, not {questions!r}")
    if span_unit != "chars":
        raise ValueError("spans of a pipeline's text are in characters, since the chat template goes round it")
    if spans is not None and segment is not None:
        raise ValueError("give spans or segment, not both")
    session, how = llm._session, sampling.of_call(sampling_params, own)
    Sampler(session.model, how, llm.seed)
    if spans is not None:
        spans = check_spans(spans, len(context), "characters")
    elif segment or session.needs_spans:
        spans = segment_spans(context, segment or "sentence")
    found = asked(session.model, context, questions, system, raw, llm.chat_template)
    if (policy is not None or budget is not None) and not session.evicts:
        raise ValueError("there is nothing to compress with: make the LLM with a kv_policy")
    compresses = session.evicts and (session.has_budget or budget is not None)
    if compresses:
        check_asked(session, steps_of(session, policy, budget, decode_budget), kv_query)
    ctx = llm.context(found.head, spans=None if spans is None else found.spans(list(spans)), span_unit="chars", kv_query=kv_query)
    if compresses:
        ctx.compress(policy, budget, decode_budget)
    return [ctx.ask(tail, sampling_params=how) for tail in found.tails]
