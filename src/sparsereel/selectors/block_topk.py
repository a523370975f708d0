"""Pooled block top-k: the key blocks whose mean key fits the mean query best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.selectors import checks
from sparsereel.selectors.base import Selector
from sparsereel.selectors.choose import top_k
from sparsereel.selectors.partition import Partition
from sparsereel.selectors.scores import pooled, products
from sparsereel_kernels.block_lists import block_counts


@dataclass(frozen=True, eq=False)
class BlockTopk(Selector):
    """Keep the `density` best key blocks of each query block by `mean(Q_i) . mean(K_j)`.

    The block scores of SLA (arXiv 2509.24006) and of MInference's block-sparse heads (arXiv 2407.02490). Every row
    keeps the same number, so the time is known beforehand.

    Args:
        density: share of the key blocks that compete, above 0 and at most 1; rounded up to blocks.

    Raises:
        ValueError: a density out of range.
    """

    density: float = 0.2

    name: ClassVar[str] = "block_topk"

    def check(self) -> None:
        arguments.store(self, density=checks.share("density", self.density))

    def block_map(self, q: Tensor, k: Tensor, cut: Partition, scale: float) -> Tensor:
        return top_k(products(*pooled(q, k, cut), scale), cut.budget(self.density), cut.candidates)

    def cost(self, grid: TokenGrid, block: tuple[int, int], heads: int, head_dim: int) -> float:
        """heads * D * (2 S + 2 nQ nK): two means and one product of means."""
        return pooled_cost(grid, block, heads, head_dim)


def pooled_cost(grid: TokenGrid, block: tuple[int, int], heads: int, head_dim: int) -> float:
    """Operations of pooling q and k and of all products of means."""
    nq, nk = block_counts((grid.seq_len, grid.seq_len), block)
    return float(heads * head_dim * (2 * grid.seq_len + 2 * nq * nk))
