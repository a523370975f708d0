"""Sliding tile attention: each query tile sees a window of key tiles around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.patterns.arguments import Size
from sparsereel.patterns.base import Pattern
from sparsereel.patterns.layout import COLUMN, FRAME, ROW, Tokens
from sparsereel.patterns.rules import Axis, Both, Rule


@dataclass(frozen=True, eq=False)
class SlidingTile(Pattern):
    """Sliding tile attention (STA, arXiv 2502.04507): a window that moves tile by tile, so that tiles are whole or
    absent.

    On each axis of n tiles (the last one smaller where the tile does not divide), with a window of w tiles:

        centre = clamp(q's tile, floor(w/2), n - 1 - floor(w/2))
        allowed if |k's tile - centre| <= floor(w/2)               all tiles if w >= n

    A pair is allowed if all three axes allow it. Where tiles divide the grid the density is the product of w / n, and
    the pattern equals neighborhood attention with stride = tile and window = w x tile. In `grid.tile_order(tile)`,
    with blocks that divide the tile, no block is partial.

    Args:
        window: Odd number of tiles, or a fraction of the axis (a float, rounded to an odd number of tiles), for all
        axes
            or (frames, height, width). More tiles than the axis has means the whole axis.
        tile: Tokens of a tile (frames, height, width). Larger than the axis means the whole axis.

    Raises:
        ValueError: an even or non-positive window, a tile below 1.
    """

    window: Size | tuple[Size, Size, Size]
    tile: tuple[int, int, int] = (4, 8, 8)

    name: ClassVar[str] = "sliding_tile"
    sees_itself: ClassVar[bool] = True

    def __post_init__(self) -> None:
        windows = arguments.axes("window", self.window, _odd_size)
        arguments.store(self, window=windows, tile=arguments.axes("tile", self.tile, arguments.at_least_one))

    def centres(self, grid: TokenGrid) -> list[tuple[int, int, int]]:
        """(tile, first centre, last centre) of each axis, in tokens and tiles; the reach is the first centre."""
        axes = []
        for length, window, tile in zip(grid.shape, arguments.three(self.window), self.tile, strict=True):
            count = -(-length // tile)
            if isinstance(window, float):
                window = count if window == 1.0 else arguments.odd_units(window, length, tile)
            reach = count if window >= count else window // 2
            axes.append((tile, reach, count - 1 - reach))
        return axes

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        visible = torch.tensor(True)
        for (tile, reach, last), a, b in zip(self.centres(grid), (q.t, q.h, q.w), (k.t, k.h, k.w), strict=True):
            visible = visible & _axis(a // tile, b // tile, reach, last)
        return visible

    def rule(self, grid: TokenGrid) -> Rule:
        leaves = []
        for coordinate, length, (tile, reach, last) in zip(
            (FRAME, ROW, COLUMN), grid.shape, self.centres(grid), strict=True
        ):
            number = torch.arange(length) // tile
            leaves.append(Axis(coordinate, _axis(number[:, None], number[None], reach, last)))
        return Both(tuple(leaves))

    def preferred_tile(self, grid: TokenGrid) -> tuple[int, int, int] | None:
        return self.tile


def _axis(q: Tensor, k: Tensor, reach: int, last: int) -> Tensor:
    # A window over the whole axis has first centre > last centre, and reaches everything from either.
    return (k - q.clamp(min=reach).clamp(max=max(last, reach))).abs() <= reach


def _odd_size(name: str, value: object) -> Size:
    checked = arguments.size(name, value)
    if isinstance(checked, int) and checked % 2 == 0:
        raise ValueError(f"{name} must be an odd number of tiles, got {checked}")
    return checked


if __name__ == "__main__":
    from sparsereel.patterns.draw import main

    main(SlidingTile(window=(3, 3, 1), tile=(2, 2, 4)), tile_order=True)
