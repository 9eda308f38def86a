"""A bar on stderr while a prompt of more than two seconds is evaluated, in a terminal."""
import sys
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, Iterator

if TYPE_CHECKING:
    from .session import Session

N_SECONDS = 2.0


@contextmanager
def prompt_bar(session: "Session") -> Iterator[None]:
    """Shows the prompts that `session` evaluates meanwhile."""
    if not sys.stderr.isatty():
        yield
        return
    session.progress = bar = PromptBar()
    try:
        yield
    finally:
        session.progress = None
        bar.stop()


class PromptBar:
    """Called with (tokens done, tokens in all), from (0, all) on. It appears when a prompt will take N_SECONDS."""

    def __init__(self) -> None:
        self._begin = perf_counter()
        self._bars: Any = None

    def __call__(self, done: int, total: int) -> None:
        if done == 0:
            self._begin = perf_counter()
        elif done >= total:
            self.stop()
        elif self._bars:
            self._bars.update(self._bars.task_ids[0], completed=done)
        elif (perf_counter() - self._begin)*total/done > N_SECONDS:
            self._show(done, total)

    def _show(self, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        self._bars = Progress(TextColumn("reading the prompt"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"),
                              TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._bars.add_task("", total=total, completed=done)
        self._bars.start()

    def stop(self) -> None:
        if self._bars:
            self._bars.stop()
            self._bars = None
