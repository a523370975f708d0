"""The exact attention mass of every block: a whole dense q k^T, a few rows of blocks at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsereel.selectors.partition import Partition, numbers_at_once
from sparsereel.selectors.scores import block_sums, for_heads, softmax_over

Weigh = Callable[[Tensor, slice], Tensor]


def block_mass(q: Tensor, k: Tensor, cut: Partition, scale: float, weigh: Weigh | None = None) -> Tensor:
    """Mean attention of each query block's valid rows on each candidate block.

    Args:
        q, k: [B, H, S, D], [B, Hkv, S, D].
        weigh: (logits [B, H, rows, S], -inf where not competing; rows) -> fp32 weights; None = softmax.

    Returns:
        fp32 [B, H, nQ, nK]; rows sum to 1 under softmax.
    """
    heads, (bq, bk) = q.shape[1], cut.block
    keys = for_heads(k, heads).transpose(-1, -2)
    competing, valid = cut.candidate_tokens, cut.valid_tokens
    per_row = q.shape[0] * heads * cut.length
    at_once = max(1, numbers_at_once(q) // (per_row * bq)) * bq
    masses = []
    for start in range(0, cut.length, at_once):
        rows = slice(start, min(start + at_once, cut.length))
        logits = (q[:, :, rows] * scale) @ keys
        if weigh is None:
            weights = softmax_over(logits, None if cut.all_compete else competing)
        else:
            logits = logits if cut.all_compete else logits.float().masked_fill_(~competing, -torch.inf)
            weights = weigh(logits, rows)
        by_block = block_sums(weights, bq, valid[:, rows] if cut.padded else None)
        padding = cut.counts[1] * bk - cut.length
        masses.append(F.pad(by_block, (0, padding)).unflatten(3, (cut.counts[1], bk)).sum(4))
    return torch.cat(masses, 2) / cut.q_sizes.clamp(min=1)[:, None, :, None]


def probe_cost(length: int, heads: int, head_dim: int) -> float:
    """Operations of a dense q k^T and of its softmax: heads * S^2 * (2 D + 4)."""
    return float(heads * length**2 * (2 * head_dim + 4))
