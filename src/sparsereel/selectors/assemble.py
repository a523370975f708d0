"""From a map of chosen blocks to a BlockMask of full blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsereel_kernels import BlockMask


def to_block_mask(chosen: Tensor, length: int, block: tuple[int, int]) -> BlockMask:
    """The mask that visits exactly the chosen blocks, all of them full.

    `BlockMask.from_lists` would check what holds here by construction (columns ascend, blocks are full or absent), at
    several times the cost of the rest of a selector, so the lists are handed over as they are.

    Args:
        chosen: bool [B, H, nQ, nK].
        length: tokens of the sequence.
    """
    counts = chosen.sum(-1, dtype=torch.int32)
    longest = int(counts.max())
    columns = chosen.flatten(0, 2).nonzero()[:, 1].to(torch.int32)
    listed = torch.zeros(*counts.shape, longest, dtype=torch.int32, device=chosen.device)
    listed.masked_scatter_(torch.arange(longest, device=chosen.device) < counts[..., None], columns)
    none = torch.zeros(*counts.shape, 0, dtype=torch.int32, device=chosen.device)
    tensors = {
        "kv_num_blocks": torch.zeros_like(counts),
        "kv_indices": none,
        "full_kv_num_blocks": counts,
        "full_kv_indices": listed,
        "partial_tile": none,
        "partial_bits": torch.zeros(0, block[0], block[1] // 8, dtype=torch.uint8, device=chosen.device),
    }
    return BlockMask((length, length), block, tensors)
