"""XAttention: blocks are judged by the logits on their antidiagonals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.selectors import checks
from sparsereel.selectors.base import Selector
from sparsereel.selectors.choose import top_p
from sparsereel.selectors.partition import Partition, numbers_at_once
from sparsereel.selectors.scores import for_heads, softmax_over


@dataclass(frozen=True, eq=False)
class Xattention(Selector):
    """Antidiagonal scoring (arXiv 2503.16428).

    Groups of `stride` tokens S: K~_m = [K_mS, ..., K_(mS+S-1)], Q~_n = [Q_(nS+S-1), ..., Q_nS], joined along the
    features, so that Q~_n . K~_m is the sum of the logits on one antidiagonal. A = softmax(scale / S * Q~ K~^T), and a
    block scores the sum of A over its (BQ / S) x (BK / S) groups. Every row and column of a block is on some
    antidiagonal, so vertical and slanted lines are seen (with an even stride, lines at an even distance q - k only by
    what lies beside them). The fewest blocks that hold `threshold` of a row's score are kept, the crossing one
    included.

    Args:
        threshold: share of the row's score, above 0; 1 keeps all. The authors use 0.9 for video.
        stride: tokens of a group; must divide both sides of the block. More is cheaper and coarser; with 1 scores are
            exact.

    Raises:
        ValueError: a threshold out of range, a stride below 1; when used, a block that the stride does not divide.
    """

    threshold: float = 0.9
    stride: int = 8

    name: ClassVar[str] = "xattention"

    def check(self) -> None:
        arguments.store(self, threshold=checks.share("threshold", self.threshold))
        arguments.at_least_one("stride", self.stride)

    def block_map(self, q: Tensor, k: Tensor, cut: Partition, scale: float) -> Tensor:
        return top_p(self.scores(q, k, cut, scale), self.threshold, cut.candidates)

    def scores(self, q: Tensor, k: Tensor, cut: Partition, scale: float) -> Tensor:
        """fp32 [B, H, nQ, nK]: sums of A over each block, a part of the query rows at a time."""
        if cut.block[0] % self.stride or cut.block[1] % self.stride:
            raise ValueError(f"the stride {self.stride} must divide both sides of the block {cut.block}")
        # Scaled before the product: in fp16 the sum of a whole antidiagonal could overflow.
        q_groups = self._groups(q * (scale / self.stride), cut.counts[0] * cut.block[0], cut).flip(3).flatten(3)
        k_groups = for_heads(self._groups(k, cut.counts[1] * cut.block[1], cut).flatten(3), q.shape[1])
        q_sizes, k_sizes = (self._sizes(x.shape[2], cut) for x in (q_groups, k_groups))
        competing = cut.candidates.repeat_interleave(cut.block[1] // self.stride, 3) & (k_sizes > 0)[:, None, None]
        ragged = cut.padded or cut.length % cut.block[0] > 0 or cut.length % cut.block[1] > 0
        per_block = cut.block[0] // self.stride
        row = q_groups.shape[0] * q_groups.shape[1] * k_groups.shape[2]
        at_once = max(1, numbers_at_once(q) // (row * per_block)) * per_block
        parts = []
        for rows in torch.arange(q_groups.shape[2], device=q.device).split(at_once):
            logits = q_groups[:, :, rows] @ k_groups.transpose(-1, -2)
            if ragged:
                present = torch.minimum(q_sizes[:, rows, None], k_sizes[:, None])
                logits = logits.float() * (self.stride / present.clamp(min=1))[:, None]
            weights = softmax_over(logits, None if cut.all_compete and not ragged else competing)
            if ragged:
                weights = weights * (q_sizes[:, rows] > 0)[:, None, :, None]
            weights = weights.unflatten(3, (cut.counts[1], -1)).sum(4)
            parts.append(weights.unflatten(2, (-1, per_block)).sum(3))
        return torch.cat(parts, 2)

    def _groups(self, x: Tensor, length: int, cut: Partition) -> Tensor:
        """[B, H, groups, S, D], zeros where there is no valid token."""
        if cut.padded:
            x = x.masked_fill(~cut.valid_tokens[:, None, :, None], 0)
        if length > x.shape[2]:
            x = F.pad(x, (0, 0, 0, length - x.shape[2]))
        return x.unflatten(2, (length // self.stride, self.stride))

    def _sizes(self, groups: int, cut: Partition) -> Tensor:
        """int64 [B or 1, groups] valid tokens of each group."""
        starts = torch.arange(groups, device=cut.valid.device) * self.stride
        return (cut.valid[:, None] - starts).clamp(0, self.stride)

    def cost(self, grid: TokenGrid, block: tuple[int, int], heads: int, head_dim: int) -> float:
        """heads * 2 D S^2 / stride: one product of groups; 1 / stride of a dense q k^T."""
        return 2.0 * heads * head_dim * grid.seq_len**2 / self.stride
