"""Diagonal heads: each query sees the tokens next to it in the flattened video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.patterns.arguments import Size
from sparsereel.patterns.base import Pattern
from sparsereel.patterns.layout import INDEX, Tokens
from sparsereel.patterns.rules import Band, Rule


@dataclass(frozen=True, eq=False)
class Diagonal(Pattern):
    """The diagonal pattern of Sparse-vDiT (arXiv 2506.03065): allowed if |n_q - n_k| <= width.

    n = number of a token inside the video, frame-major.

    Args:
        width: Half width in tokens, or as a fraction of the video's tokens (a float); 0 = each token sees itself.

    Raises:
        ValueError: a negative width.
    """

    width: Size

    name: ClassVar[str] = "diagonal"
    sees_itself: ClassVar[bool] = True

    def __post_init__(self) -> None:
        arguments.size("width", self.width, least=0)

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        return (q.index - k.index).abs() <= arguments.tokens(self.width, grid.video_len)

    def rule(self, grid: TokenGrid) -> Rule:
        width = arguments.tokens(self.width, grid.video_len)
        return Band(INDEX, before=width, after=width)


if __name__ == "__main__":
    from sparsereel.patterns.draw import main

    main(Diagonal(width=0.1))
