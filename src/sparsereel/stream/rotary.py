"""Rotary embedding along time, applied when keys are read rather than when they are made.

A head's first `t_dim` channels carry time, in pairs (2j, 2j + 1) that turn by position * theta_j. The model's own
tables rotate rows and columns only (see attending.py); this file adds time, from angles computed on the spot: there is
no table whose end a long video could reach.
"""

from __future__ import annotations

import torch
from torch import Tensor


def time_angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles.

    Args:
        positions: (n,) any number type; latent frames.
        frequencies: (t_dim / 2,) float64, radians a frame.

    Returns:
        two float32 tensors (n, t_dim / 2).
    """
    angles = torch.outer(positions.to(torch.float64), frequencies.to(positions.device))
    return angles.cos().float(), angles.sin().float()


def rotate_time(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Turn the time channels of x by the given angles; all other channels are copied.

    rotate(rotate(x, a), b) = rotate(x, a + b), up to rounding.

    Args:
        x: (..., n, D).
        cos, sin: (n, t_dim / 2), of `time_angles`.
        out: where the result goes, like x; None makes a new tensor.
    """
    width = 2 * cos.shape[-1]
    if out is None:
        out = torch.empty_like(x)
    even, odd = x[..., 0:width:2].to(cos.dtype), x[..., 1:width:2].to(cos.dtype)
    out[..., width:] = x[..., width:]
    out[..., 0:width:2] = (even * cos - odd * sin).to(x.dtype)
    out[..., 1:width:2] = (even * sin + odd * cos).to(x.dtype)
    return out
