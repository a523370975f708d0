"""What the torch backend walks over: for each row (a query block of one head) the key blocks to visit, in chunks.

Full and partial lists are joined, full ones first, so that a chunk of rows needs bits only in its last columns. Rows
are sorted by length, so that a chunk of neighbours wastes little on padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .block_lists import EMPTY, FULL, block_counts, valid_entries
from .block_mask import BlockMask


@dataclass(frozen=True, eq=False)
class Visits:
    """Joined lists; B and H are 1 or real.

    Attributes:
        block: (query, key) block in tokens.
        index: [B, H, nQ, longest] int32 key blocks, 0 past the total.
        tile: [B, H, nQ, longest] int32: FULL, a row of `bits`, or EMPTY past the total.
        full, total: [B, H, nQ] int32 counts.
        bits: [U + 2, BQ, BK // 8] uint8 tiles; then FULL's and EMPTY's, which negative rows reach from the end.
    """

    block: tuple[int, int]
    index: Tensor
    tile: Tensor
    full: Tensor
    total: Tensor
    bits: Tensor


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows that are worked on together, and the stretch of their lists.

    Attributes:
        rows: [n] int64, head * nQ + query block within the group.
        index, tile: [n, w] of these rows' lists; `tile` is looked at from column `bits_from` on.
        only: this stretch is all that its rows have.
    """

    rows: Tensor
    index: Tensor
    tile: Tensor
    bits_from: int
    only: bool


def visits_of(mask: BlockMask) -> Visits:
    """The joined lists of `mask`; made once."""
    return mask.cached("visits", lambda: _join(mask))


def _join(mask: BlockMask) -> Visits:
    full, partial = mask.full_kv_num_blocks, mask.kv_num_blocks
    total = full + partial
    longest = int(total.max()) if total.numel() else 0
    index = total.new_zeros(*total.shape, longest)
    tile = torch.full_like(index, EMPTY)
    width = mask.full_kv_indices.shape[-1]
    index[..., :width] = mask.full_kv_indices
    tile[..., :width][valid_entries(full, mask.full_kv_indices)] = FULL
    batch, head, block, slot = valid_entries(partial, mask.kv_indices).nonzero().unbind(1)
    place = (batch, head, block, full[batch, head, block] + slot)
    index[place] = mask.kv_indices[batch, head, block, slot]
    tile[place] = mask.partial_tile[batch, head, block, slot]
    return Visits(mask.BLOCK_SIZE, index, tile, full, total, _with_whole_tiles(mask.partial_bits))


def _with_whole_tiles(bits: Tensor) -> Tensor:
    one = bits.new_full((1, *bits.shape[1:]), 255)
    return torch.cat([bits, one, torch.zeros_like(one)])


def dense_visits(seq_lengths: tuple[int, int], block: tuple[int, int], device: torch.device) -> Visits:
    """Every query block visits every key block."""
    q_blocks, k_blocks = block_counts(seq_lengths, block)
    index = torch.arange(k_blocks, dtype=torch.int32, device=device).expand(1, 1, q_blocks, k_blocks)
    count = torch.full((1, 1, q_blocks), k_blocks, dtype=torch.int32, device=device)
    no_bits = torch.zeros(0, block[0], block[1] // 8, dtype=torch.uint8, device=device)
    return Visits(block, index, torch.full_like(index, FULL), count, count, _with_whole_tiles(no_bits))


def chunks(visits: Visits, sample: int, heads: range, pairs: int) -> Iterator[list[Chunk]]:
    """Chunks of the rows of some heads of a sample, longest lists first; rows without key blocks are left out.

    Each item is a list of stretches of the same rows; more than one where a single row's list exceeds the limit.

    Args:
        sample, heads: which part of the lists.
        pairs: most (query, key) pairs of tokens in a chunk.
    """
    index, tile = (_part(x, sample, heads) for x in (visits.index, visits.tile))
    full, total = (_part(x, sample, heads) for x in (visits.full, visits.total))
    order = (total.long() * (index.shape[-1] + 1) + full).argsort(descending=True, stable=True)
    totals, fulls = total[order].tolist(), full[order].tolist()
    most_blocks = max(1, pairs // (visits.block[0] * visits.block[1]))
    start = 0
    while start < len(totals) and totals[start] > 0:
        width = totals[start]
        rows = order[start : start + max(1, most_blocks // width)]
        least_full = min(fulls[start : start + rows.shape[0]])
        row_index, row_tile = index[rows, :width], tile[rows, :width]
        yield [
            Chunk(
                rows,
                row_index[:, begin : begin + most_blocks],
                row_tile[:, begin : begin + most_blocks],
                min(max(least_full - begin, 0), most_blocks, width - begin),
                most_blocks >= width,
            )
            for begin in range(0, width, most_blocks)
        ]
        start += rows.shape[0]


def _part(x: Tensor, sample: int, heads: range) -> Tensor:
    """[len(heads) * nQ, ...] lists of some heads of one sample."""
    x = x[sample if x.shape[0] > 1 else 0]
    x = x[heads.start : heads.stop] if x.shape[0] > 1 else x.expand(len(heads), *x.shape[1:])
    return x.flatten(0, 1)
