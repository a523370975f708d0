"""Vertical-slash: key columns that all queries look at, and diagonals at fixed distances."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.selectors import checks
from sparsereel.selectors.base import Selector
from sparsereel.selectors.choose import top_k
from sparsereel.selectors.partition import Partition, over_heads
from sparsereel.selectors.sampling import sampled_attention, sampled_queries


@dataclass(frozen=True, eq=False)
class VerticalSlash(Selector):
    """The vertical-slash heads of MInference (arXiv 2407.02490), made bidirectional.

    The attention of `samples` query rows is summed along key blocks (vertical) and along diagonals q - k of the width
    of a key block (slash); the best of both are kept, each everywhere. MInference takes the last 64 queries, which in a
    video are a corner of the last frame; here they are spread over the video. It gathers single columns; here a column
    is a key block. The first key block and the diagonals of the token itself are always kept.

    Args:
        vertical: key blocks that everything sees, as a share of those that compete, from 0 to 1 (keeps all).
        slash: diagonals, as a share of the number of key blocks, from 0 to 1. Each visits about (BQ + BK) / BK blocks a
            query block.
        samples: number of query rows, at least 1. More is dearer and steadier.

    Raises:
        ValueError: a value out of range.
    """

    vertical: float = 0.1
    slash: float = 0.05
    samples: int = 64

    name: ClassVar[str] = "vertical_slash"

    def check(self) -> None:
        for name in ("vertical", "slash"):
            arguments.store(self, **{name: checks.number(name, getattr(self, name), least=0, most=1)})
        arguments.at_least_one("samples", self.samples)

    def block_map(self, q: Tensor, k: Tensor, cut: Partition, scale: float) -> Tensor:
        positions = sampled_queries(cut, self.samples)

        def lines(q: Tensor, k: Tensor) -> Tensor:
            return torch.cat(_line_scores(sampled_attention(q, k, positions, cut, scale), positions, cut), -1)

        nk = cut.counts[1]
        columns, diagonals = over_heads(lines, q, k, positions.shape[1] * cut.length).split((nk, 2 * nk + 1), -1)
        chosen = torch.zeros_like(columns, dtype=torch.bool)
        if self.vertical:
            chosen = top_k(columns[:, :, None], cut.budget(self.vertical), cut.candidates)[:, :, 0]
        chosen[..., 0] = True
        kept = torch.zeros_like(diagonals, dtype=torch.bool)
        if self.slash:
            count = torch.ceil(torch.tensor(self.slash * nk - 1e-9, device=q.device)).long()
            kept = top_k(diagonals[:, :, None], count[None, None, None], kept.new_ones(1))[:, :, 0]
        kept[..., nk - 1 : nk + 1] = True
        return chosen[:, :, None] | _blocks_on(kept, cut)

    def cost(self, grid: TokenGrid, block: tuple[int, int], heads: int, head_dim: int) -> float:
        """heads * samples * S * (2 D + 4): exact rows, their softmax and sums."""
        return float(heads * self.samples * grid.seq_len * (2 * head_dim + 4))


def _line_scores(weights: Tensor, positions: Tensor, cut: Partition) -> tuple[Tensor, Tensor]:
    """Sums of sampled attention [B, H, n, S] along key blocks [B, H, nK] and diagonals [B, H, 2 nK + 1].

    Diagonal d holds the pairs with floor((q - k) / BK) = d - nK.
    """
    width, nk = cut.block[1], cut.counts[1]
    until = weights.cumsum(-1)

    def between(ends: Tensor) -> Tensor:
        """Sums between neighbours of ascending positions [.., n, m] of keys."""
        reached = until.gather(3, (ends - 1).clamp(min=0)[:, None].expand(*until.shape[:2], *ends.shape[1:]))
        return (reached * (ends > 0)[:, None]).diff(dim=-1)

    ends = torch.arange(nk + 1, device=weights.device) * width
    columns = between(ends.clamp(max=cut.length).expand(positions.shape[0], positions.shape[1], -1)).sum(2)
    # Counted from the sampled token itself, so that each stretch of BK keys lies on one diagonal.
    shifted = ends - (width - 1 - positions % width)[..., None]
    shifted = torch.cat([shifted, shifted[..., -1:] + width], -1).clamp(0, cut.length)
    stretches = between(shifted)
    which = (positions // width)[..., None] - torch.arange(-nk, nk + 1, device=weights.device)
    inside = (which >= 0) & (which <= nk)
    index = which.clamp(0, nk)[:, None].expand(*weights.shape[:2], -1, -1)
    return columns, (stretches.gather(3, index) * inside[:, None]).sum(2)


def _blocks_on(kept: Tensor, cut: Partition) -> Tensor:
    """bool [B, H, nQ, nK]: blocks that meet a kept diagonal of [B, H, 2 nK + 1]."""
    (bq, bk), (nq, nk) = cut.block, cut.counts
    # Which diagonals a block meets depends only on how far its first query is behind its first key.
    unit = math.gcd(bq, bk)
    behind = torch.arange(-(nk - 1) * bk // unit, (nq - 1) * bq // unit + 1, device=kept.device) * unit
    first = (behind - bk + 1).div(bk, rounding_mode="floor") + nk
    last = (behind + bq - 1).div(bk, rounding_mode="floor") + nk
    until = torch.nn.functional.pad(kept.to(torch.int32).cumsum(-1), (1, 0))
    met = until[..., last.clamp(0, 2 * nk) + 1] > until[..., first.clamp(0, 2 * nk)]
    i, j = torch.arange(nq, device=kept.device)[:, None], torch.arange(nk, device=kept.device)
    return met[..., (i * bq + (nk - 1 - j) * bk) // unit]
