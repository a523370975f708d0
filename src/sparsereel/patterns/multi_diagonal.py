"""Multi-diagonal heads: bands that return once every frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.patterns.arguments import Size
from sparsereel.patterns.base import Pattern
from sparsereel.patterns.layout import Coordinate, Tokens
from sparsereel.patterns.rules import Band, Rule


@dataclass(frozen=True, eq=False)
class MultiDiagonal(Pattern):
    """The multi-diagonal pattern of Sparse-vDiT (arXiv 2506.03065): allowed if |n_q mod p - n_k mod p| <= width.

    n = number of a token inside the video, frame-major; p = period. With the period of a frame it is the same stretch
    of rows in every frame.

    Args:
        width: Half width in tokens, or as a fraction of the period (a float); 0 = the same place only.
        period: Tokens from one diagonal to the next; None = the tokens of a frame.

    Raises:
        ValueError: a negative width, a period below 1.
    """

    width: Size
    period: int | None = None

    name: ClassVar[str] = "multi_diagonal"
    sees_itself: ClassVar[bool] = True

    def __post_init__(self) -> None:
        arguments.size("width", self.width, least=0)
        if self.period is not None:
            arguments.at_least_one("period", self.period)

    def _period_and_width(self, grid: TokenGrid) -> tuple[int, int]:
        period = self.period or grid.frame_len
        return period, arguments.tokens(self.width, period)

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        period, width = self._period_and_width(grid)
        return (q.index % period - k.index % period).abs() <= width

    def rule(self, grid: TokenGrid) -> Rule:
        period, width = self._period_and_width(grid)
        return Band(Coordinate("index", modulus=period), before=width, after=width)


if __name__ == "__main__":
    from sparsereel.patterns.draw import main

    main(MultiDiagonal(width=0.1))
