"""Scores that several selectors share: means of blocks, and products of means."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsereel.selectors.partition import Partition


def block_means(x: Tensor, block: int, sizes: Tensor, valid: Tensor | None = None) -> Tensor:
    """Means over the valid tokens of each block.

    Args:
        x: [B, H, S, D].
        sizes: int64 [B or 1, n], valid tokens of each block; a block without any has mean 0.
        valid: bool [B or 1, S]; None where only the end of the sequence cuts blocks short.

    Returns:
        fp32 [B, H, n, D].
    """
    return block_sums(x, block, valid) / sizes.clamp(min=1)[:, None, :, None]


def block_sums(x: Tensor, block: int, valid: Tensor | None = None) -> Tensor:
    """fp32 [B, H, n, D]: sums of [B, H, S, D] over blocks of tokens; the last may be short."""
    if valid is not None:
        x = x.masked_fill(~valid[:, None, :, None], 0)
    whole = x.shape[2] // block
    parts = []
    if whole:
        parts.append(_sum_of_rows(x[:, :, : whole * block].unflatten(2, (whole, block))))
    if x.shape[2] > whole * block:
        parts.append(x[:, :, whole * block :].sum(2, keepdim=True, dtype=torch.float32))
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _sum_of_rows(x: Tensor) -> Tensor:
    """fp32 [B, H, n, D] sums of [B, H, n, rows, D]."""
    if x.dtype not in (torch.bfloat16, torch.float16) or not x.is_contiguous():
        return x.sum(3, dtype=torch.float32)
    # A product sums in fp32 and rounds once, several times faster than a sum that widens first. As a mean it cannot
    # leave the range of fp16.
    mean = torch.full((1, x.shape[3]), 1 / x.shape[3], dtype=x.dtype, device=x.device) @ x
    return mean[..., 0, :].float() * x.shape[3]


def pooled(q: Tensor, k: Tensor, cut: Partition) -> tuple[Tensor, Tensor]:
    """Block means fp32 [B, H, nQ, D] and [B, Hkv, nK, D]."""
    valid = cut.valid_tokens if cut.padded else None
    q_means = block_means(q, cut.block[0], cut.q_sizes, valid)
    return q_means, block_means(k, cut.block[1], cut.k_sizes, valid)


def products(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`scale * q k^T` [B, H, n, m] of [B, H, n, D] and [B, Hkv, m, D]; query heads share key heads."""
    return (q * scale) @ for_heads(k, q.shape[1]).transpose(-1, -2)


def for_heads(k: Tensor, heads: int) -> Tensor:
    """[B, Hkv, ...] repeated to [B, heads, ...]."""
    ratio = heads // k.shape[1]
    return k if ratio == 1 else k.repeat_interleave(ratio, 1)


def softmax_over(scores: Tensor, competing: Tensor | None) -> Tensor:
    """fp32 softmax over the last dimension among `competing` (None = all); 0 elsewhere and in rows without any."""
    if competing is None:
        return torch.softmax(scores, -1, dtype=torch.float32)
    scores = scores.float()
    return torch.softmax(scores.masked_fill(~competing, -torch.inf), -1).nan_to_num_(0.0)
