"""Memory order of results: like the query's, so that what follows needs no copy."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_like_query(q: Tensor, features: int) -> Tensor:
    """Uninitialised [B, H, S, features] in the memory order of q, [B, H, S, D].

    diffusers hands over [B, S, H, D] transposed; its output projection then reads our result without a copy.
    """
    batch, heads, tokens, _ = q.shape
    if q.transpose(1, 2).is_contiguous() and not q.is_contiguous():
        return q.new_empty(batch, tokens, heads, features).transpose(1, 2)
    return q.new_empty(batch, heads, tokens, features)


def as_laid_out(result: Tensor, q: Tensor) -> Tensor:
    """`result` itself where its memory order is that of `empty_like_query`, else a copy in that order."""
    wanted = empty_like_query(q, result.shape[-1])
    return result if result.stride() == wanted.stride() else wanted.copy_(result)


def unit_stride(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension, copied only where it has none."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """Type of lse and of sums: fp32, or fp64 for fp64 input."""
    return torch.promote_types(dtype, torch.float32)
