"""Key-padding masks (B, 1, 1, keys) as what kernels take: key lengths where the kept keys are a prefix, else a bias."""

from __future__ import annotations

import torch

from sparsereel_kernels import KeyBias


def lengths_of(attn_mask: torch.Tensor) -> torch.Tensor | None:
    """Key lengths (B,) int32 of a padding mask whose kept keys are a prefix; None when they are not."""
    row = attn_mask[:, 0, 0]
    kept = row if row.dtype == torch.bool else row >= 0
    if row.dtype != torch.bool and bool((row[kept] != 0).any()):
        return None
    lengths = kept.sum(-1, dtype=torch.int32)
    prefix = torch.arange(kept.shape[-1], device=kept.device) < lengths[:, None]
    return lengths if bool((prefix == kept).all()) else None


def bias_of(attn_mask: torch.Tensor | None) -> KeyBias | None:
    """The same mask as a bias on the scores, fp32 (B, keys)."""
    if attn_mask is None:
        return None
    row = attn_mask[:, 0, 0]
    if row.dtype == torch.bool:
        row = torch.zeros_like(row, dtype=torch.float32).masked_fill(~row, float("-inf"))
    return KeyBias(row.float())
