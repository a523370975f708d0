"""Temporal heads: each query sees the same place, and what is close to it, in every frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.patterns.arguments import Size
from sparsereel.patterns.base import Pattern, distance
from sparsereel.patterns.layout import COLUMN, ROW, Tokens
from sparsereel.patterns.rules import Axis, Both, Rule

#: tokens that a tile should hold: a key block
TILE_TOKENS = 64
SIDES = ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8))


@dataclass(frozen=True, eq=False)
class Temporal(Pattern):
    """The temporal heads of Sparse VideoGen (arXiv 2502.01776): the same place in all frames, with a margin.

    Allowed if |h_q - h_k| <= width and |w_q - w_k| <= width. Sparse VideoGen takes a band in the order that puts the
    same place of all frames together, which wraps around rows; here the margin is a square.

    Args:
        width: Half width of the square in tokens, or as a fraction of each axis (a float); 0 = exactly the same place.

    Raises:
        ValueError: a negative width.
    """

    width: Size = 1

    name: ClassVar[str] = "temporal"
    sees_itself: ClassVar[bool] = True

    def __post_init__(self) -> None:
        arguments.size("width", self.width, least=0)

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        rows, columns = arguments.tokens(self.width, grid.height), arguments.tokens(self.width, grid.width)
        return ((q.h - k.h).abs() <= rows) & ((q.w - k.w).abs() <= columns)

    def rule(self, grid: TokenGrid) -> Rule:
        rows = Axis(ROW, distance(grid.height) <= arguments.tokens(self.width, grid.height))
        return Both((rows, Axis(COLUMN, distance(grid.width) <= arguments.tokens(self.width, grid.width))))

    def preferred_tile(self, grid: TokenGrid) -> tuple[int, int, int] | None:
        """All frames of a few neighbouring places, about a key block of tokens: the layout of Sparse VideoGen."""
        if grid.frames == 1:
            return None
        height, width = min(SIDES, key=lambda side: abs(grid.frames * side[0] * side[1] - TILE_TOKENS))
        return grid.frames, height, width


if __name__ == "__main__":
    from sparsereel.patterns.draw import main

    main(Temporal())
