"""A study over several processes: `accelerate launch -m sparsereel eval run ...`.

Every process makes its own prompts and seeds; the first then measures all. They meet over the clips on the disk, not
over a network, so that a process that was killed is replaced by running the command again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Which of `count` processes this is; `index` counts from 0."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def share(self, groups: Sequence[T]) -> list[T]:
        """Every `count`-th group."""
        return list(groups[self.index :: self.count])

    def device(self, device: str) -> str:
        """The device of this process: with plain "cuda" each takes its own."""
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and self.count > 1 else device


def this_shard() -> Shard:
    """From the variables that accelerate and torchrun set; a single one without them.

    Raises:
        ValueError: they contradict each other.
    """
    try:
        index, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise ValueError(f"RANK and WORLD_SIZE must be whole numbers: {error}") from error
    if not 0 <= index < count:
        raise ValueError(f"RANK must lie in 0..WORLD_SIZE - 1, got {index} of {count}")
    return Shard(index, count)


def wait_until(done: Callable[[], bool], *, seconds: float = 2.0, still: Callable[[], object] = object) -> None:
    """Look every `seconds` until `done`; `still` is asked each time and may raise, to give up."""
    import time

    while not done():
        still()
        time.sleep(seconds)
