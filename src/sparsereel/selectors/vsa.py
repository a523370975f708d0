"""VSA: attention over the means of small cubes of the video finds the cubes worth a closer look."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from torch import Tensor

from sparsereel.grid import Permutation, TokenGrid
from sparsereel.patterns import arguments
from sparsereel.selectors import checks
from sparsereel.selectors.assemble import to_block_mask
from sparsereel.selectors.base import Selection, SelectionContext, Selector, reorder, scale_of
from sparsereel.selectors.choose import top_k
from sparsereel.selectors.partition import Partition
from sparsereel.selectors.scores import products
from sparsereel.selectors.segments import (
    arrangement,
    blocks_with,
    labelled,
    reached_blocks,
    segment_means,
    with_the_rest,
)


@dataclass(frozen=True, eq=False)
class Vsa(Selector):
    """The choice of cubes of Video Sparse Attention (VSA, arXiv 2505.13389), with its coarse output gated to 0.

    Scores are scale * mean(Q_c) . mean(K_d) of cubes c, d; each query cube keeps its best key cubes. VSA is trained
    and adds its coarse output through a learned gate; without training the gate is 0 and the fine branch is all. Tokens
    are put in the order of cubes; text follows. A kernel block that holds several cubes visits what any of them chose.
    Cubes at far edges are smaller and count as whole cubes, as in VSA.

    Args:
        density: share of the key cubes, above 0 and at most 1; rounded up. VSA's sparsity 0.9 is 0.1 here.
        cube: (frames, height, width) of a cube in tokens, or one number for all three.

    Raises:
        ValueError: a value out of range.
    """

    density: float = 0.1
    cube: int | tuple[int, int, int] = (4, 4, 4)

    name: ClassVar[str] = "vsa"

    def check(self) -> None:
        cube = arguments.axes("cube", self.cube, arguments.at_least_one)
        arguments.store(self, density=checks.share("density", self.density), cube=cube)

    def select(self, q: Tensor, k: Tensor, cut: Partition, context: SelectionContext) -> Selection:
        number, count = _cubes(context.grid, context.order, arguments.three(self.cube))
        number = number.to(q.device)
        order_q, q_sorted, q_sizes = arrangement(labelled(number, count, cut.sees_all, cut), count + 2)
        # Single sinks stay in their cubes: one token taken out would shift every cube behind it off its blocks.
        rest = cut.sees_all if self.sinks else cut.seen_by_all
        order_k, k_sorted, k_sizes = arrangement(labelled(number, count, rest, cut), count + 2)
        q_means = segment_means(reorder(q, order_q), q_sizes)[:, :, :count]
        k_means = segment_means(reorder(k, order_k), k_sizes)[:, :, :count]
        competing = (k_sizes > 0)[:, :, None, :count]
        budget = (competing.sum(-1).double() * self.density - 1e-9).ceil().long().clamp(min=1)
        chosen = top_k(products(q_means, k_means, scale_of(q, context)), budget, competing)
        pairs = with_the_rest(chosen, q_sizes, k_sizes)
        blocks = reached_blocks(pairs, q_sorted, k_sorted, cut.block)
        if self.sinks:
            blocks = blocks | blocks_with(cut.seen_by_all, order_k, cut.block[1])
        mask = to_block_mask(cut.unsettled().finish(blocks), cut.length, cut.block)
        return Selection(mask, order_q, order_k)

    def cost(self, grid: TokenGrid, block: tuple[int, int], heads: int, head_dim: int) -> float:
        """heads * D * (4 S + 2 nC^2), nC = cubes: tokens moved, two means, one product of means."""
        sizes = zip(grid.shape, arguments.three(self.cube), strict=True)
        cubes = math.prod(-(-length // side) for length, side in sizes)
        return float(heads * head_dim * (4 * grid.seq_len + 2 * cubes**2))


@lru_cache(maxsize=16)
def _cubes(grid: TokenGrid, order: Permutation | None, cube: tuple[int, int, int]) -> tuple[Tensor, int]:
    """int64 [S] number of each token's cube, frame-major (any number outside the video), and the number of cubes."""
    t, h, w = grid.coordinates()
    counts = [-(-length // side) for length, side in zip(grid.shape, cube, strict=True)]
    number = ((t // cube[0]) * counts[1] + h // cube[1]) * counts[2] + w // cube[2]
    return (number if order is None else number[order.indices]).clamp(min=0), math.prod(counts)
