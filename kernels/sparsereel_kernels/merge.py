"""Attention in parts: outputs over disjoint sets of keys, put together by their log-sum-exps."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys; exact, and associative.

    The larger log-sum-exp is taken off first, so nothing overflows, and a row without keys (lse -inf) weighs nothing,
    whichever side it is on; formulas with sigmoids give NaN there.

    Args:
        out, other: [B, H, S, Dv], each normalised over its own keys.
        lse, other_lse: [B, H, S] fp32, natural log, scale and bias included.

    Returns:
        The merged output in the dtype of `out`, and its lse. A row without keys on both sides gives 0 and -inf.
    """
    top = torch.maximum(lse, other_lse)
    shift = torch.where(top == -torch.inf, 0.0, top)
    mine, theirs = (lse - shift).exp(), (other_lse - shift).exp()
    total = mine + theirs
    weight = torch.where(total > 0, mine / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
    other_weight = torch.where(total > 0, 1 - weight, 0.0)
    merged = out * weight[..., None] + other * other_weight[..., None]
    return merged.to(out.dtype), shift + total.log()
