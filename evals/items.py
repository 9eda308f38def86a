"""What a task is made of: `load(options) -> [Item]` and `score(item, answer) -> float` in [0, 1], or a bool."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Sequence

from pykvc.spans import Span, piece_spans, sentence_spans


@dataclass(frozen=True)
class Options:
    """What load() may depend on. A setting that changes an item changes its id."""
    count: Callable[[str], int]          # tokens of a text, in the model's vocabulary
    data_dir: Path | None = None         # None: Hugging Face
    n: int | None = None                 # items; None: as many as the task takes by default
    seed: int = 0
    chat: bool = True                    # will the items be asked in the model's chat template?
    settings: dict[str, Any] = field(default_factory=dict)  # of this task: {"length": 8000}

    def __getitem__(self, name: str) -> Any:
        return self.settings[name]


@dataclass(frozen=True)
class Item:
    """One question. Items with the same context, or the same shots, are asked from one compressed cache
    (question-out)."""
    id: str
    question: str                        # what follows the context
    gold: Any                            # what score() needs, JSON
    context: str = ""                    # what may be evicted
    shots: Sequence[str] = ()            # instead of a context: its units, one after the other
    lead: str = ""                       # an instruction before them, in no span
    stop: Sequence[str] = ()
    max_tokens: int = 64
    chat: bool = True                    # inside the model's chat template, as one user turn
    # the end of the question, with which an answer begins: a chat's assistant is made to begin so
    cue: str = ""
    query: str = ""                      # what finch asks, if not the question
    tags: dict[str, Any] = field(default_factory=dict)  # what a report groups by

    @property
    def whole(self) -> str:
        return self.lead + (self.context or "".join(self.shots))

    @property
    def spans(self) -> list[Span]:
        """Character spans of `whole`: the shots, else sentences. What is outside (template, lead, question) is always
        kept."""
        spans, begin = piece_spans(self.shots) if self.shots else sentence_spans(self.context), len(self.lead)
        return [(a + begin, b + begin) for a, b in spans]
