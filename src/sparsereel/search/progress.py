"""One bar for a whole search, with the time left; counted in denoising steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Bar:
    """Counts steps; without a display it only counts.

    `reach(step)` is for runs that say where they are, `done(steps)` for runs that are over.
    """

    def __init__(self, shown: Any = None) -> None:
        self._shown = shown
        self._task = None if shown is None else shown.add_task("looking at the model", total=None)
        self._last = -1

    def expect(self, steps: int) -> None:
        """How many steps the search will take."""
        if self._shown is not None:
            self._shown.update(self._task, total=steps)

    def stage(self, text: str) -> None:
        """What is being done now."""
        if self._shown is not None:
            self._shown.update(self._task, description=text)

    def note(self, text: str) -> None:
        """One line above the bar."""
        if self._shown is not None:
            self._shown.console.print(text)

    def more(self, steps: int) -> None:
        """Steps that were not expected."""
        if self._shown is not None:
            total = self._shown.tasks[0].total or 0
            self._shown.update(self._task, total=total + steps)

    def reach(self, step: int) -> None:
        """A run is at step `step`."""
        if step != self._last:
            self._last = step
            self.done(1)

    def done(self, steps: int) -> None:
        """Steps that are over."""
        if self._shown is not None:
            self._shown.advance(self._task, steps)


@contextmanager
def bar(show: bool) -> Iterator[Bar]:
    """The bar of one search, on stderr."""
    if not show:
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, console=Console(stderr=True)) as shown:
        yield Bar(shown)


@contextmanager
def silenced(pipe: Any) -> Iterator[None]:
    """The pipeline's own bar of every clip is off inside."""
    if not hasattr(pipe, "set_progress_bar_config"):
        yield
        return
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before
