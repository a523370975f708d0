"""Sink frames: every query sees the first frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.patterns.base import Pattern
from sparsereel.patterns.layout import FRAME, Tokens
from sparsereel.patterns.rules import Axis, Rule


@dataclass(frozen=True, eq=False)
class Sink(Pattern):
    """Every query sees the first frames: allowed if t_k < frames. Meant for `|`, as in `temporal | sink`.

    Video models anchor content and look in the first frame; Radial Attention (arXiv 2506.19852) and Sparse VideoGen
    (arXiv 2502.01776) keep it for Wan. In an image the first frame is everything.

    Args:
        frames: Number of first frames. More than the video has means all.

    Raises:
        ValueError: fewer than 1 frame.
    """

    frames: int = 1

    name: ClassVar[str] = "sink"

    def __post_init__(self) -> None:
        arguments.at_least_one("frames", self.frames)

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        return (k.t < self.frames).expand(torch.broadcast_shapes(q.t.shape, k.t.shape))

    def rule(self, grid: TokenGrid) -> Rule:
        return Axis(FRAME, (torch.arange(grid.frames) < self.frames).expand(grid.frames, -1))


if __name__ == "__main__":
    from sparsereel.patterns.draw import main

    main(Sink())
