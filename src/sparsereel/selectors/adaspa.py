"""AdaSpa: exact search at a few steps, with the log-sum-exp of the search before, and budgets that differ by head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.selectors import checks
from sparsereel.selectors.assemble import to_block_mask
from sparsereel.selectors.base import Selection, SelectionContext, Selector, scale_of
from sparsereel.selectors.choose import top_k
from sparsereel.selectors.partition import Partition, over_heads
from sparsereel.selectors.probing import block_mass, probe_cost


@dataclass(frozen=True, eq=False)
class Adaspa(Selector):
    """AdaSpa (arXiv 2502.21079): patterns differ by input and head but barely by step.

    Score of a block: the mean over its pairs of exp(s - lse). The first search computes lse; later ones reuse it, since
    it changes little from step to step, and so need one pass. Each query block keeps its best. With `by_head`, budgets
    move between heads: heads that keep `recall` of their attention give half of their budget to as many heads that
    keep the least (at most half of the heads give). The bound 0.8 is our reading of the paper.

    Args:
        density: share of the blocks that compete, above 0 and at most 1; the mean over heads.
        by_head: budgets differ by head.
        recall: share of its attention that a head must keep to give half of its budget away; from 0 to 1.
        cached: take the lse of the first search in later ones; False computes it anew.
        refresh: as for all selectors; here at 20 and 60 percent of the steps.

    Raises:
        ValueError: a value out of range.
    """

    density: float = 0.2
    by_head: bool = True
    recall: float = 0.8
    cached: bool = True
    refresh: checks.Refresh = field(default=(0.2, 0.6), kw_only=True)

    name: ClassVar[str] = "adaspa"

    def check(self) -> None:
        arguments.store(
            self,
            density=checks.share("density", self.density),
            recall=checks.number("recall", self.recall, least=0, most=1),
        )
        arguments.flag("by_head", self.by_head)
        arguments.flag("cached", self.cached)

    def select(self, q: Tensor, k: Tensor, cut: Partition, context: SelectionContext) -> Selection:
        mass = self._mass(q, k, cut, scale_of(q, context), context.memory(self, q, k).notes)
        counts = cut.budget(self.density).expand(*q.shape[:2], 1)
        if self.by_head:
            counts = self._by_head(mass, counts, cut)
        chosen = top_k(mass, counts, cut.candidates)
        return Selection(to_block_mask(cut.finish(chosen), cut.length, cut.block))

    def _mass(self, q: Tensor, k: Tensor, cut: Partition, scale: float, notes: dict[str, Tensor]) -> Tensor:
        """fp32 [B, H, nQ, nK] by the lse in `notes`, which the first search puts there."""
        numbers = cut.block[0] * cut.length
        if not self.cached:
            return over_heads(lambda q, k: block_mass(q, k, cut, scale), q, k, numbers)
        known, made, done = notes.get("lse"), [], 0

        def mass_of(q: Tensor, k: Tensor) -> Tensor:
            nonlocal done
            heads = slice(done, done + q.shape[1])
            done = heads.stop
            lse = q.new_empty(q.shape[:3], dtype=torch.float32) if known is None else known[:, heads]
            made.append(lse)

            def weigh(logits: Tensor, rows: slice) -> Tensor:
                if known is None:
                    # Rows without any competitor weigh nothing, whatever their lse.
                    lse[:, :, rows] = logits.float().logsumexp(-1).clamp(min=torch.finfo(torch.float32).min)
                return (logits - lse[:, :, rows, None]).exp_()

            return block_mass(q, k, cut, scale, weigh)

        mass = over_heads(mass_of, q, k, numbers)
        notes["lse"] = torch.cat(made, 1) if known is None else known
        return mass

    def _by_head(self, mass: Tensor, counts: Tensor, cut: Partition) -> Tensor:
        """int64 [B, H, 1]: as many heads as can spare half of their budget hand it to those that need it most."""
        kept = (mass * top_k(mass, counts, cut.candidates)).sum((2, 3))
        recall = kept / mass.sum((2, 3)).clamp(min=1e-20)
        heads = mass.shape[1]
        rank = recall.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        pairs = (recall >= self.recall).sum(1, keepdim=True).clamp(max=heads // 2)
        half = counts[..., 0] // 2
        moved = half * (rank >= heads - pairs) - half * (rank < pairs)
        # Full heads take nothing on, so that a budget of everything stays one.
        spare = cut.candidates.sum((1, 2, 3))[:, None] > counts[..., 0]
        return counts + (moved * spare)[..., None]

    def cost(self, grid: TokenGrid, block: tuple[int, int], heads: int, head_dim: int) -> float:
        """heads * S^2 * (2 D + 4): one dense q k^T and its exponentials."""
        return probe_cost(grid.seq_len, heads, head_dim)
