"""Queries and keys as bytes, for the product q k^T (SageAttention, arXiv 2410.02367).

    k' = k - mean of the keys            x8 = round(x / s),  s = max |x| / 127 over a tile of rows
    q k'^T  =  s_q s_k (q8 k8^T)         exact in int32 but for the rounding of q and k'

Taking the mean of the keys off changes every logit of a query by one number, which softmax does not see; it removes the
offset that all keys of a head often share and that would eat up the range of the bytes. lse does see it: `shift_of`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 127.0


def mean_key(k: Tensor, key_lengths: Tensor | None) -> Tensor:
    """[B, Hkv, 1, D] fp32: the mean of the keys that a sample sees."""
    if key_lengths is None:
        return k.float().mean(2, keepdim=True)
    kept = _kept(k, key_lengths)
    count = key_lengths.clamp(1, k.shape[2])[:, None, None, None]
    return k.float().masked_fill(~kept, 0.0).sum(2, keepdim=True) / count


def smoothed(k: Tensor, mean: Tensor, key_lengths: Tensor | None) -> Tensor:
    """[B, Hkv, Skv, D] fp32: keys less their mean; padded keys, which may hold anything, are 0."""
    k = k.float() - mean
    return k if key_lengths is None else k.masked_fill(~_kept(k, key_lengths), 0.0)


def shift_of(q: Tensor, mean: Tensor, scale: float) -> Tensor:
    """[B, H, Sq] fp32: what smoothing took off the logits of each query, and so off its lse."""
    mean = mean.repeat_interleave(q.shape[1] // mean.shape[1], 1)
    return (q.float() @ mean.transpose(2, 3))[..., 0] * scale


def to_bytes(x: Tensor, block: int, tile: int) -> tuple[Tensor, Tensor]:
    """Rows as int8 with one scale for every tile.

    Args:
        x: [B, H, S, D].
        block, tile: rows of a block of the mask, and of a tile of the kernel; a block is walked in tiles of its own,
            the last of which may be cut short.

    Returns:
        [B, H, S, D] int8, contiguous, and [B, H, blocks * tiles of a block] fp32.
    """
    batch, heads, rows, features = x.shape
    blocks, tiles = -(-rows // block), -(-block // tile)
    x = F.pad(x.float(), (0, 0, 0, blocks * block - rows)).view(batch, heads, blocks, block, features)
    x = F.pad(x, (0, 0, 0, tiles * tile - block)).view(batch, heads, blocks * tiles, tile, features)
    scale = x.abs().amax((3, 4)) / LARGEST
    found = (x / scale.clamp_min(1e-30)[..., None, None]).round_().to(torch.int8)
    found = found.view(batch, heads, blocks, tiles * tile, features)[:, :, :, :block]
    return found.reshape(batch, heads, blocks * block, features)[:, :, :rows].contiguous(), scale


def _kept(k: Tensor, key_lengths: Tensor) -> Tensor:
    """[B, 1, Skv, 1] bool."""
    return (torch.arange(k.shape[2], device=k.device) < key_lengths[:, None])[:, None, :, None]
