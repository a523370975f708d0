"""Attention inside groups of tokens: contiguous regions of the picture, or views of all of it with every n-th token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns.base import Pattern
from sparsereel.patterns.layout import COLUMN, ROW, Tokens
from sparsereel.patterns.rules import Axis, Both, Rule


@dataclass(frozen=True, eq=False)
class Regions(Pattern):
    """Tokens see those of their own region, in all frames: allowed if both axes put query and key in the same group.

        contiguous: group(y) = ((y - shift) mod L) // ceil(L / n)        strided: group(y) = y mod n

    L length of the axis, n regions along it. A shift wraps around at the border, so that pieces of opposite borders
    share a region, as in HiDiffusion. Shares 1 / n of the work along each axis.

    Args:
        rows, columns: regions along each axis; clamped to its length.
        shift: (rows, columns) by which the contiguous regions are moved, in tokens.
        strided: every n-th row and column is a group, which is a coarse view of the whole picture.

    Raises:
        ValueError: fewer than one region.
    """

    rows: int
    columns: int
    shift: tuple[int, int] = (0, 0)
    strided: bool = False

    name: ClassVar[str] = "regions"
    sees_itself: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"regions needs at least one row and column of regions, got {self.rows} x {self.columns}")

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        rows = self._group(q.h, grid.height, 0) == self._group(k.h, grid.height, 0)
        return rows & (self._group(q.w, grid.width, 1) == self._group(k.w, grid.width, 1))

    def rule(self, grid: TokenGrid) -> Rule:
        leaves = []
        for axis, (coordinate, length) in enumerate(((ROW, grid.height), (COLUMN, grid.width))):
            group = self._group(torch.arange(length), length, axis)
            leaves.append(Axis(coordinate, group[:, None] == group[None]))
        return Both(tuple(leaves))

    def groups(self, grid: TokenGrid, device: torch.device) -> tuple[Tensor, ...]:
        """int64 (regions of one size, tokens a region) for each size; every token of a one-segment grid is in one."""
        return _groups(self.rows, self.columns, self.shift, self.strided, grid, device)

    def _group(self, place: Tensor, length: int, axis: int) -> Tensor:
        regions = min((self.rows, self.columns)[axis], length)
        if self.strided:
            return place % regions
        return (place - self.shift[axis]) % length // -(-length // regions)


@lru_cache(maxsize=64)
def _groups(
    rows: int, columns: int, shift: tuple[int, int], strided: bool, grid: TokenGrid, device: torch.device
) -> tuple[Tensor, ...]:
    pattern = Regions(rows, columns, shift, strided)
    tokens = Tokens.of(grid)
    number = pattern._group(tokens.h, grid.height, 0) * grid.width + pattern._group(tokens.w, grid.width, 1)
    by_size: dict[int, list[Tensor]] = {}
    for value in number.unique():
        members = (number == value).nonzero().flatten()
        by_size.setdefault(members.numel(), []).append(members)
    # Kept for later calls, which may want gradients.
    with torch.inference_mode(False):
        return tuple(torch.stack(groups).to(device) for groups in by_size.values())


def attend_in_groups(q: Tensor, k: Tensor, v: Tensor, groups: tuple[Tensor, ...], scale: float) -> Tensor:
    """torch's own attention of q, k, v (B, H, S, D) inside each group: regions of one size together, as a batch."""
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = q.new_empty(*q.shape[:3], v.shape[3])
    for members in groups:
        flat = members.flatten()
        # (B, H, regions, tokens, D) with regions taken into the batch
        here_q, here_k, here_v = (
            x[:, :, flat].unflatten(2, members.shape).transpose(1, 2).flatten(0, 1) for x in (q, k, v)
        )
        here = F.scaled_dot_product_attention(here_q, here_k, here_v, scale=scale)
        here = here.unflatten(0, (q.shape[0], members.shape[0])).transpose(1, 2).flatten(2, 3)
        out = out.index_copy(2, flat, here)
    return out
