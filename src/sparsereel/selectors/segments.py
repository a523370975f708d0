"""Tokens sorted into segments (cubes, clusters) of any length, and the blocks that segments reach."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsereel.selectors.partition import Partition
from sparsereel.selectors.scores import for_heads


def labelled(number: Tensor, count: int, rest: Tensor, cut: Partition) -> Tensor:
    """int64 [B or 1, H or 1, S]: the segment of each token.

    Args:
        number: int64 [S] or [B or 1, H, S], 0 .. count - 1.
        rest: bool [S], tokens of no segment; they get the label `count`, and padding `count + 1`.
    """
    labels = torch.where(rest, count, number)
    labels = labels if labels.ndim == 3 else labels[None, None]
    return torch.where(cut.valid_tokens[:, None], labels, count + 1)


def arrangement(labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort tokens by label, keeping their order inside a label.

    Args:
        labels: int64 [B, H, S], 0 .. count - 1.

    Returns:
        int64: order [B, H, S] (position of each token of the new sequence in the old one), sorted labels [B, H, S],
        and sizes [B, H, count].
    """
    ordered, order = torch.sort(labels, dim=-1, stable=True)
    sizes = torch.zeros(*labels.shape[:2], count, dtype=torch.int64, device=labels.device)
    return order, ordered, sizes.scatter_add_(-1, labels, torch.ones_like(labels))


def segment_means(x: Tensor, sizes: Tensor) -> Tensor:
    """fp32 [B, H, C, D]: means of consecutive runs of `sizes` [B, H, C] tokens of x [B, H, S, D]; empty ones are 0.

    `sizes` of each head must sum to S.
    """
    lengths = sizes.expand(*x.shape[:2], -1)
    sums = torch.segment_reduce(x.float().flatten(0, 2), "sum", lengths=lengths.flatten(), axis=0, initial=0)
    return sums.unflatten(0, tuple(lengths.shape)) / lengths.clamp(min=1)[..., None]


def reached_blocks(chosen: Tensor, q_labels: Tensor, k_labels: Tensor, block: tuple[int, int]) -> Tensor:
    """Blocks that hold a token of a chosen pair of segments.

    Args:
        chosen: bool [B, H, Cq, Ck]; pairs with an empty segment must be False.
        q_labels, k_labels: int64 [B or 1, H or 1 (or key heads), S], ascending.
        block: (query, key) tokens of a block.

    Returns:
        bool [B, H, nQ, nK].
    """
    # With sums over all smaller indices, the pairs in any rectangle of segments are counted by four look-ups.
    below = F.pad(chosen.to(torch.int32).cumsum(-1).cumsum(-2), (1, 0, 1, 0))
    first, last = _ends(q_labels, block[0], chosen.shape[:2])
    wide = (*below.shape[:2], first.shape[-1], below.shape[-1])
    rows = below.gather(2, (last + 1)[..., None].expand(wide)) - below.gather(2, first[..., None].expand(wide))
    first, last = _ends(k_labels, block[1], chosen.shape[:2])
    wide = (*rows.shape[:3], first.shape[-1])
    return rows.gather(3, (last + 1)[:, :, None].expand(wide)) > rows.gather(3, first[:, :, None].expand(wide))


def _ends(labels: Tensor, block: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """First and last label [B, H, n] of each block."""
    length = labels.shape[-1]
    starts = torch.arange(0, length, block, device=labels.device)
    stops = (starts + block).clamp(max=length) - 1
    labels = labels if labels.shape[1] == 1 else for_heads(labels, shape[1])
    return labels[..., starts].expand(*shape, -1), labels[..., stops].expand(*shape, -1)


def blocks_with(tokens: Tensor, order: Tensor, block: int) -> Tensor:
    """bool [B or 1, H or 1, 1, nK]: key blocks of a moved sequence that hold any of these tokens.

    Args:
        tokens: bool [S], in the order before.
        order: int64 [B or 1, H or 1, S], alike for all heads of a sample.
    """
    moved = tokens[order]
    fill = -moved.shape[-1] % block
    return F.pad(moved, (0, fill)).unflatten(-1, (-1, block)).any(-1)[:, :, None]


def with_the_rest(chosen: Tensor, q_sizes: Tensor, k_sizes: Tensor) -> Tensor:
    """Pairs of segments with two more segments: tokens that see and are seen by everything, and padding.

    Args:
        chosen: bool [B, H, Cq, Ck].
        q_sizes, k_sizes: int64 [B or 1, H or 1 (or key heads), C + 2] tokens of each segment, the two more last.

    Returns:
        bool [B, H, Cq + 2, Ck + 2], False for pairs with an empty segment or padding.
    """
    pairs = F.pad(chosen, (0, 2, 0, 2))
    pairs[:, :, :-1, -2] = True
    pairs[:, :, -2, :-1] = True
    for sizes, axis in ((q_sizes, 3), (k_sizes, 2)):
        there = sizes > 0 if sizes.shape[1] == 1 else for_heads(sizes > 0, pairs.shape[1])
        pairs = pairs & there.unsqueeze(axis)
    return pairs
