"""The exact attention mass of every block: a whole dense q k^T, a few rows of blocks at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsereel.selectors.partition import NUMBERS_AT_ONCE, Partition
from sparsereel.selectors.scores import block_sums, for_heads


def block_mass(q: Tensor, k: Tensor, cut: Partition, scale: float, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean attention of each query block's valid rows on each candidate block.

    Args:
        q, k: [B, H, S, D], [B, Hkv, S, D].
        lse: fp32 [B, H, S], log-sum-exp of each row from an earlier step; None computes it.

    Returns:
        fp32 mass [B, H, nQ, nK] (rows sum to 1 with an exact lse), and the lse used.
    """
    heads, (bq, bk) = q.shape[1], cut.block
    keys = for_heads(k, heads).transpose(-1, -2)
    competing, valid = cut.candidate_tokens, cut.valid_tokens
    per_row = q.shape[0] * heads * cut.length
    at_once = max(1, NUMBERS_AT_ONCE // (per_row * bq)) * bq
    masses, sums = [], []
    for start in range(0, cut.length, at_once):
        rows = slice(start, min(start + at_once, cut.length))
        logits = ((q[:, :, rows] * scale) @ keys).float().masked_fill_(~competing, -torch.inf)
        found = logits.logsumexp(-1) if lse is None else lse[:, :, rows]
        sums.append(found)
        # Rows without any competitor have lse -inf and weigh nothing.
        weights = logits.sub_(found.masked_fill(found == -torch.inf, 0)[..., None]).exp_()
        by_block = block_sums(weights, bq, valid[:, rows] if cut.padded else None)
        padding = cut.counts[1] * bk - cut.length
        masses.append(F.pad(by_block, (0, padding)).unflatten(3, (cut.counts[1], bk)).sum(4))
    mass = torch.cat(masses, 2) / cut.q_sizes.clamp(min=1)[:, None, :, None]
    return mass, torch.cat(sums, 2)


def probe_cost(length: int, heads: int, head_dim: int) -> float:
    """Operations of a dense q k^T and of its softmax: heads * S^2 * (2 D + 4)."""
    return float(heads * length**2 * (2 * head_dim + 4))
