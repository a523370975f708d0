"""Schedules: the steps, lengths and densities at which attention stays dense."""

from __future__ import annotations

import math
from dataclasses import dataclass

Amount = int | float


def share_of(amount: Amount, total: int) -> int:
    """`amount` of `total` steps: an int is steps, a float a share of the total, rounded up."""
    if isinstance(amount, int):
        return amount
    # Products such as 0.1 * 70 land a hair above the whole number that is meant.
    return math.ceil(amount * total - 1e-9)


@dataclass(frozen=True)
class Schedule:
    """When attention stays dense whatever the patterns say.

    Args:
        dense_first, dense_last: Steps at the start and at the end that stay dense: an int is steps, a float in [0, 1]
        a share
            of the steps run, rounded up. More costs time and keeps quality.
        min_tokens: Sequences shorter than this stay dense.
        max_density: Masks that cost a larger share of a dense call than this stay dense: the share of blocks visited,
            where the kernel pays for whole blocks; less where it skips inside them (`sparsereel_kernels.cost`).

    Raises:
        ValueError: a value out of range.
    """

    dense_first: Amount = 0
    dense_last: Amount = 0
    min_tokens: int = 0
    max_density: float = 1.0

    def __post_init__(self) -> None:
        for name in ("dense_first", "dense_last"):
            value = getattr(self, name)
            steps = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            share = isinstance(value, float) and 0 <= value <= 1
            if not (steps or share):
                raise ValueError(f"{name} must be a number of steps or a share in [0.0, 1.0], got {value!r}")
        if isinstance(self.min_tokens, bool) or not isinstance(self.min_tokens, int) or self.min_tokens < 0:
            raise ValueError(f"min_tokens must be a number of tokens, 0 or more, got {self.min_tokens!r}")
        number = isinstance(self.max_density, (int, float)) and not isinstance(self.max_density, bool)
        if not number or not 0 < self.max_density <= 1:
            raise ValueError(f"max_density must be above 0 and at most 1, got {self.max_density!r}")

    @property
    def needs_step(self) -> bool:
        """Whether `dense_at` differs between steps."""
        return bool(self.dense_first or self.dense_last)

    def dense_at(self, step: int, total: int) -> bool:
        """Whether step `step` (from 0) of `total` is dense.

        Raises:
            ValueError: step outside 0..total - 1.
        """
        check_step(step, total)
        return step < share_of(self.dense_first, total) or step >= total - share_of(self.dense_last, total)


def check_step(step: int, total: int) -> None:
    """Raise ValueError unless `step` is one of `total` steps, counted from 0."""
    if not 0 <= step < total:
        raise ValueError(f"step must be in 0..total - 1, got step {step} of {total}")
