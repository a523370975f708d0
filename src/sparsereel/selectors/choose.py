"""From scores to chosen blocks: so many of the best, or the fewest that hold a share of the mass."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores: Tensor, counts: Tensor, competing: Tensor) -> Tensor:
    """The best `counts` competitors of each row.

    Args:
        scores: [B, H, n, m].
        counts: int64, broadcasts to [B, H, n]; more than there are competitors means all of them.
        competing: bool, broadcasts to [B, H, n, m].

    Returns:
        bool [B, H, n, m].
    """
    most = min(int(counts.max()), scores.shape[-1])
    some = not bool(competing.all())
    best = (scores.masked_fill(~competing, -torch.inf) if some else scores).topk(most, -1).indices
    keep = torch.arange(most, device=scores.device) < counts[..., None]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, keep.expand(best.shape))
    return chosen & competing if some else chosen


def top_p(
    weights: Tensor,
    share: float,
    competing: Tensor,
    *,
    include_crossing: bool = True,
    least: Tensor | int = 1,
) -> Tensor:
    """The fewest competitors of each row that hold `share` of its weight.

    Args:
        weights: [B, H, n, m], not negative, 0 where not competing.
        share: of the row's sum; 1 keeps every competitor.
        competing: bool, broadcasts to [B, H, n, m].
        include_crossing: keep the one that crosses the share (XAttention, SVG2), or stop before it (SpargeAttn).
        least: number kept in any case; broadcasts to [B, H, n].

    Returns:
        bool [B, H, n, m].
    """
    if share >= 1:
        return competing.expand(weights.shape).clone()
    ordered, place = torch.sort(weights, dim=-1, descending=True, stable=True)
    reached = ordered.cumsum(-1)
    bound = share * reached[..., -1:]
    keep = reached - ordered < bound if include_crossing else reached <= bound
    rank = torch.arange(weights.shape[-1], device=weights.device)
    keep |= rank < torch.as_tensor(least, device=weights.device)[..., None]
    return torch.zeros_like(keep).scatter_(-1, place, keep) & competing
