"""How many kernel tiles a neighborhood visits: the count that tells its speed-up before anything runs.

A window of GNA (arXiv 2504.16922) is a product of one interval an axis, so tiles are counted axis by axis: for every
tile of queries the tiles of keys that the union of their intervals touches. The visited tiles of the whole are the
product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Axes = tuple[int, ...]


@dataclass(frozen=True)
class TileCount:
    """Tiles of one problem.

    Attributes:
        flop_bound: dense pairs over allowed pairs; no kernel is faster than that by skipping alone.
        tile_bound: all tiles over visited tiles; what a kernel that skips whole tiles can reach.
        fully_sparse: whether every visited tile lies inside every window, so that no tile needs a mask.
    """

    flop_bound: float
    tile_bound: float
    fully_sparse: bool

    @property
    def efficiency(self) -> float:
        """Share of the bound by FLOPs that whole tiles leave."""
        return self.tile_bound / self.flop_bound


def interval(query: int, length: int, window: int, stride: int) -> tuple[int, int]:
    """[start, stop) of the keys that one query of an axis sees: the window of its stride group's leader, moved inside.

    The leader of a group of `stride` queries is its centre-right one; even windows reach one further to the left.
    """
    leader = min(query // stride * stride + stride // 2, length - 1)
    start = min(max(leader - window // 2, 0), length - window)
    return start, start + window


def count_tiles(shape: Axes, window: Axes, stride: Axes, q_tile: Axes, kv_tile: Axes) -> TileCount:
    """Tiles that a neighborhood visits on a grid, with tokens of a tile side by side; ragged tiles at the far edges.

    Args:
        shape: tokens of each axis.
        window, stride: as `Neighborhood` has them, in tokens.
        q_tile, kv_tile: tokens of a tile of queries and of keys along each axis.

    Raises:
        ValueError: axes that differ in number, a window outside the axis, a stride outside the window.
    """
    if len({len(x) for x in (shape, window, stride, q_tile, kv_tile)}) != 1:
        raise ValueError("shape, window, stride, q_tile and kv_tile must have one number for each axis")
    visited, total, full = 1, 1, True
    for length, w, t, q, k in zip(shape, window, stride, q_tile, kv_tile, strict=True):
        if not 1 <= t <= w <= length:
            raise ValueError(f"an axis of {length} needs 1 <= stride <= window <= {length}, got {t} and {w}")
        seen, inside = _axis(length, w, t, q, k)
        visited *= seen
        total *= math.ceil(length / q) * math.ceil(length / k)
        full &= inside
    return TileCount(math.prod(shape) / math.prod(window), total / visited, full)


def _axis(length: int, window: int, stride: int, q_tile: int, kv_tile: int) -> tuple[int, bool]:
    """(pairs of tiles visited, whether every visited tile of keys is inside the window of every query of its tile)."""
    seen, inside = 0, True
    for first in range(0, length, q_tile):
        bounds = [interval(q, length, window, stride) for q in range(first, min(first + q_tile, length))]
        start, stop = min(b[0] for b in bounds), max(b[1] for b in bounds)
        tiles = range(start // kv_tile, math.ceil(stop / kv_tile))
        seen += len(tiles)
        reach = tiles.start * kv_tile, min(tiles.stop * kv_tile, length)
        inside &= all(b[0] <= reach[0] and reach[1] <= b[1] for b in bounds)
    return seen, inside
