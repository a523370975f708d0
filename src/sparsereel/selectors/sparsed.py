"""SparseD: measure the blocks exactly once, when the dense steps are over, and keep them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.selectors import checks
from sparsereel.selectors.base import Selector
from sparsereel.selectors.choose import top_k
from sparsereel.selectors.partition import Partition
from sparsereel.selectors.probing import block_mass, probe_cost


@dataclass(frozen=True, eq=False)
class Sparsed(Selector):
    """SparseD (arXiv 2509.24014): each head's blocks hardly change over the steps, so they are measured once.

    Score of a block: the mean of the exact attention over its pairs, computed a row of blocks at a time. Each query
    block keeps its best. SparseD gives prompt and generated keys quotas of their own; here text is always kept.

    Args:
        density: share of the blocks that compete, above 0 and at most 1.
        flavour: "paper" keeps that share rounded up; "released" keeps `int(share * blocks) + 1`, as the authors' code.
        refresh: as for all selectors; here "once".

    Raises:
        ValueError: a density out of range, an unknown flavour.
    """

    density: float = 0.3
    flavour: str = "paper"
    refresh: checks.Refresh = field(default="once", kw_only=True)

    name: ClassVar[str] = "sparsed"

    def check(self) -> None:
        arguments.store(self, density=checks.share("density", self.density))
        arguments.one_of("flavour", self.flavour, ("paper", "released"))

    def block_map(self, q: Tensor, k: Tensor, cut: Partition, scale: float) -> Tensor:
        counts = cut.budget(self.density)
        if self.flavour == "released":
            counts = (cut.candidates.sum(-1) * self.density + 1e-9).to(torch.int64) + 1
        return top_k(block_mass(q, k, cut, scale), counts, cut.candidates)

    def numbers(self, cut: Partition, head_dim: int) -> int:
        return cut.block[0] * cut.length

    def cost(self, grid: TokenGrid, block: tuple[int, int], heads: int, head_dim: int) -> float:
        """heads * S^2 * (2 D + 4): one dense q k^T and its softmax."""
        return probe_cost(grid.seq_len, heads, head_dim)
