"""Which prompt holds when: one text, texts that take over at given times, or a generator that decides on the way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

Switches = list[tuple[float, str]]


class Prompts:
    """Prompts by time of the video.

    Args:
        given: a text; a list of (seconds, text), the first at 0; or any other iterable, whose items are such pairs, or
            texts (asked for once a chunk; None = keep the last one).
        seconds: length of the video; None = no end.

    Raises:
        ValueError: times that are no numbers, do not begin at 0, do not rise or lie past the end; an empty text.
    """

    def __init__(self, given: Any, seconds: float | None) -> None:
        self.seconds = seconds
        self.current: str | None = None
        self.taken = 0  # items of the source
        self._pending: tuple[float, str] | None = None
        self._last = -math.inf
        self._asks = False  # texts without times
        self._asked = -math.inf
        if isinstance(given, str):
            given = [(0.0, given)]
        if isinstance(given, (list, tuple)):
            self._check_all(given)
        elif not isinstance(given, Iterable):
            raise ValueError(f"a prompt is a text, a list of (seconds, text) or an iterable, got {given!r}")
        self._source: Iterator[Any] | None = iter(given)

    def _check_all(self, switches: Any) -> None:
        if not switches:
            raise ValueError("the list of prompts is empty")
        last = -math.inf
        for switch in switches:
            time, _ = self._checked(switch, last)
            if last == -math.inf and time != 0:
                raise ValueError(f"the first prompt must begin at 0 s, got {time:g} s")
            last = time

    def _checked(self, item: Any, last: float) -> tuple[float, str]:
        if not isinstance(item, (list, tuple)) or len(item) != 2 or not isinstance(item[1], str):
            raise ValueError(f"a prompt switch is a pair (seconds, text), got {item!r}")
        time, text = item
        if isinstance(time, bool) or not isinstance(time, (int, float)) or not math.isfinite(time) or time < 0:
            raise ValueError(f"the time of a prompt switch must be a number of seconds from 0 on, got {time!r}")
        if time <= last:
            raise ValueError(f"times of prompt switches must rise, got {time:g} s after {last:g} s")
        if self.seconds is not None and time > 0 and time >= self.seconds:
            raise ValueError(f"a prompt switch at {time:g} s lies past the end of the video ({self.seconds:g} s)")
        if not text.strip():
            raise ValueError(f"the prompt at {time:g} s is empty")
        return float(time), text

    def at(self, time: float) -> str:
        """The prompt for the chunk that begins at `time`; times must not fall from call to call.

        Raises:
            ValueError: the iterable raised, gave something else, or gave nothing at all.
        """
        if self.current is None or (self._asks and time > self._asked):
            self._ask()
        self._asked = time
        while self._pending is not None and self._pending[0] <= time:
            self.current = self._pending[1]
            self._pending = None
            self._ask()
        if self.current is None:
            raise ValueError("no prompt holds at the beginning: the first one must begin at 0 s")
        return self.current

    def _ask(self) -> None:
        """Take the next item from the source."""
        if self._source is None or self._pending is not None:
            return
        try:
            item = next(self._source)
        except StopIteration:
            self._source = None
            return
        except Exception as error:
            self._source = None
            raise ValueError(f"the source of prompts failed: {type(error).__name__}: {error}") from error
        self.taken += 1
        if item is None or isinstance(item, str):
            self._asks = True
            self.current = item if item and item.strip() else self.current
            return
        self._pending = self._checked(item, self._last)
        self._last = self._pending[0]

    def replay(self, taken: int, prompt: str | None) -> None:
        """Go to where a checkpoint was: take so many items from a fresh source; `prompt` holds if they name none (such
        as those typed by hand)."""
        while self.taken < taken and self._source is not None:
            before = self._pending
            if before is not None:
                self.current, self._pending = before[1], None
            self._ask()
        self.current = self.current if self.current is not None else prompt
