"""BiFormer: regions are routed to regions once for all heads, then blocks inside them attend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.selectors import checks
from sparsereel.selectors.assemble import to_block_mask
from sparsereel.selectors.base import Selection, SelectionContext, Selector, scale_of
from sparsereel.selectors.choose import top_k
from sparsereel.selectors.partition import Partition
from sparsereel.selectors.scores import block_means, for_heads


@dataclass(frozen=True, eq=False)
class Biformer(Selector):
    """Bi-level routing (BiFormer, arXiv 2303.08810), without its training and its convolution.

    Tokens are cut into regions. The affinity of two regions is the product of their mean query and mean key with all
    heads joined, so heads share the routing. Each region keeps its best regions; their tokens attend to each other.
    In tile order regions are boxes of the video, as BiFormer's windows are boxes of an image.

    Args:
        density: share of the regions, above 0 and at most 1; rounded up.
        region: tokens of a region; rounded up to whole blocks of queries and of keys.

    Raises:
        ValueError: a value out of range.
    """

    density: float = 0.2
    region: int = 256

    name: ClassVar[str] = "biformer"

    def check(self) -> None:
        arguments.store(self, density=checks.share("density", self.density))
        arguments.at_least_one("region", self.region)

    def select(self, q: Tensor, k: Tensor, cut: Partition, context: SelectionContext) -> Selection:
        (bq, bk), (nq, nk) = cut.block, cut.counts
        size = self.size(cut.block)
        count = -(-cut.length // size)
        starts = torch.arange(count, device=q.device) * size
        sizes = (cut.valid[:, None] - starts).clamp(0, size)
        valid = cut.valid_tokens if cut.padded else None
        q_means = block_means(q, size, sizes, valid)
        k_means = for_heads(block_means(k, size, sizes, valid), q.shape[1])
        affinity = torch.einsum("bhid,bhjd->bij", q_means, k_means)[:, None] * scale_of(q, context)
        per_region = size // bk
        inside = F.pad(cut.candidates, (0, count * per_region - nk)).unflatten(3, (count, per_region))
        competing = inside.any(4)
        counts = (competing.sum(-1).double() * self.density - 1e-9).ceil().long().clamp(min=1)
        routed = top_k(affinity, counts, competing)
        blocks = routed.repeat_interleave(size // bq, 2)[:, :, :nq].repeat_interleave(per_region, 3)[..., :nk]
        chosen = cut.finish(blocks & cut.candidates).expand(-1, q.shape[1], -1, -1)
        return Selection(to_block_mask(chosen, cut.length, cut.block))

    def size(self, block: tuple[int, int]) -> int:
        """Tokens of a region in whole blocks."""
        unit = math.lcm(*block)
        return -(-self.region // unit) * unit

    def cost(self, grid: TokenGrid, block: tuple[int, int], heads: int, head_dim: int) -> float:
        """heads * D * (2 S + 2 nR^2), nR = regions: two means and one product of means."""
        regions = -(-grid.seq_len // self.size(block))
        return float(heads * head_dim * (2 * grid.seq_len + 2 * regions**2))
