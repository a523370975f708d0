"""SVG: tell spatial from temporal heads by a few queries, and give each its pattern and its order of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from sparsereel.grid import Permutation, TokenGrid
from sparsereel.patterns import KeepSinks, Pattern, Spatial, Temporal, arguments
from sparsereel.patterns.layout import Tokens
from sparsereel.selectors import checks
from sparsereel.selectors.assemble import to_block_mask
from sparsereel.selectors.base import Selection, SelectionContext, Selector, scale_of
from sparsereel.selectors.partition import Partition, over_heads
from sparsereel.selectors.sampling import sampled_attention, sampled_queries
from sparsereel.selectors.scores import for_heads
from sparsereel_kernels.block_lists import EMPTY


@dataclass(frozen=True, eq=False)
class Svg(Selector):
    """The online head classification of Sparse VideoGen (arXiv 2502.01776).

    Each head is either spatial (`patterns.Spatial`: neighbouring frames, whole) or temporal (`patterns.Temporal`: the
    same place in all frames). The exact attention of `samples` queries, spread over the video, tells which pattern
    holds more of it. Both patterns are as wide as `density` allows. Tokens of temporal heads are put place by place,
    which turns their pattern into a band of full blocks; the output is put back.
    Sparse VideoGen compares the errors of the outputs; this sees q and k alone and compares the attention held.
    It samples from the first 10,000 tokens, which are the first frames; here all frames are sampled.

    Args:
        density: share of all pairs of video tokens that a pattern may allow, above 0; 1 is dense. A pattern never gets
            narrower than the own frame, or the own place.
        samples: number of queries, at least 1.
        reorder: put the tokens of temporal heads place by place.

    Raises:
        ValueError: a value out of range.
    """

    density: float = 0.25
    samples: int = 64
    reorder: bool = True

    name: ClassVar[str] = "svg"

    def check(self) -> None:
        arguments.store(self, density=checks.share("density", self.density))
        arguments.at_least_one("samples", self.samples)
        arguments.flag("reorder", self.reorder)

    def select(self, q: Tensor, k: Tensor, cut: Partition, context: SelectionContext) -> Selection:
        temporal = self.temporal_heads(q, k, cut, context)
        order = None
        # Where padding reaches into the video it must stay at the end, so tokens stay where they are.
        whole_video = int(cut.valid.min()) > int(cut.video[-1])
        if self.reorder and whole_video:
            order = _place_by_place(context.grid, context.order)
        maps = self._maps(context, None if order is None else order[0])
        shape = (q.shape[0], q.shape[1], *cut.counts)
        of_head = for_heads(temporal, q.shape[1])
        spatial_map, temporal_map = (x.to(q.device).expand(shape) for x in maps)
        chosen = torch.where(of_head[..., None, None], temporal_map, spatial_map)
        mask = to_block_mask(cut.unsettled().finish(chosen), cut.length, cut.block)
        if order is None:
            return Selection(mask)
        moved, still = order[1].to(q.device), torch.arange(cut.length, device=q.device)
        orders = (torch.where(x[..., None], moved, still) for x in (of_head, temporal))
        return Selection(mask, *orders)

    def temporal_heads(self, q: Tensor, k: Tensor, cut: Partition, context: SelectionContext) -> Tensor:
        """bool [B, Hkv]: which heads are temporal. Query heads that share a key head share the answer: keys can only be
        in one order."""
        positions = sampled_queries(cut, self.samples)
        tokens = Tokens.of(context.grid)
        if context.order is not None:
            index = context.order.indices
            tokens = tokens.map(lambda x: x[index])
        rows = positions.cpu()
        queries, keys = tokens.map(lambda x: x[rows][..., None]), tokens.map(lambda x: x[None, None])
        allowed = [x.allowed(context.grid, queries, keys).to(q.device)[:, None] for x in self._patterns(context.grid)]
        scale = scale_of(q, context)

        def held(q: Tensor, k: Tensor) -> Tensor:
            weights = sampled_attention(q, k, positions, cut, scale)
            return torch.stack([(weights * pairs).sum((2, 3)) for pairs in allowed], -1)

        shares = over_heads(held, q, k, 3 * positions.shape[1] * cut.length)
        spatial, temporal = shares.unflatten(1, (k.shape[1], -1)).sum(2).unbind(-1)
        return temporal > spatial

    def _patterns(self, grid: TokenGrid) -> tuple[Spatial, Temporal]:
        """The widest pattern of either kind within the density."""
        frames = _widest(grid.frames, lambda n: _near_share(grid.frames, n), self.density)
        width = _widest(
            max(grid.height, grid.width),
            lambda n: _near_share(grid.height, n) * _near_share(grid.width, n),
            self.density,
        )
        return Spatial(frames), Temporal(width)

    def _maps(self, context: SelectionContext, moved: Permutation | None) -> tuple[Tensor, Tensor]:
        """bool [nQ, nK] of the spatial and of the temporal pattern, in the orders that their heads have."""
        spatial, temporal = (
            KeepSinks(x, places=self.sinks) if self.keep_sinks else x for x in self._patterns(context.grid)
        )
        grid, block, order = context.grid, context.block, context.order
        return _visited(spatial, grid, block, order), _visited(temporal, grid, block, moved or order)

    def cost(self, grid: TokenGrid, block: tuple[int, int], heads: int, head_dim: int) -> float:
        """heads * samples * S * (2 D + 4): exact rows, their softmax and sums. Moving tokens is not counted."""
        return float(heads * self.samples * grid.seq_len * (2 * head_dim + 4))


def _near_share(length: int, reach: int) -> float:
    """Share of the pairs of an axis of `length` that are at most `reach` apart."""
    reach = min(reach, length - 1)
    return (length * (2 * reach + 1) - reach * (reach + 1)) / length**2


def _widest(length: int, share: Callable[[int], float], density: float) -> int:
    """The largest reach below `length` whose share is within the density; 0 at least."""
    return max((n for n in range(length) if share(n) <= density + 1e-9), default=0)


@lru_cache(maxsize=32)
def _visited(pattern: Pattern, grid: TokenGrid, block: tuple[int, int], order: Permutation | None) -> Tensor:
    """bool [nQ, nK]: blocks that a pattern touches."""
    return pattern.block_mask(grid, block, order=order, exact=False).block_map()[0, 0] != EMPTY


@lru_cache(maxsize=16)
def _place_by_place(grid: TokenGrid, order: Permutation | None) -> tuple[Permutation, Tensor]:
    """The order that puts all frames of a place together: as an order of the grid, and int64 [S] of the sequence."""
    index = torch.arange(grid.seq_len)
    start, stop = grid.video_start, grid.video_start + grid.video_len
    by_place = torch.arange(grid.video_len).view(grid.frames, -1).t().flatten()
    index[start:stop] = start + by_place
    whole = Permutation(index)
    return whole, index if order is None else order.inverse.indices[index]
