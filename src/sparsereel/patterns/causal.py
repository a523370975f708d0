"""Frame-causal attention: blocks of frames see themselves and the past."""

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
class Causal(Pattern):
    """Blocks of frames see themselves and the past: allowed if floor(t_k / b) <= floor(t_q / b), b = block_frames.

    Args:
        block_frames: Frames of a block, in tokens. More than the video has means full attention.

    Raises:
        ValueError: a block below 1 frame.
    """

    block_frames: int = 1

    name: ClassVar[str] = "causal"
    sees_itself: ClassVar[bool] = True

    def __post_init__(self) -> None:
        arguments.at_least_one("block_frames", self.block_frames)

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        return k.t // self.block_frames <= q.t // self.block_frames

    def rule(self, grid: TokenGrid) -> Rule:
        number = torch.arange(grid.frames) // self.block_frames
        return Axis(FRAME, number[None] <= number[:, None])


if __name__ == "__main__":
    from sparsereel.patterns.draw import main

    main(Causal())
