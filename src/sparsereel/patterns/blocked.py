"""Blocked windows: the video is cut into boxes, each token sees its own; shifted boxes join what the cut divides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.patterns.arguments import Size
from sparsereel.patterns.base import Pattern
from sparsereel.patterns.layout import COLUMN, FRAME, ROW, Tokens
from sparsereel.patterns.rules import Axis, Both, Rule

SHIFTS = ("never", "odd_layers", "always")


@dataclass(frozen=True, eq=False)
class Blocked(Pattern):
    """Window attention of Swin (arXiv 2103.14030) on three axes: allowed if q and k lie in the same box.

    On each axis the box of c is floor((c + s) / w), w = window, with shift s = 0, or floor(w / 2) where boxes are
    shifted. Boxes at the far borders are smaller where w does not divide; shifted ones do not wrap around, which is
    what Swin's mask of its cyclic shift says.

    Args:
        window: (frames, height, width) of a box in tokens, or shares of the axis (floats).
        shift: "never", "odd_layers" (Swin's alternation) or "always".

    Raises:
        ValueError: a window below 1, an unknown shift.
    """

    window: tuple[Size, Size, Size]
    shift: str = "odd_layers"

    name: ClassVar[str] = "blocked"
    sees_itself: ClassVar[bool] = True

    def __post_init__(self) -> None:
        arguments.store(self, window=arguments.axes("window", self.window, arguments.size))
        arguments.one_of("shift", self.shift, SHIFTS)

    def for_head(self, layer: int, head: int) -> Pattern:
        if self.shift != "odd_layers":
            return self
        return replace(self, shift="always" if layer % 2 else "never")

    def preferred_tile(self, grid: TokenGrid) -> tuple[int, int, int] | None:
        frames, height, width = self._sizes(grid)
        return (frames, height, width) if self.shift == "never" else None

    def _sizes(self, grid: TokenGrid) -> tuple[int, int, int]:
        lengths = (grid.frames, grid.height, grid.width)
        sizes = [max(1, arguments.tokens(w, n)) for w, n in zip(self.window, lengths, strict=True)]
        return (sizes[0], sizes[1], sizes[2])

    def _boxes(self, grid: TokenGrid) -> list[tuple[int, int]]:
        """(window, shift) of each axis; the pattern of even layers unless boxes are always shifted."""
        return [(w, w // 2 if self.shift == "always" else 0) for w in self._sizes(grid)]

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        axes = zip(((q.t, k.t), (q.h, k.h), (q.w, k.w)), self._boxes(grid), strict=True)
        same = [(a + s) // w == (b + s) // w for (a, b), (w, s) in axes]
        return same[0] & same[1] & same[2]

    def rule(self, grid: TokenGrid) -> Rule:
        lengths = (grid.frames, grid.height, grid.width)
        rules: list[Rule] = []
        for coordinate, length, (window, shift) in zip((FRAME, ROW, COLUMN), lengths, self._boxes(grid), strict=True):
            box = (torch.arange(length) + shift) // window
            rules.append(Axis(coordinate, box[:, None] == box))
        return Both(tuple(rules))


if __name__ == "__main__":
    from sparsereel.patterns.draw import main

    main(Blocked(window=(2, 4, 4)))
