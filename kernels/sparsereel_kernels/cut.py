"""A rectangle of a BlockMask as a mask of its own: what one shard of the queries sees of one shard of the keys.

Shards need not begin where blocks do. A new block then lies over up to four old ones; equal sets of four give equal
tiles and are looked at once, so memory goes with the number of different tiles, never with queries times keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .bits import pack_bits, unpack_bits
from .block_lists import EMPTY, FULL, block_counts
from .block_mask import BlockMask

# Tiles that are unpacked at a time.
TILES_AT_ONCE = 256


def cut_mask(mask: BlockMask, queries: tuple[int, int], keys: tuple[int, int]) -> BlockMask:
    """The pairs of `mask` with queries and keys in the ranges (start, stop), counted from the starts.

    Raises:
        ValueError: a range that does not lie inside the mask.
    """
    for what, (start, stop), length in zip(("queries", "keys"), (queries, keys), mask.seq_lengths, strict=True):
        if not 0 <= start <= stop <= length:
            raise ValueError(f"{what} must be a range (start, stop) inside 0..{length}, got {(start, stop)}")
    lengths = queries[1] - queries[0], keys[1] - keys[0]
    counts = block_counts(lengths, mask.BLOCK_SIZE)
    offsets = queries[0] % mask.BLOCK_SIZE[0], keys[0] % mask.BLOCK_SIZE[1]
    four = _old_blocks(mask, (queries[0], keys[0]), counts, offsets)
    block_map = torch.where((four == FULL).all(-1), FULL, EMPTY).to(torch.int32)
    mixed = ~((four == FULL).all(-1) | (four == EMPTY).all(-1))
    different, row = torch.unique(four[mixed], dim=0, return_inverse=True)
    block_map[mixed] = row.to(torch.int32)
    bits = _tiles(mask, different, offsets)
    return BlockMask.from_block_map(block_map, bits, lengths, mask.BLOCK_SIZE)


def _old_blocks(mask: BlockMask, starts: tuple[int, int], counts: tuple[int, int], offsets: tuple[int, int]) -> Tensor:
    """int32 [B, H, nQ, nK, 4]: the old blocks under each new one, row by row. Those that it only touches repeat."""
    # One block past the end, for new blocks that hang over it: nothing there is inside the new sequence.
    old = F.pad(mask.block_map(), (0, 1, 0, 1), value=EMPTY)
    rows, columns = (
        start // size + torch.arange(count, device=old.device)
        for start, size, count in zip(starts, mask.BLOCK_SIZE, counts, strict=True)
    )
    down, right = (int(offset > 0) for offset in offsets)
    parts = [old[:, :, rows + i][..., columns + j] for i in (0, down) for j in (0, right)]
    return torch.stack(parts, -1)


def _tiles(mask: BlockMask, four: Tensor, offsets: tuple[int, int]) -> Tensor:
    """uint8 [U, BQ, BK // 8]: the window at `offsets` of the four old tiles of each row of `four` [U, 4]."""
    bits = mask.partial_bits
    (q_block, k_block), (down, right) = mask.BLOCK_SIZE, offsets
    # Negative rows count from the end: FULL (-2) is the tile of ones, EMPTY (-1) that of zeros.
    shape = (1, q_block, k_block // 8)
    known = torch.cat([bits, bits.new_full(shape, 255), bits.new_zeros(shape)])
    made = [bits[:0]]
    for part in four.split(TILES_AT_ONCE):
        tiles = unpack_bits(known[part.long()]).unflatten(1, (2, 2))
        whole = tiles.transpose(2, 3).reshape(-1, 2 * q_block, 2 * k_block)
        made.append(pack_bits(whole[:, down : down + q_block, right : right + k_block]))
    return torch.cat(made)
