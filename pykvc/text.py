"""Bytes of tokens -> text that may be shown: whole characters only, and nothing of a stop string."""
import codecs
from typing import Iterable, Sequence


class TextStream:
    """Takes the bytes of one token after the other and gives out text as soon as it is certain."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stop = list(stop)
        self.stopped = False  # a stop string came: nothing more will be given out
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""       # might be the beginning of a stop string

    def push(self, data: bytes, final: bool = False) -> str:
        """The text that became certain. final: no more tokens will come, so all of it did."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(data, final)
        found = [at for at in map(self._held.find, self.stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[:min(found)], ""
            return text
        n_held = 0 if final else self._open_stop()
        text = self._held[:len(self._held) - n_held]
        self._held = self._held[len(text):]
        return text

    def _open_stop(self) -> int:
        """Characters at the end that some stop string begins with."""
        longest = max(map(len, self.stop), default=0)
        for n in range(min(len(self._held), longest - 1), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self.stop):
                return n
        return 0


def check_stop(stop: str | Sequence[str] | None) -> list[str]:
    """stop= of generate() as a list of strings."""
    stops = [] if stop is None else list(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else [stop]
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"stop is a string or a list of strings, none of them empty, not {stop!r}")
    return stops
