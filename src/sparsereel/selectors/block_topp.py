"""Pooled block top-p: the fewest key blocks that hold a share of the estimated attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.selectors import checks
from sparsereel.selectors.base import Selector
from sparsereel.selectors.block_topk import pooled_cost
from sparsereel.selectors.choose import top_p
from sparsereel.selectors.partition import Partition
from sparsereel.selectors.scores import pooled, products, softmax_over


@dataclass(frozen=True, eq=False)
class BlockTopp(Selector):
    """Keep the fewest key blocks that hold `threshold` of the pooled softmax.

    P_ij = n_j exp(s_ij) / sum_l n_l exp(s_il), s_ij = scale * mean(Q_i) . mean(K_j), n_j = valid tokens of key block j
    (all but the last are equal). The block that crosses the threshold is kept. Where tokens of a block are alike, P is
    the true attention, and so is the mass kept. Used by Jenga and Rectified SpaAttn (arXiv 2511.19835).

    Args:
        threshold: share of the estimated attention among the blocks that compete, above 0; 1 keeps all.
        min_density: share of the blocks that compete kept in any case.

    Raises:
        ValueError: a share out of range.
    """

    threshold: float = 0.9
    min_density: float = 0.0

    name: ClassVar[str] = "block_topp"

    def check(self) -> None:
        arguments.store(
            self,
            threshold=checks.share("threshold", self.threshold),
            min_density=checks.number("min_density", self.min_density, least=0, most=1),
        )

    def block_map(self, q: Tensor, k: Tensor, cut: Partition, scale: float) -> Tensor:
        scores = products(*pooled(q, k, cut), scale) + cut.k_sizes.clamp(min=1).log()[:, None, None]
        weights = softmax_over(scores, cut.candidates)
        return top_p(weights, self.threshold, cut.candidates, least=cut.budget(self.min_density))

    def cost(self, grid: TokenGrid, block: tuple[int, int], heads: int, head_dim: int) -> float:
        """heads * D * (2 S + 2 nQ nK): two means and one product of means."""
        return pooled_cost(grid, block, heads, head_dim)
