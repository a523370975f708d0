"""DHSA: keys are cut into chunks of their own length, judged by means that do not favour short or long ones."""

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
from sparsereel.selectors.choose import top_k
from sparsereel.selectors.partition import Partition
from sparsereel.selectors.scores import block_means, for_heads, products
from sparsereel_kernels.block_lists import block_counts

# Cuts closer than this to a stronger one are dropped, as in the authors' first version.
APART = 8


@dataclass(frozen=True, eq=False)
class Dhsa(Selector):
    """Dynamic hierarchical sparse attention (DHSA, arXiv 2510.24606), training-free.

    A chunk c of n_c keys is represented by mean(c) * sqrt(n_c), whose size does not depend on the length when tokens
    are independent. The scores of mean queries against chunks are spread to tokens and averaged over key blocks; each
    query block keeps its best. The authors' first version predicts where chunks end with a trained network; here
    "similarity" cuts where the means of the `context` keys on both sides differ most in direction. Their present
    version has "fixed" chunks of equal length.

    Args:
        density: share of the blocks that compete, above 0 and at most 1.
        chunks: "similarity" or "fixed".
        chunk: mean length of a chunk in tokens, at least 1 (with "similarity" chunks can be fewer and longer).
        context: keys on each side of a possible cut, at least 1.

    Raises:
        ValueError: a value out of range, an unknown kind of chunks.
    """

    density: float = 0.125
    chunks: str = "similarity"
    chunk: int = 64
    context: int = 4

    name: ClassVar[str] = "dhsa"

    def check(self) -> None:
        arguments.store(self, density=checks.share("density", self.density))
        arguments.one_of("chunks", self.chunks, ("similarity", "fixed"))
        arguments.at_least_one("chunk", self.chunk)
        arguments.at_least_one("context", self.context)

    def block_map(self, q: Tensor, k: Tensor, cut: Partition, scale: float) -> Tensor:
        valid = cut.valid_tokens if cut.padded else None
        means = block_means(q, cut.block[0], cut.q_sizes, valid)
        if valid is not None:
            k = k.masked_fill(~valid[:, None, :, None], 0)
        until = F.pad(k.float().cumsum(2), (0, 0, 1, 0))
        labels = self._labels(until, cut)
        count = -(-cut.length // self.chunk)
        reps, share = _represent(until, labels, count, cut)
        scores = products(means, reps, scale) @ for_heads(share, q.shape[1]).transpose(-1, -2)
        return top_k(scores, cut.budget(self.density), cut.candidates)

    def _labels(self, until: Tensor, cut: Partition) -> Tensor:
        """int64 [B, Hkv, S], ascending: the chunk of each key."""
        positions = torch.arange(cut.length, device=until.device)
        if self.chunks == "fixed":
            return (positions // self.chunk).expand(*until.shape[:2], -1)
        cuts = -(-cut.length // self.chunk) - 1
        if cuts == 0:
            return positions.mul(0).expand(*until.shape[:2], -1)
        left, right = (positions + step for step in (-self.context, self.context))
        here, before = until[:, :, positions], until[:, :, left.clamp(min=0)]
        after = until[:, :, right.clamp(max=cut.length)]
        change = 1 - F.cosine_similarity(here - before, after - here, dim=-1)
        change[..., 0] = -torch.inf
        strongest = F.max_pool1d(change, 2 * APART + 1, stride=1, padding=APART)
        change = change.masked_fill((change < strongest) | (positions >= cut.valid[:, None, None]), -torch.inf)
        best, place = change.topk(min(cuts, cut.length), -1)
        return torch.zeros_like(change).scatter_(-1, place, (best > -torch.inf).float()).cumsum(-1).long()

    def numbers(self, cut: Partition, head_dim: int) -> int:
        chunks = -(-cut.length // self.chunk)
        return max(super().numbers(cut, 2 * head_dim), chunks * max(cut.counts))

    def cost(self, grid: TokenGrid, block: tuple[int, int], heads: int, head_dim: int) -> float:
        """heads * (8 D S + 2 nQ nC (D + nK)), nC = chunks: running sums and cosines, scores, spreading them."""
        nq, nk = block_counts((grid.seq_len, grid.seq_len), block)
        chunks = -(-grid.seq_len // self.chunk)
        return float(heads * (8 * head_dim * grid.seq_len + 2 * nq * chunks * (head_dim + nk)))


def _represent(until: Tensor, labels: Tensor, count: int, cut: Partition) -> tuple[Tensor, Tensor]:
    """(chunk vectors [B, H, C, D], share of each chunk in each key block [B, H, nK, C]) of running sums of keys."""
    labels = labels.contiguous()
    chunks = torch.arange(count, device=labels.device).expand(*labels.shape[:2], -1).contiguous()
    ends = torch.searchsorted(labels, chunks, right=True)
    ends = torch.minimum(ends, cut.valid[:, None, None])
    ends = F.pad(ends, (1, 0))
    sums = until.gather(2, ends[..., None].expand(-1, -1, -1, until.shape[3])).diff(dim=2)
    reps = sums / ends.diff(dim=-1).clamp(min=1).sqrt()[..., None]
    block = torch.arange(cut.length, device=labels.device) // cut.block[1]
    cell = block * count + labels
    ones = cut.valid_tokens[:, None].float().expand(cell.shape)
    overlap = torch.zeros(*labels.shape[:2], cut.counts[1] * count, device=labels.device)
    # Counts are whole numbers, so the order of additions does not matter.
    overlap = overlap.scatter_add_(-1, cell, ones).unflatten(-1, (cut.counts[1], count))
    return reps, overlap / cut.k_sizes.clamp(min=1)[:, None, :, None]
