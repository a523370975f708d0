"""Spatial heads: each query sees its own frame and the neighbouring ones, whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.patterns.base import Pattern, distance
from sparsereel.patterns.layout import FRAME, Tokens
from sparsereel.patterns.rules import Axis, Rule


@dataclass(frozen=True, eq=False)
class Spatial(Pattern):
    """The spatial heads of Sparse VideoGen (arXiv 2502.01776): allowed if |t_q - t_k| <= frames.

    Args:
        frames: How many frames before and after are seen whole; 0 = the own frame only. More than the video has means
        all.

    Raises:
        ValueError: a negative number of frames.
    """

    frames: int = 1

    name: ClassVar[str] = "spatial"
    sees_itself: ClassVar[bool] = True

    def __post_init__(self) -> None:
        arguments.whole("frames", self.frames, least=0)

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        return (q.t - k.t).abs() <= self.frames

    def rule(self, grid: TokenGrid) -> Rule:
        return Axis(FRAME, distance(grid.frames) <= self.frames)


if __name__ == "__main__":
    from sparsereel.patterns.draw import main

    main(Spatial())
