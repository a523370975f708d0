"""Changes to the attention logits that a block mask cannot express.

Logits are `scale * q.k`, before softmax. A call takes at most one modifier.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def _check_tensor(x: object, name: str, dims: tuple[int, ...], dtype: torch.dtype | None) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.ndim not in dims:
        allowed = " or ".join(map(str, dims))
        raise ValueError(f"{name} must have {allowed} dimensions, got shape {tuple(x.shape)}")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {x.dtype}")


@dataclass(frozen=True, eq=False)
class FrameDecay:
    """Positive logits shrink (or grow) with the distance in frames between query and key.

    A logit s > 0 between frames f and g becomes `s * table[|f - g|]`; logits <= 0 stay as they are. Index -1 (text)
    is exempt. Passing token indices instead of frame indices gives decay by token distance. There is no gradient
    for `table`.

    Args:
        frame_of_q: [Sq] int32, frame index of each query token, or -1.
        frame_of_k: [Skv] int32, likewise for keys.
        table: [F] fp32 factors, F >= 1. Smaller values weaken far frames more; distances >= F use the last one.

    Raises:
        ValueError: wrong shape or dtype, an empty table, or a table that requires grad.
    """

    frame_of_q: Tensor
    frame_of_k: Tensor
    table: Tensor

    def __post_init__(self) -> None:
        _check_tensor(self.frame_of_q, "FrameDecay.frame_of_q", (1,), torch.int32)
        _check_tensor(self.frame_of_k, "FrameDecay.frame_of_k", (1,), torch.int32)
        _check_tensor(self.table, "FrameDecay.table", (1,), torch.float32)
        if self.table.shape[0] == 0:
            raise ValueError("FrameDecay.table must hold at least one factor, got an empty tensor")
        if self.table.requires_grad:
            raise ValueError("FrameDecay.table has no gradient; pass table.detach()")


@dataclass(frozen=True, eq=False)
class KeyBias:
    """A number for each key, added to the logits of every query; -inf hides the key. Differentiable.

    Args:
        bias: fp32, [Skv], [B, Skv] or [B, H, Skv]; B and H may be 1.

    Raises:
        ValueError: wrong shape or dtype.
    """

    bias: Tensor

    def __post_init__(self) -> None:
        _check_tensor(self.bias, "KeyBias.bias", (1, 2, 3), torch.float32)


Modifier = FrameDecay | KeyBias


def modifier_name(modifier: Modifier | None) -> str | None:
    """The name that `Problem.modifier` carries."""
    if modifier is None:
        return None
    return "frame_decay" if isinstance(modifier, FrameDecay) else "key_bias"


def bias_as_4d(bias: Tensor) -> Tensor:
    """[Skv], [B, Skv] or [B, H, Skv] as a view [B or 1, H or 1, 1, Skv]."""
    if bias.ndim == 1:
        return bias[None, None, None]
    return bias[:, None, None] if bias.ndim == 2 else bias[:, :, None]


def reduce_to_bias(grad: Tensor, bias: Tensor) -> Tensor:
    """Gradient [B, H, Skv] summed over what `bias` was broadcast over."""
    shape = bias_as_4d(bias).squeeze(2).shape
    return grad.sum_to_size(shape).reshape(bias.shape)
