"""Means of tokens over cells of a grid, and back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparsereel.grid import TokenGrid

Cell = tuple[int, int, int]


def pool_cells(x: Tensor, grid: TokenGrid, cell: Cell) -> Tensor:
    """(B, H, cells, D): means of the video tokens of x (B, H, S, D) over cells of (frames, rows, columns).

    Cells at the far borders may hold fewer tokens; their mean is that of the tokens they hold.
    """
    volume = _volume(x, grid)
    pooled = F.avg_pool3d(volume, cell, ceil_mode=True, count_include_pad=False)
    return pooled.flatten(2).transpose(1, 2).unflatten(0, x.shape[:2])


def cells_of(grid: TokenGrid, cell: Cell) -> Cell:
    """Cells along each axis."""
    a, b, c = (-(-length // size) for length, size in zip(grid.shape, cell, strict=True))
    return a, b, c


def spread_cells(x: Tensor, grid: TokenGrid, cell: Cell) -> Tensor:
    """(B, H, video tokens, D): cells x (B, H, cells, D) brought back to the grid, linearly between their centres."""
    shape = cells_of(grid, cell)
    volume = x.flatten(0, 1).transpose(1, 2).unflatten(2, shape)
    grown = F.interpolate(volume.float(), size=grid.shape, mode="trilinear", align_corners=False).to(x.dtype)
    return grown.flatten(2).transpose(1, 2).unflatten(0, x.shape[:2])


def _volume(x: Tensor, grid: TokenGrid) -> Tensor:
    """(B * H, D, frames, rows, columns) of the video tokens of (B, H, S, D)."""
    video = x[:, :, grid.video_start : grid.video_start + grid.video_len]
    return video.flatten(0, 1).transpose(1, 2).unflatten(2, grid.shape)
