"""Which order the tokens of a call are put in, so that blocks of the plan's patterns are as full as they can be.

Candidates are the model's own order, the tiles that the patterns prefer, and a general one. The order that visits the
fewest blocks over all heads wins; the model's own order wins a tie, since it costs nothing. Where a family knows how,
tokens are put in order once a forward; elsewhere every sparse call moves its q, k, v and output, which has to pay.
Heads whose pattern would visit far fewer blocks in an order of its own (temporal heads in columns, beside spatial ones
in frames) are moved by themselves: the layout transformation of Sparse VideoGen (arXiv 2502.01776).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch

from sparsereel.families.base import layout_length
from sparsereel.families.layout import Layout, decode
from sparsereel.grid import Permutation, TokenGrid
from sparsereel.mask_cache import MaskCache
from sparsereel.patterns.base import Pattern
from sparsereel.plan_entries import Method

BLOCK = (128, 64)
#: 256 tokens: two query blocks, four key blocks
GENERAL_TILE = (4, 8, 8)

Tile = tuple[int, int, int]

#: share of the blocks that an order put on in every call has to save
CALL_SAVING = 0.05

#: an order of some heads' own has to save so many keys a query, and leave at most this share of the blocks
OWN_SAVING, OWN_SHARE = 256, 0.7
#: below so many tokens a launch more costs what it saves
OWN_TOKENS = 4096

MASKS = MaskCache()


@lru_cache(maxsize=64)
def tile_order(layout: Layout, tile: Tile) -> Permutation:
    """Tile order of a call's tokens: tokens of one 3-D tile side by side."""
    return decode(layout).tile_order(tile)


@lru_cache(maxsize=64)
def outside_video(layout: Layout, tile: Tile | None) -> torch.Tensor:
    """bool (S,): text and conditions, in the order of the call's tokens."""
    outside = decode(layout).video_index() < 0
    return outside if tile is None else outside[tile_order(layout, tile).indices]


def best_tile(methods: Mapping[Method, int], grid: TokenGrid, *, every_call: bool = False) -> Tile | None:
    """The tile whose order visits the fewest blocks, or None for the model's own order.

    Selectors choose blocks by the mean of their tokens, which says more where the tokens are near each other: they vote
    for tiles, and decide where they hold more than half of the heads.

    Args:
        methods: how many heads follow each pattern or selector.
        every_call: the order is put on in every call and not once a forward: it has to save CALL_SAVING of the blocks.
    """
    patterns = {method: heads for method, heads in methods.items() if isinstance(method, Pattern)}
    if 2 * sum(patterns.values()) < sum(methods.values()):
        return GENERAL_TILE if grid.seq_len > GENERAL_TILE[0] * GENERAL_TILE[1] * GENERAL_TILE[2] else None
    preferred = [pattern.preferred_tile(grid) for pattern in patterns]
    tiles = dict.fromkeys([tile for tile in preferred if tile is not None] + [GENERAL_TILE])
    best, fewest = None, (1 - CALL_SAVING * every_call) * _visited(patterns, grid, None)
    for tile in tiles:
        visited = _visited(patterns, grid, grid.tile_order(tile))
        if visited < fewest:
            best, fewest = tile, visited
    return best


@lru_cache(maxsize=4096)
def own_tile(pattern: Pattern, grid: TokenGrid, tile: Tile | None) -> Tile | None:
    """The order of a head with this pattern in a layer whose tokens are in that of `tile`: its own where that pays."""
    if grid.seq_len < OWN_TOKENS:
        return tile
    places = dict.fromkeys([None, pattern.preferred_tile(grid), tile])
    visited = {place: _density(pattern, grid, grid.tile_order(place) if place else None) for place in places}
    best = min(places, key=lambda place: visited[place])
    saved = (visited[tile] - visited[best]) * grid.seq_len
    return best if saved >= OWN_SAVING and visited[best] <= OWN_SHARE * visited[tile] else tile


def by_own_tile(patterns: Sequence[Pattern], grid: TokenGrid, tile: Tile | None) -> dict[Tile | None, list[int]]:
    """Numbers of the heads that run together, by the order that they run in; `tile` is the layer's."""
    groups: dict[Tile | None, list[int]] = {}
    for number, pattern in enumerate(patterns):
        groups.setdefault(own_tile(pattern, grid, tile), []).append(number)
    return groups


@lru_cache(maxsize=64)
def from_tile_to(layout: Layout, tile: Tile | None, place: Tile | None, device: torch.device) -> torch.Tensor:
    """int64 [1, 1, S]: where the tokens of the order of `place` stand in a sequence in that of `tile`."""
    identity = torch.arange(layout_length(layout))
    wanted = identity if place is None else tile_order(layout, place).indices
    found = wanted if tile is None else tile_order(layout, tile).inverse.indices[wanted]
    return found[None, None].to(device)


def _visited(patterns: Mapping[Pattern, int], grid: TokenGrid, order: Permutation | None) -> float:
    return sum(heads * _density(pattern, grid, order) for pattern, heads in patterns.items())


def _density(pattern: Pattern, grid: TokenGrid, order: Permutation | None) -> float:
    mask = MASKS.get((pattern,), grid, block=BLOCK, device=torch.device("cpu"), order=order)
    return 1.0 if mask is None else mask.density


@torch.library.custom_op("sparsereel::token_order", mutates_args=())
def token_order(like: torch.Tensor, layout: list[int], tile: list[int], inverse: bool) -> torch.Tensor:
    """int64 indices (S,) of the call's token order (or back), on the device of `like`."""
    order = tile_order(tuple(layout), (tile[0], tile[1], tile[2]))
    return (order.inverse if inverse else order).indices.to(like.device, copy=True)


@token_order.register_fake
def _(like: torch.Tensor, layout: list[int], tile: list[int], inverse: bool) -> torch.Tensor:
    return torch.empty(layout_length(tuple(layout)), dtype=torch.int64, device=like.device)
