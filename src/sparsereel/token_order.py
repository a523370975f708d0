"""Which order the tokens of a call are put in, so that the kernel has as little to do as it can.

Candidates are the model's own order, the tiles that the patterns prefer, and a general one; for the native CPU kernels,
which look inside blocks (sparsereel_kernels/cells.py), also tiles of one strip of keys. The order with the least work
over all heads wins; the model's own order wins a tie, since it costs nothing. Where a family knows how,
tokens are put in order once a forward; elsewhere every sparse call moves its q, k, v and output, which has to pay.
Heads whose pattern would be far less work in an order of its own (temporal heads in columns, beside spatial ones
in frames) are moved by themselves: the layout transformation of Sparse VideoGen (arXiv 2502.01776).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import torch

from sparsereel.families.base import layout_length
from sparsereel.families.layout import Layout, decode
from sparsereel.grid import Permutation, TokenGrid
from sparsereel.mask_cache import MaskCache
from sparsereel.patterns.base import Pattern
from sparsereel.plan_entries import Method
from sparsereel_kernels import BlockMask
from sparsereel_kernels.cost import work_share

BLOCK = (128, 64)
#: 256 tokens: two query blocks, four key blocks
GENERAL_TILE = (4, 8, 8)
#: 16 tokens, a strip of keys: near each other in the picture, or in the picture and in time
STRIP_TILES = ((1, 4, 4), (2, 4, 2))

Tile = tuple[int, int, int]

#: share of the work that an order put on in every call has to save
CALL_SAVING = 0.05

#: share of the work that another order than the general tile has to save where selectors choose blocks
SELECTOR_SAVING = 0.05

#: where the model's own order is so near the least work possible, no other is tried: masks of long clips take a second
SPARE = 0.05

#: an order of some heads' own has to save so many keys a query, and leave at most this share of the work
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


def best_tile(
    methods: Mapping[Method, int], grid: TokenGrid, *, every_call: bool = False, kernel: str = ""
) -> Tile | None:
    """The tile whose order is the least work, or None for the model's own order.

    Selectors choose blocks by the mean of their tokens, which says more where the tokens are near each other: with any
    of them another order than the general tile has to save SELECTOR_SAVING of the work, and where they hold more than
    half of the heads they decide.

    Args:
        methods: how many heads follow each pattern or selector.
        every_call: the order is put on in every call and not once a forward: it has to save CALL_SAVING of the work.
        kernel: the backend that will run; "" = one that pays for whole blocks.
    """
    patterns = {method: heads for method, heads in methods.items() if isinstance(method, Pattern)}
    selects = len(patterns) < len(methods)
    if 2 * sum(patterns.values()) < sum(methods.values()):
        return GENERAL_TILE if grid.seq_len > GENERAL_TILE[0] * GENERAL_TILE[1] * GENERAL_TILE[2] else None

    def work(tile: Tile | None) -> float:
        needed = sum(heads * work_in_order(pattern, grid, tile, kernel) for pattern, heads in patterns.items())
        if every_call and tile is None:
            needed *= 1 - CALL_SAVING
        if tile == GENERAL_TILE and selects:
            needed *= 1 - SELECTOR_SAVING
        return needed

    # No order does with less than the pairs that are allowed.
    allowed = sum(heads * _allowed(pattern, grid) for pattern, heads in patterns.items())
    if not selects and work(None) <= (1 + SPARE) * allowed:
        return None
    return min([None, *candidate_tiles(patterns, grid, kernel)], key=work)


def candidate_tiles(patterns: Iterable[Pattern], grid: TokenGrid, kernel: str) -> list[Tile]:
    """Tiles whose order may be better than the model's own."""
    preferred = [pattern.preferred_tile(grid) for pattern in patterns]
    strips = STRIP_TILES if kernel == "cpu" else ()
    return list(dict.fromkeys([*(tile for tile in preferred if tile is not None), GENERAL_TILE, *strips]))


def mask_in_order(patterns: tuple[Pattern, ...], grid: TokenGrid, tile: Tile | None) -> BlockMask | None:
    """The mask of heads with these patterns, tokens in the order of `tile`; None where all of them allow everything."""
    return MASKS.get(patterns, grid, block=BLOCK, order=None if tile is None else grid.tile_order(tile))


def best_mask(pattern: Pattern, grid: TokenGrid, kernel: str = "") -> BlockMask | None:
    """The pattern's mask in the order that `sparsify` gives to a model that follows this pattern everywhere."""
    return mask_in_order((pattern,), grid, best_tile({pattern: 1}, grid, kernel=kernel))


def work_in_order(pattern: Pattern, grid: TokenGrid, tile: Tile | None, kernel: str) -> float:
    """Work of a head with this pattern where tokens are in the order of `tile`, over that of a dense head."""
    return work_share(mask_in_order((pattern,), grid, tile), kernel)


def _allowed(pattern: Pattern, grid: TokenGrid) -> float:
    mask = mask_in_order((pattern,), grid, None)
    return 1.0 if mask is None else mask.token_density


@lru_cache(maxsize=4096)
def own_tile(pattern: Pattern, grid: TokenGrid, tile: Tile | None, kernel: str = "") -> Tile | None:
    """The order of a head with this pattern in a layer whose tokens are in that of `tile`: its own where that pays."""
    if grid.seq_len < OWN_TOKENS:
        return tile
    places = dict.fromkeys([None, pattern.preferred_tile(grid), tile])
    work = {place: work_in_order(pattern, grid, place, kernel) for place in places}
    best = min(places, key=lambda place: work[place])
    saved = (work[tile] - work[best]) * grid.seq_len
    return best if saved >= OWN_SAVING and work[best] <= OWN_SHARE * work[tile] else tile


def by_own_tile(
    patterns: Sequence[Pattern], grid: TokenGrid, tile: Tile | None, kernel: str = ""
) -> dict[Tile | None, list[int]]:
    """Numbers of the heads that run together, by the order that they run in; `tile` is the layer's."""
    groups: dict[Tile | None, list[int]] = {}
    for number, pattern in enumerate(patterns):
        groups.setdefault(own_tile(pattern, grid, tile, kernel), []).append(number)
    return groups


@lru_cache(maxsize=64)
def from_tile_to(layout: Layout, tile: Tile | None, place: Tile | None, device: torch.device) -> torch.Tensor:
    """int64 [1, 1, S]: where the tokens of the order of `place` stand in a sequence in that of `tile`."""
    identity = torch.arange(layout_length(layout))
    wanted = identity if place is None else tile_order(layout, place).indices
    found = wanted if tile is None else tile_order(layout, tile).inverse.indices[wanted]
    return found[None, None].to(device)


@torch.library.custom_op("sparsereel::token_order", mutates_args=())
def token_order(like: torch.Tensor, layout: list[int], tile: list[int], inverse: bool) -> torch.Tensor:
    """int64 indices (S,) of the call's token order (or back), on the device of `like`."""
    order = tile_order(tuple(layout), (tile[0], tile[1], tile[2]))
    return (order.inverse if inverse else order).indices.to(like.device, copy=True)


@token_order.register_fake
def _(like: torch.Tensor, layout: list[int], tile: list[int], inverse: bool) -> torch.Tensor:
    return torch.empty(layout_length(tuple(layout)), dtype=torch.int64, device=like.device)
