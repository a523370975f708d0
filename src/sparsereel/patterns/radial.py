"""Radial attention: the window of a pair of frames halves each time their distance doubles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.patterns.base import Pattern, distance
from sparsereel.patterns.layout import FRAME, PLACE, Coordinate, Tokens
from sparsereel.patterns.radial_released import BLOCK, released_blocks
from sparsereel.patterns.rules import Axis, Band, Both, Either, Rule

FLAVOURS = ("paper", "released")


@dataclass(frozen=True, eq=False)
class Radial(Pattern):
    """Radial attention (arXiv 2506.19852): the energy of attention falls with distance in time and space.

    For a query at place a of frame i and a key at place b of frame j, with D = |i - j| and s tokens a frame:

        w(D) = floor(decay * s / 2^floor(log2 D))       a whole frame for D <= 1
        allowed if  |a - b| + 1 <= w(D)                                              where w(D) >= 1
                or  a = b  and  D mod ceil(2^floor(log2 D) / (decay * s)) = 0        where w(D) = 0
                or  j < sink_frames

    so the tokens kept grow as n log n with the number of frames. The flavour "released" reproduces the block mask
    that the authors' code builds (blocks of 128 tokens, majority votes; see radial_released.py) instead of the
    formula.

    Args:
        decay: Factor on the windows of frames further apart than 1. Larger keeps more.
        sink_frames: First frames that every query sees whole; 0 = none.
        flavour: "paper" or "released".

    Raises:
        ValueError: decay not above 0, negative sink_frames, unknown flavour.
    """

    decay: float = 1.0
    sink_frames: int = 1
    flavour: str = "paper"

    name: ClassVar[str] = "radial"
    sees_itself: ClassVar[bool] = True

    def __post_init__(self) -> None:
        arguments.store(self, decay=arguments.positive("decay", self.decay))
        arguments.whole("sink_frames", self.sink_frames, least=0)
        arguments.one_of("flavour", self.flavour, FLAVOURS)

    def reach(self, grid: TokenGrid) -> Tensor:
        """[frames] by frame distance: the largest |a - b| allowed; -1 where the pair of frames is dropped."""
        reach = [_reach(d, grid.frame_len, self.decay) for d in range(grid.frames)]
        return torch.tensor(reach)

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        if self.flavour == "released":
            blocks = self._released(grid)
            return blocks[q.index.clamp(min=0) // BLOCK, k.index.clamp(min=0) // BLOCK]
        near = (q.place - k.place).abs() <= self.reach(grid)[(q.t - k.t).abs().clamp(max=grid.frames - 1)]
        return near | (k.t < self.sink_frames)

    def rule(self, grid: TokenGrid) -> Rule:
        if self.flavour == "released":
            return Axis(Coordinate("index", divisor=BLOCK), self._released(grid))
        whole = grid.frame_len - 1
        reach = self.reach(grid)[distance(grid.frames)]
        sink = torch.arange(grid.frames) < self.sink_frames
        parts: list[Rule] = [Axis(FRAME, (reach >= whole) | sink)]
        for width in sorted({int(w) for w in reach.unique()} - {-1}):
            if width < whole:
                parts.append(Both((Axis(FRAME, reach == width), Band(PLACE, before=width, after=width))))
        return Either(tuple(parts))

    def _released(self, grid: TokenGrid) -> Tensor:
        return released_blocks(grid.frames, grid.frame_len, self.decay, self.sink_frames)


def _reach(frames_apart: int, frame_len: int, decay: float) -> int:
    if frames_apart <= 1:
        return frame_len - 1
    octave = 2.0 ** math.floor(math.log2(frames_apart))
    # The small term keeps products such as 0.29 * 100 on the right side of the whole number.
    width = math.floor(decay * frame_len / octave + 1e-9)
    if width >= 1:
        return min(width, frame_len) - 1
    every = math.ceil(octave / (decay * frame_len) - 1e-9)
    return 0 if frames_apart % every == 0 else -1


if __name__ == "__main__":
    from sparsereel.patterns.draw import main

    main(Radial())
