"""Whose turn it is: threads that share an LLM or a Llama wait for each other, and a stream knows when it is over."""
import atexit
import functools
import os
import threading
import weakref
from typing import Any, Callable, Generator, Iterator, TypeVar, cast

from . import _core

Call = TypeVar("Call", bound=Callable[..., Any])
T = TypeVar("T")

HALF_DONE = "this process was forked while another thread used this model, so what it holds is half-done: make a new one here"
ENDING = "the interpreter is ending"
SECONDS_TO_END = 60  # that a call under way has, once the interpreter ends; it goes on for a llama_decode
NO_DEVICE = ("this process was forked from one that used a GPU, which does not come along: start it another way, "
             "as by multiprocessing.set_start_method('spawn')")


class Turns:
    """One thread at a time holds it, for a call or a piece of a stream, and may take it again within; others wait.

    A forked child goes on with its copy, unless that is half-done or on a GPU: then a call is a RuntimeError."""

    def __init__(self) -> None:
        if _forked_from_device:
            raise RuntimeError(NO_DEVICE)
        self.number = 0  # of the call that the cache belongs to: a stream of another one is over
        self.lost = ""   # why nothing can be called any more
        self._lock = threading.RLock()
        self._depth = 0
        _all.add(self)

    def __enter__(self) -> bool:
        """True: this is no call within a call."""
        if self.lost:
            raise SystemExit if self.lost == ENDING else RuntimeError(self.lost)
        self._lock.acquire()
        self._depth += 1
        return self._depth == 1

    def take(self) -> bool:
        """Without waiting. True: it is held now, until __exit__()."""
        if self.lost or not self._lock.acquire(blocking=False):
            return False
        self._depth += 1
        return True

    def __exit__(self, *_: Any) -> None:
        self._depth -= 1
        self._lock.release()

    def next(self) -> int:
        """Begins one, which ends the streams of before."""
        self.number += 1
        return self.number

    def end(self) -> None:
        """Waits for the call under way, and for good keeps others from beginning one."""
        self._lock.acquire(timeout=SECONDS_TO_END)

    def after_fork(self) -> None:
        """In the child."""
        if _forked_from_device:
            self.lost = NO_DEVICE
        elif self.take():  # it was free, or of the thread that forked
            self.__exit__()
        else:
            self.lost = HALF_DONE


class Steps(Iterator[T]):
    """A generator each of whose steps is a call, within the turn of the call that made it. RuntimeError: that is over."""

    def __init__(self, turns: Turns, number: int, steps: Generator[T, Any, Any], what: str = "stream") -> None:
        self._turns, self._number, self._steps, self._what = turns, number, steps, what
        self._ended = False

    def __next__(self) -> T:
        return self.send(None)

    def send(self, value: Any) -> T:
        with self._turns:
            if not self._ended and self._number != self._turns.number:
                self._steps.close()
                raise RuntimeError(f"this {self._what} is over: the LLM was used for something else meanwhile")
            try:
                return self._steps.send(value)
            except BaseException:
                self._ended = True
                raise

    def close(self) -> None:
        with self._turns:
            self._ended = True
            self._steps.close()


def queued(call: Call) -> Call:
    """A method of what has `_turns`: it waits for the calls of other threads."""
    @functools.wraps(call)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._turns:
            return call(self, *args, **kwargs)
    return cast(Call, alone)


def _at_exit() -> None:
    """A thread that is in a call now (a daemon: others have ended) would be torn out of it, and the process abort.
    The call ends."""
    todo = [turns for turns in _all if not turns.lost]
    for turns in todo:
        turns.lost = ENDING
    _core.end_calls()
    for turns in todo:
        turns.end()


_all: "weakref.WeakSet[Turns]" = weakref.WeakSet()
_forked_from_device = False


def _after_fork() -> None:
    global _forked_from_device
    turns = list(_all)
    if turns and any(kind in ("GPU", "IGPU") for _, _, kind in _core.devices()):
        _forked_from_device = True
    for own in turns:
        own.after_fork()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
