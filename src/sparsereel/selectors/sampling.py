"""Exact attention of a few query rows, spread over the video."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsereel.selectors.partition import Partition
from sparsereel.selectors.scores import softmax_over

# Multiples of the golden ratio spread evenly and fall into step with no grid; they are the same in every run.
GOLDEN = 0.6180339887498949


def sampled_queries(cut: Partition, samples: int) -> Tensor:
    """int64 [B or 1, n]: positions of n valid video tokens, one in each n-th of the video, at a different place in it.

    n is `samples`, or the number of video tokens where that is smaller. The last queries, which methods for text
    sample, mean nothing in a video.
    """
    count = min(samples, cut.video.numel())
    device = cut.valid.device
    stretch = torch.arange(count, device=device, dtype=torch.float64)
    place = (stretch + (stretch * GOLDEN).frac()) / count
    # Video positions ascend, so the valid ones are the first.
    valid = torch.searchsorted(cut.video, cut.valid).clamp(min=1)
    return cut.video[(place * valid[:, None]).floor().long().clamp(max=cut.video.numel() - 1)]


def sampled_attention(q: Tensor, k: Tensor, positions: Tensor, cut: Partition, scale: float) -> Tensor:
    """fp32 [B, H, n, S]: attention of the queries at `positions` among the keys of candidate blocks."""
    index = positions[:, None, :, None].expand(*q.shape[:2], -1, q.shape[3])
    rows = q.gather(2, index) * scale
    ratio = q.shape[1] // k.shape[1]
    if ratio > 1:
        # Query heads of a key head stand below each other: keys need no copies.
        stacked = rows.unflatten(1, (k.shape[1], ratio)).flatten(2, 3)
        logits = (stacked @ k.transpose(-1, -2)).unflatten(2, (ratio, -1)).flatten(1, 2)
    else:
        logits = rows @ k.transpose(-1, -2)
    return softmax_over(logits, None if cut.all_compete else cut.candidate_tokens)
