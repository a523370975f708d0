"""Low-rank biases as extra columns of queries and keys, and what they are good for beside skipped blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsereel.compensation.base import Compensation, SparseCall
from sparsereel.compensation.pooled import pooled_attention
from sparsereel.patterns import arguments
from sparsereel.selectors.scores import block_means
from sparsereel_kernels import BlockMask, merge_attention, sparse_attention


@dataclass(frozen=True, eq=False)
class FlashBias(Compensation):
    """Mean keys whose scores carry the spread of their block as a low-rank bias.

    The log of a block's mean e^{q k} is q mean(k) only where its keys are equal; to second order it is larger by half
    the variance of q k. With the channels of a block taken as independent that is a bias of rank D,

        b_ij = sum_d (scale q_id)^2 var_j(k_d) / 2,

    which FlashBias (arXiv 2505.12044) turns into more columns: phi_q = (scale q)^2, phi_k = var / 2 beside q and the
    mean keys. The block's size, log n_j, is a bias of rank 1 of the same kind. Exact where the keys of a block are
    equal.

    Args:
        strength: factor of the bias, 0 (mean_key) to 1 (the second-order value). Blocks whose scores are far from a
            bell curve are overrated by 1.

    Raises:
        ValueError: a strength outside 0 to 1.
    """

    strength: float = 1.0

    name: ClassVar[str] = "flash_bias"
    needs_lse: ClassVar[bool] = True

    def check(self) -> None:
        value = self.strength
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"strength must be a number from 0 to 1, got {value!r}")
        arguments.store(self, strength=float(value))

    def complete(self, call: SparseCall, out: Tensor, lse: Tensor | None) -> Tensor:
        assert lse is not None
        if not call.skips_anything:
            return out
        q = call.q * call.scale
        squares = block_means(call.k.float().square(), call.block[1], call.k_sizes, call.valid_keys)
        spread = (squares - call.k_means.square()).clamp(min=0) * (self.strength / 2)
        queries = torch.cat([q, q.square()], -1)
        return merge_attention(out, lse, *pooled_attention(call, queries, torch.cat([call.k_means, spread], -1)))[0]


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    mask: BlockMask | None = None,
    *,
    scale: float | None = None,
    **options: Any,
) -> Any:
    """Attention whose scores carry the bias phi_q phi_k^T, on kernels that know nothing of it (arXiv 2505.12044).

    softmax(scale q k^T + phi_q phi_k^T) v = softmax([scale q, phi_q] [k, phi_k]^T) v: the R columns of the factors are
    put beside those of q and k. Differentiable, also in the factors.

    Args:
        q, k, v: as in `sparse_attention`.
        phi_q: [B or 1, H or 1, Sq, R].
        phi_k: [B or 1, Hkv or 1, Skv, R].
        options: further arguments of `sparse_attention`.

    Raises:
        ValueError: D + R, rounded up to a multiple of 8, is above 256; ranks that differ.
    """
    if phi_q.shape[-1] != phi_k.shape[-1]:
        raise ValueError(f"phi_q and phi_k must have one rank, got {phi_q.shape[-1]} and {phi_k.shape[-1]}")
    width = q.shape[-1] + phi_q.shape[-1]
    if width > 256:
        raise ValueError(f"head dimension + rank must be at most 256, got {q.shape[-1]} + {phi_q.shape[-1]}")
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    # Flash kernels want a multiple of 8; columns of zeros add nothing.
    fill = -width % 8
    wide_q = torch.cat([q * scale, phi_q.to(q.dtype).expand(*q.shape[:3], -1)], -1)
    wide_k = torch.cat([k, phi_k.to(k.dtype).expand(*k.shape[:3], -1)], -1)
    return sparse_attention(F.pad(wide_q, (0, fill)), F.pad(wide_k, (0, fill)), v, mask, scale=1.0, **options)


def low_rank(bias: Tensor, *, energy: float = 0.995) -> tuple[Tensor, Tensor, float]:
    """Factors phi_q, phi_k of a table of biases, of the smallest rank that holds a share of its energy.

    Args:
        bias: [..., Sq, Skv], finite; masks (-inf) are not low rank and belong in the block mask.
        energy: share of the squared singular values, above 0 and at most 1 (FlashBias takes 0.995 for Swin V2).

    Returns:
        phi_q [..., Sq, R], phi_k [..., Skv, R], and the largest error of any entry, which bounds the change of logits.

    Raises:
        ValueError: infinite entries, an energy out of range.
    """
    if not bool(torch.isfinite(bias).all()):
        raise ValueError("bias must be finite; put -inf into the block mask")
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, got {energy!r}")
    u, s, vh = torch.linalg.svd(bias.float(), full_matrices=False)
    held = s.square().cumsum(-1) / s.square().sum(-1, keepdim=True).clamp(min=1e-30)
    rank = int((held < energy - 1e-7).sum(-1).max()) + 1
    root = s[..., :rank].sqrt()
    phi_q, phi_k = u[..., :rank] * root[..., None, :], vh[..., :rank, :].transpose(-1, -2) * root[..., None, :]
    return phi_q, phi_k, float((phi_q @ phi_k.transpose(-1, -2) - bias).abs().max())
