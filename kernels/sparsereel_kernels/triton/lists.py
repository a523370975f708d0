"""The mask's lists as the kernels take them: rows of work in order of cost, packed bits as words. Made once a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .primitives import Lists

if TYPE_CHECKING:
    from ..block_mask import BlockMask

WORD_DTYPES = {8: torch.int8, 16: torch.int16, 32: torch.int32}


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of blocks and what each visits.

    Attributes:
        lists: for the kernels.
        blocks: blocks along the rows (query blocks; key blocks in backward over keys).
        batch, heads: those of the mask, 1 where all are alike.
        longest: entries of the longest full list and of the longest partial list together.
        max_full, max_part: columns of the two index tables.
    """

    lists: Lists
    blocks: int
    batch: int
    heads: int
    longest: int
    max_full: int
    max_part: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """(blocks, mask_batch, mask_heads, max_full, max_part) as the kernels' SIZES name them."""
        return self.blocks, self.batch, self.heads, self.max_full, self.max_part


def dense_rows(lengths: tuple[int, int], tiles: tuple[int, int]) -> Rows:
    """Every tile of the first length visits every tile of the second; there are no lists to read."""
    nothing = Lists(None, None, None, None, None, None, None)
    return Rows(nothing, -(-lengths[0] // tiles[0]), 1, 1, -(-lengths[1] // tiles[1]), 0, 0)


def query_rows(mask: BlockMask, word: int) -> Rows:
    """Rows of query blocks; `word` is the bits of a word."""

    def make() -> Rows:
        order = order_of_cost(mask.kv_num_blocks + mask.full_kv_num_blocks)
        full, part = mask.full_kv_indices, mask.kv_indices
        tables = (mask.full_kv_num_blocks, full, mask.kv_num_blocks, part, mask.partial_tile)
        return _rows(order, tables, words_of(mask.partial_bits, word))

    return mask.cached(f"triton_query_rows_{word}", make)


def key_rows(mask: BlockMask, word: int, kv_heads: int) -> Rows:
    """Rows of key blocks from the transposed lists; heads that share keys are one row of work."""

    def make() -> Rows:
        turned = mask.transposed()
        counts = turned.q_num_blocks + turned.full_q_num_blocks
        batch, heads, blocks = counts.shape
        groups = kv_heads if heads > 1 else 1
        order = order_of_cost(counts.view(batch, groups, heads // groups, blocks).sum(2))
        tables = (turned.full_q_num_blocks, turned.full_q_indices, turned.q_num_blocks, turned.q_indices)
        return _rows(order, (*tables, turned.partial_tile), words_of(mask.partial_bits, word))

    return mask.cached(f"triton_key_rows_{word}_{kv_heads}", make)


def _rows(order: Tensor, tables: tuple[Tensor, ...], bits: Tensor) -> Rows:
    full_count, full, part_count, part, tile = (x.contiguous() for x in tables)
    batch, heads, blocks = full_count.shape
    lists = Lists(order, full_count, full, part_count, part, tile, bits)
    max_full, max_part = full.shape[-1], part.shape[-1]
    return Rows(lists, blocks, batch, heads, max_full + max_part, max_full, max_part)


def order_of_cost(visits: Tensor) -> Tensor:
    """int32 rows, flat, from many to few visits, so that a launch does not end on a long row.

    Costs are compared in steps of a factor of sqrt(2): rows of about equal cost stay in their order, so that
    neighbours, which read the same keys, run at the same time and find them in the cache.
    """
    step = torch.floor(2 * torch.log2(visits.flatten().clamp(min=1).to(torch.float32)))
    return step.argsort(descending=True, stable=True).to(torch.int32)


def words_of(bits: Tensor, word: int) -> Tensor:
    """The packed tiles [U, BQ, BK // 8] as words of 8, 16 or 32 bits."""
    bits = bits.contiguous()
    if bits.storage_offset() % (word // 8):
        bits = bits.clone()
    return bits.view(WORD_DTYPES[word])
