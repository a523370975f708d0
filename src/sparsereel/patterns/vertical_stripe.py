"""Vertical stripes: a few key columns that every query sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.patterns.base import Pattern
from sparsereel.patterns.layout import Tokens
from sparsereel.patterns.rules import Marked, Rule

Column = int | float
Stripe = Column | tuple[Column, Column]


@dataclass(frozen=True, eq=False)
class VerticalStripe(Pattern):
    """The vertical stripes of Sparse-vDiT (arXiv 2506.03065): allowed if n_k is one of the columns.

    n = number of a token inside the video, frame-major. Meant for `|`, like `sink`.

    Args:
        columns: Column numbers (whole numbers), places as fractions of the video (floats in [0, 1)), or (start, stop)
            pairs of either for stripes of several columns. A fraction means the token at floor(fraction x tokens);
            columns past the end of the video are left out.

    Raises:
        ValueError: no columns, a negative one, start >= stop; at use, no column inside the video.
    """

    columns: tuple[Stripe, ...]

    name: ClassVar[str] = "vertical_stripe"

    def __post_init__(self) -> None:
        given = self.columns if isinstance(self.columns, (list, tuple)) else (self.columns,)
        if not given:
            raise ValueError("columns must name at least one column")
        arguments.store(self, columns=tuple(_stripe(column) for column in given))

    def marks(self, grid: TokenGrid) -> Tensor:
        """bool [video tokens]: the columns that all see."""
        marks = torch.zeros(grid.video_len, dtype=torch.bool)
        for stripe in self.columns:
            if isinstance(stripe, tuple):
                start, stop = (_token(bound, grid.video_len) for bound in stripe)
                marks[start : max(stop, start + 1)] = True
            else:
                column = _token(stripe, grid.video_len)
                marks[column : column + 1] = True
        if not marks.any():
            raise ValueError(
                f"vertical_stripe: no column of {self.columns} is inside a video of {grid.video_len} tokens"
            )
        return marks

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        return self.marks(grid)[k.index.clamp(min=0)].expand(torch.broadcast_shapes(q.t.shape, k.t.shape))

    def rule(self, grid: TokenGrid) -> Rule:
        return Marked("keys", self.marks(grid))


def _token(column: Column, length: int) -> int:
    return column if isinstance(column, int) else int(column * length)


def _stripe(value: object) -> Stripe:
    if not isinstance(value, (list, tuple)):
        return _column(value, last=False)
    if len(value) != 2:
        raise ValueError(f"a stripe must be (start, stop), got {value!r}")
    start, stop = _column(value[0], last=False), _column(value[1], last=True)
    if type(start) is not type(stop) or start >= stop:
        raise ValueError(
            f"a stripe must be (start, stop) with start < stop, both whole numbers or both fractions, got {value!r}"
        )
    return start, stop


def _column(value: object, *, last: bool) -> Column:
    if isinstance(value, float) and (0 <= value < 1 or (last and value == 1)):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"a column must be a whole number of at least 0 or a fraction in [0.0, 1.0), got {value!r}")
    return value


if __name__ == "__main__":
    from sparsereel.patterns.draw import main

    main(VerticalStripe(columns=(0, (0.25, 0.3), 0.7)))
