"""Neighborhood attention: each query sees a window around it whose size never changes."""

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


@dataclass(frozen=True)
class Window:
    """The rule of one axis, in tokens, after clamping to the axis."""

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool

    def bounds(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """(first, last + 1) visible number inside the dilation group of q (q // dilation counts there)."""
        members = (self.length - q % self.dilation + self.dilation - 1) // self.dilation
        number = q // self.dilation
        if self.causal:
            return (number - self.window + 1).clamp(min=0), number + 1
        left, right = self.window // 2, self.window // 2 + self.window % 2 - 1
        leader = torch.minimum(number // self.stride * self.stride + self.stride // 2, members - 1)
        start = torch.where(leader + right >= members, members - self.window, (leader - left).clamp(min=0))
        return start, start + self.window

    def allowed(self, q: Tensor, k: Tensor) -> Tensor:
        start, stop = self.bounds(q)
        number = k // self.dilation
        return (q % self.dilation == k % self.dilation) & (start <= number) & (number < stop)


@dataclass(frozen=True, eq=False)
class Neighborhood(Pattern):
    """Generalized neighborhood attention (arXiv 2504.16922; NATTEN): on each axis query q sees exactly w keys.

        c     = min(floor(q / t) * t + floor(t / 2), L - 1)              the query that leads its stride group
        start = L - w  if c + floor(w/2) + w%2 - 1 >= L  else  max(c - floor(w/2), 0)
        keys  = start .. start + w - 1

    L length of the axis, w window, t stride. With dilation r the rule holds inside each residue class modulo r. The
    window shifts at the borders, it never shrinks. On a causal axis keys = max(q - w + 1, 0) .. q. A pair is allowed
    if all three axes allow it, so the density is the product of w / L (not causal, text aside). Stride = window gives
    blocked attention, stride = tile and a window of an odd number of tiles gives sliding tile attention.

    Args:
        window: Tokens, or a fraction of the axis (a float), for all axes or (frames, height, width). Larger sees more.
            A window larger than the axis is clamped to it; a fraction is rounded to an odd number of strides.
        stride: Queries that share a window, 1 <= stride <= window. More makes blocks fuller and windows less centred.
        dilation: Step between visible keys. Lowered where window x dilation would exceed the axis.
        causal: Whether an axis looks only back; such an axis has stride 1.

    Raises:
        ValueError: sizes below 1, a stride above the window, a stride on a causal axis.
    """

    window: Size | tuple[Size, Size, Size]
    stride: int | tuple[int, int, int] = 1
    dilation: int | tuple[int, int, int] = 1
    causal: bool | tuple[bool, bool, bool] = False

    name: ClassVar[str] = "neighborhood"
    sees_itself: ClassVar[bool] = True

    def __post_init__(self) -> None:
        windows = arguments.axes("window", self.window, arguments.size)
        strides = arguments.axes("stride", self.stride, arguments.at_least_one)
        dilations = arguments.axes("dilation", self.dilation, arguments.at_least_one)
        causal = arguments.axes("causal", self.causal, arguments.flag)
        for window, stride, past in zip(windows, strides, causal, strict=True):
            if isinstance(window, int) and stride > window:
                raise ValueError(f"stride must not exceed the window, got stride {stride} with window {window}")
            if past and stride > 1:
                raise ValueError(f"a causal axis needs stride 1, got stride {stride}")
        arguments.store(self, window=windows, stride=strides, dilation=dilations, causal=causal)

    def windows(self, grid: TokenGrid) -> tuple[Window, ...]:
        """The rule of each axis of this grid, in tokens."""
        given = zip(
            grid.shape,
            *(arguments.three(v) for v in (self.window, self.stride, self.dilation, self.causal)),
            strict=True,
        )
        return tuple(_window(*axis) for axis in given)

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        frames, rows, columns = self.windows(grid)
        return frames.allowed(q.t, k.t) & rows.allowed(q.h, k.h) & columns.allowed(q.w, k.w)

    def rule(self, grid: TokenGrid) -> Rule:
        leaves = []
        for coordinate, window in zip((FRAME, ROW, COLUMN), self.windows(grid), strict=True):
            axis = torch.arange(window.length)
            leaves.append(Axis(coordinate, window.allowed(axis[:, None], axis[None])))
        return Both(tuple(leaves))

    def preferred_tile(self, grid: TokenGrid) -> tuple[int, int, int] | None:
        strides = tuple(min(window.stride, window.length) for window in self.windows(grid))
        return None if max(strides) == 1 else (strides[0], strides[1], strides[2])


def _window(length: int, window: Size, stride: int, dilation: int, causal: bool) -> Window:
    if isinstance(window, float):
        window = length if window == 1.0 else arguments.odd_units(window, length, stride) * stride
    window = min(window, length)
    return Window(length, window, min(stride, window), min(dilation, length // window), causal)


if __name__ == "__main__":
    from sparsereel.patterns.draw import main

    main(Neighborhood(window=(3, 5, 5)))
