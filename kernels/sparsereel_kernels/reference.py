"""The definition: dense attention in fp32 (fp64 for fp64 input), slow and plain. Every backend is tested against it.

s    = scale * q k^T                     then the modifier: s * table[|f - g|] where s > 0, or s + bias
p    = softmax of s over the keys that the mask and the key lengths allow
out  = p v            lse = log sum exp s        a row without keys: out = 0, lse = -inf
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .modifiers import FrameDecay, KeyBias, Modifier, bias_as_4d, reduce_to_bias

if TYPE_CHECKING:
    from .block_mask import BlockMask
    from .problem import Problem


def unsupported_reasons(problem: Problem) -> list[str]:
    """The definition has no limits but memory."""
    return []


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    scale: float,
    key_lengths: Tensor | None = None,
    modifier: Modifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend as defined above; differentiable by autograd. Shapes as in `sparse_attention`.

    Returns:
        out [B, H, Sq, Dv] in q's dtype; lse [B, H, Sq] in fp32 (fp64 for fp64 input).
    """
    s = logits(q, k, scale, modifier)[0]
    s = s.masked_fill(~allowed_pairs(s.shape, mask, key_lengths, s.device), -torch.inf)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return (p @ _per_query_head(v, q.shape[1])).to(q.dtype), lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: BlockMask | None,
    scale: float,
    key_lengths: Tensor | None = None,
    modifier: Modifier | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients in closed form.

    With p = exp(s - lse) and dp = grad_out v^T, the gradient of a logit is ds = p * (dp - sum_d(grad_out * out)
    + grad_lse); through the modifier and the scale it reaches q and k. `lse` is worked out again, in full precision.

    Returns:
        (dq, dk, dv) in the dtypes of q, k and v, and the gradient of KeyBias.bias (None without one).
    """
    s, factor = logits(q, k, scale, modifier)
    s = s.masked_fill(~allowed_pairs(s.shape, mask, key_lengths, s.device), -torch.inf)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    grad, values = grad_out.to(s.dtype), _per_query_head(v, q.shape[1])
    dp = grad @ values.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    if grad_lse is not None:
        ds = ds + p * grad_lse[..., None].to(s.dtype)
    dbias = None
    if isinstance(modifier, KeyBias):
        dbias = reduce_to_bias(ds.sum(2), modifier.bias).to(modifier.bias.dtype)
    ds = (ds if factor is None else ds * factor) * scale
    dq = ds @ _per_query_head(k, q.shape[1])
    dk = _sum_groups(ds.transpose(-1, -2) @ q.to(s.dtype), k.shape[1])
    dv = _sum_groups(p.transpose(-1, -2) @ grad, v.shape[1])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias


def logits(q: Tensor, k: Tensor, scale: float, modifier: Modifier | None) -> tuple[Tensor, Tensor | None]:
    """[B, H, Sq, Skv] scores after the modifier, and the factor that FrameDecay applied (None for others)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    s = q.to(wide) @ _per_query_head(k, q.shape[1]).transpose(-1, -2) * scale
    if isinstance(modifier, KeyBias):
        return s + bias_as_4d(modifier.bias).to(wide), None
    if isinstance(modifier, FrameDecay):
        factor = torch.where(s > 0, decay_factors(modifier).to(wide), 1.0)
        return s * factor, factor
    return s, None


def decay_factors(decay: FrameDecay) -> Tensor:
    """[Sq, Skv] factor of each pair's positive logit; 1 where either is text."""
    f, g = decay.frame_of_q.long()[:, None], decay.frame_of_k.long()[None]
    either_text = (f < 0) | (g < 0)
    distance = (f - g).abs().clamp(max=decay.table.shape[0] - 1)
    return decay.table[distance].masked_fill(either_text, 1.0)


def allowed_pairs(
    shape: torch.Size, mask: BlockMask | None, key_lengths: Tensor | None, device: torch.device
) -> Tensor:
    """Bool, broadcastable to [B, H, Sq, Skv]."""
    allowed = torch.ones(1, 1, *shape[2:], dtype=torch.bool, device=device) if mask is None else mask.to_dense()
    if key_lengths is None:
        return allowed
    inside = torch.arange(shape[3], device=device) < key_lengths[:, None]
    return allowed & inside[:, None, None]


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """k or v in full precision, its heads repeated for the query heads that share them."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide).repeat_interleave(heads // x.shape[1], dim=1)


def _sum_groups(grad: Tensor, kv_heads: int) -> Tensor:
    """[B, H, S, D] summed over the query heads that share a key head."""
    return grad.unflatten(1, (kv_heads, grad.shape[1] // kv_heads)).sum(2)
