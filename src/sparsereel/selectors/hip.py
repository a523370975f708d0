"""HiP: find the best key blocks by halving ranges of keys, each judged by a representative."""

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
from sparsereel.selectors.partition import Partition
from sparsereel.selectors.scores import block_means, for_heads
from sparsereel_kernels.block_lists import block_counts


@dataclass(frozen=True, eq=False)
class Hip(Selector):
    """Hierarchical pruning (HiP, arXiv 2406.09827; InfiniteHiP, arXiv 2502.08910): a tree search for the top k.

    Keys are cut into at least 2 n ranges of equal length, n = blocks to keep. Of each range a representative key is
    scored: its largest product with `queries` evenly spaced queries of the query block. The best n ranges are halved
    and their halves scored, until ranges are single blocks. This supposes that keys close to each other score alike; a
    single key that differs from its surroundings can be missed. A local window is always kept.

    Args:
        density: share of the blocks that compete, above 0 and at most 1.
        representative: "middle" token of a range (the paper), or "mean" of its middle block.
        queries: queries looked at in each query block, at least 1.
        window: tokens before and after that each query block sees anyway; a float is a share of the sequence.

    Raises:
        ValueError: a value out of range, an unknown representative.
    """

    density: float = 0.1
    representative: str = "middle"
    queries: int = 4
    window: int | float = 512

    name: ClassVar[str] = "hip"

    def check(self) -> None:
        arguments.store(self, density=checks.share("density", self.density))
        arguments.one_of("representative", self.representative, ("middle", "mean"))
        arguments.at_least_one("queries", self.queries)
        arguments.size("window", self.window, least=0)

    def block_map(self, q: Tensor, k: Tensor, cut: Partition, scale: float) -> Tensor:
        rows = self._queries(q, cut)
        means = block_means(k, cut.block[1], cut.k_sizes, cut.valid_tokens if cut.padded else None)
        counts = cut.budget(self.density)
        keep, nk = int(counts.max()), cut.counts[1]
        level = levels(nk, keep)
        ranges = torch.arange(-(-nk // 2**level), device=q.device).expand(*rows.shape[:3], -1)
        while True:
            competing = self._competing(ranges, level, cut)
            scores = self._scores(rows, k, means, ranges, level, cut)
            if level == 0:
                break
            best = top_k(scores, counts.clamp(max=scores.shape[-1]), competing)
            # Rows must take equally many ranges; a padded sample, which keeps fewer, looks at a few more on the way.
            place = best.to(torch.uint8).topk(min(keep, ranges.shape[-1]), -1).indices
            ranges = ranges.gather(3, place).repeat_interleave(2, 3) * 2
            ranges[..., 1::2] += 1
            level -= 1
        best = top_k(scores, counts, competing)
        chosen = torch.zeros(*rows.shape[:3], nk + 1, dtype=torch.bool, device=q.device)
        chosen.scatter_(3, torch.where(best, ranges, nk), True)
        return chosen[..., :nk] | self._window(cut)

    def numbers(self, cut: Partition, head_dim: int) -> int:
        ranges = min(cut.counts[1], 4 * math.ceil(self.density * cut.counts[1]))
        return max(super().numbers(cut, head_dim), cut.counts[0] * ranges * head_dim)

    def _queries(self, q: Tensor, cut: Partition) -> Tensor:
        """[B, H, nQ, n, D]: evenly spaced queries of each query block; where it ends early, its last valid one."""
        bq, count = cut.block[0], min(self.queries, cut.block[0])
        inside = (torch.arange(count, device=q.device) * 2 + 1) * bq // (2 * count)
        position = torch.arange(cut.counts[0], device=q.device)[:, None] * bq + inside
        position = torch.minimum(position, (cut.valid - 1).clamp(min=0)[:, None, None])
        index = position.flatten(1)[:, None, :, None].expand(*q.shape[:2], -1, q.shape[3])
        return q.gather(2, index).unflatten(2, (cut.counts[0], count))

    def _competing(self, ranges: Tensor, level: int, cut: Partition) -> Tensor:
        """bool like `ranges`: ranges that hold a candidate block."""
        nk = cut.counts[1]
        until = torch.nn.functional.pad(cut.candidates.to(torch.int32).cumsum(-1), (1, 0)).expand(
            *ranges.shape[:3], nk + 1
        )
        first, last = ((ranges + step) * 2**level for step in (0, 1))
        return until.gather(3, last.clamp(max=nk)) > until.gather(3, first.clamp(max=nk))

    def _scores(self, rows: Tensor, k: Tensor, means: Tensor, ranges: Tensor, level: int, cut: Partition) -> Tensor:
        """fp32 [B, H, nQ, ranges]: the largest product of a representative with the queries of the block."""
        valid = cut.valid[:, None, None, None]
        if self.representative == "mean":
            last = ((valid - 1) // cut.block[1]).clamp(min=0)
            index, source = torch.minimum(ranges * 2**level + 2**level // 2, last), means.to(rows.dtype)
        else:
            width = cut.block[1] * 2**level
            index, source = torch.minimum(ranges * width + width // 2, (valid - 1).clamp(min=0)), k
        source = for_heads(source, rows.shape[1])
        flat = index.flatten(2)[..., None].expand(-1, -1, -1, source.shape[3])
        keys = source.gather(2, flat).unflatten(2, tuple(ranges.shape[2:]))
        return (rows @ keys.transpose(-1, -2)).float().amax(3)

    def _window(self, cut: Partition) -> Tensor:
        """bool [nQ, nK]: key blocks within the window of a query block."""
        (bq, bk), (nq, nk) = cut.block, cut.counts
        reach = arguments.tokens(self.window, cut.length)
        i, j = torch.arange(nq, device=cut.valid.device)[:, None], torch.arange(nk, device=cut.valid.device)
        return ((j + 1) * bk > i * bq - reach) & (j * bk < (i + 1) * bq + reach)

    def cost(self, grid: TokenGrid, block: tuple[int, int], heads: int, head_dim: int) -> float:
        """heads * nQ * queries * 2 D * (2 n (levels + 1)), n = blocks kept: the products of the tree search."""
        nq, nk = block_counts((grid.seq_len, grid.seq_len), block)
        keep = max(1, math.ceil(self.density * nk))
        scored = min(nk, 2 * keep) * (levels(nk, keep) + 1)
        return float(heads * nq * self.queries * 2 * head_dim * scored)


def levels(blocks: int, keep: int) -> int:
    """Halvings from at least `2 * keep` ranges of equal length down to blocks."""
    return max(0, math.floor(math.log2(max(1.0, blocks / (2 * keep)))))
