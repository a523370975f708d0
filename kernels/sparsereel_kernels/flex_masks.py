"""Conversions between BlockMask and FlexAttention's BlockMask.

The lists mean the same in both. What a partial block allows is packed bits here and a function `mask_mod` there: one
way the function is evaluated on the partial blocks, the other way it looks bits up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

from .bits import pack_bits
from .block_lists import EMPTY, FULL, block_counts, check_block, valid_entries
from .block_mask import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Pairs that mask_mod is evaluated on at a time.
PAIRS_AT_ONCE = 1 << 22


def from_flex(mask: FlexBlockMask) -> BlockMask:
    """See `BlockMask.from_flex`."""
    block = check_block(mask.BLOCK_SIZE)
    lengths = (int(mask.seq_lengths[0]), int(mask.seq_lengths[1]))
    counts = block_counts(lengths, block)
    shape = (*mask.kv_num_blocks.shape[:2], *counts)
    block_map = torch.full(shape, EMPTY, dtype=torch.int32, device=mask.kv_num_blocks.device)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        block_map[_listed(mask.full_kv_num_blocks, mask.full_kv_indices)] = FULL
    partial = _listed(mask.kv_num_blocks, mask.kv_indices)
    block_map[partial] = torch.arange(partial[0].shape[0], dtype=torch.int32, device=block_map.device)
    return BlockMask.from_block_map(block_map, _evaluate(mask.mask_mod, partial, lengths, block), lengths, block)


def _listed(counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(batch, head, query block, key block) of every listed block."""
    batch, head, row, slot = valid_entries(counts, indices).nonzero().unbind(1)
    return batch, head, row, indices[batch, head, row, slot].long()


def _evaluate(
    mask_mod: MaskMod, places: tuple[Tensor, ...], lengths: tuple[int, int], block: tuple[int, int]
) -> Tensor:
    """Tiles [places, BQ, BK // 8] of `mask_mod` at (batch, head, query block, key block)."""
    per_key = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    per_pair = torch.vmap(torch.vmap(per_key, in_dims=(None, None, 0, None)), in_dims=(0, 0, 0, 0))
    device = places[0].device
    rows, columns = torch.arange(block[0], device=device), torch.arange(block[1], device=device)
    tiles = [torch.zeros(0, block[0], block[1] // 8, dtype=torch.uint8, device=device)]
    if places[0].shape[0] == 0:
        return tiles[0]
    for part in torch.arange(places[0].shape[0], device=device).split(max(1, PAIRS_AT_ONCE // (block[0] * block[1]))):
        batch, head, i, j = (x[part] for x in places)
        q_index, k_index = i[:, None] * block[0] + rows, j[:, None] * block[1] + columns
        # mask_mod may index tables of the sequence's length, so it never sees a token past the end.
        inside = (q_index < lengths[0])[:, :, None] & (k_index < lengths[1])[:, None]
        allowed = per_pair(batch, head, q_index.clamp(max=lengths[0] - 1), k_index.clamp(max=lengths[1] - 1))
        tiles.append(pack_bits(allowed.expand_as(inside) & inside))
    return torch.cat(tiles)


def to_flex(mask: BlockMask) -> FlexBlockMask:
    """See `BlockMask.to_flex`."""
    key_blocks = block_counts(mask.seq_lengths, mask.BLOCK_SIZE)[1]

    def widened(indices: Tensor) -> Tensor:
        # FlexAttention reads the number of key blocks from the width of its lists.
        return F.pad(indices, (0, key_blocks - indices.shape[-1]))

    return FlexBlockMask.from_kv_blocks(
        mask.kv_num_blocks,
        widened(mask.kv_indices),
        mask.full_kv_num_blocks,
        widened(mask.full_kv_indices),
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=_bits_mod(mask),
        seq_lengths=mask.seq_lengths,
    )


def _bits_mod(mask: BlockMask) -> MaskMod:
    """A mask_mod that looks the bits of `mask` up; exact in every block, not only in partial ones."""
    block_map, (block_q, block_k) = mask.block_map(), mask.BLOCK_SIZE
    count = mask.partial_bits.shape[0]
    # Room for a power of two: each other shape would be compiled anew.
    tiles = mask.partial_bits.new_zeros(1 << (count + 1).bit_length(), *mask.partial_bits.shape[1:])
    tiles[:count], tiles[count] = mask.partial_bits, 255
    # FULL and EMPTY are turned into rows of their own: generated code may not read negative indices.
    block_map = torch.where(block_map == FULL, count, torch.where(block_map == EMPTY, count + 1, block_map))
    many_samples, many_heads = mask.shape[0] > 1, mask.shape[1] > 1

    def bits_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        sample, head = b if many_samples else 0, h if many_heads else 0
        tile = block_map[sample, head, q_idx // block_q, kv_idx // block_k]
        octet = tiles[tile, q_idx % block_q, (kv_idx % block_k) // 8]
        return ((octet.to(torch.int32) >> (kv_idx % 8)) & 1) == 1

    return bits_mod
