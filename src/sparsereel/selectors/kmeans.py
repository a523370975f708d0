"""k-means of the tokens of each head, deterministic and without tables of tokens x tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsereel.selectors.partition import numbers_at_once
from sparsereel.selectors.segments import arrangement, segment_means


def kmeans(x: Tensor, centroids: Tensor, iterations: int, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm in Euclidean distance.

    Args:
        x: [B, H, S, D].
        centroids: fp32 [B, H, C, D] to start from.
        iterations: assignments followed by new means; with 0 tokens are assigned and centroids stay.
        outside: bool [B or 1, S], tokens that belong to no cluster.

    Returns:
        labels int64 [B, H, S] (any number where outside), and centroids: means of those labels; a cluster without
        tokens keeps its old one.
    """
    labels = nearest(x, centroids)
    for turn in range(iterations):
        if turn:
            labels = nearest(x, centroids)
        count = centroids.shape[2]
        order, _, sizes = arrangement(labels.masked_fill(outside[:, None], count), count + 1)
        moved = x.gather(2, order[..., None].expand(x.shape))
        means = segment_means(moved, sizes)[:, :, :count]
        updated = torch.where((sizes[..., :count] > 0)[..., None], means, centroids)
        if torch.equal(updated, centroids):
            break
        centroids = updated
    return labels, centroids


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """int64 [B, H, S]: the nearest of [B, H, C, D] for each token; products in the dtype of x."""
    half = centroids.square().sum(-1) / 2
    turned = centroids.to(x.dtype).transpose(-1, -2)
    at_once = max(1, numbers_at_once(x) // (x.shape[0] * x.shape[1] * centroids.shape[2]))
    parts = [((part @ turned).float() - half[:, :, None]).max(-1).indices for part in x.split(at_once, 2)]
    return torch.cat(parts, 2)
