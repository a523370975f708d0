"""SVG2: k-means puts like tokens together, and pairs of clusters are judged by their centroids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.selectors import checks
from sparsereel.selectors.assemble import to_block_mask
from sparsereel.selectors.base import Selection, SelectionContext, Selector, reorder, scale_of
from sparsereel.selectors.choose import top_p
from sparsereel.selectors.kmeans import kmeans
from sparsereel.selectors.partition import Partition
from sparsereel.selectors.sampling import sampled_queries
from sparsereel.selectors.scores import for_heads, pooled, products, softmax_over
from sparsereel.selectors.segments import arrangement, labelled, reached_blocks, with_the_rest
from sparsereel_kernels.block_lists import block_counts


@dataclass(frozen=True, eq=False)
class Svg2(Selector):
    """Semantic-aware permutation of Sparse VideoGen2 (arXiv 2505.18875).

    Queries and keys of the video are clustered, head by head; tokens of a cluster are put next to each other. For
    clusters i of queries and j of keys with centroids c and n_j keys, P_ij = n_j exp(s_ij) / sum_l n_l exp(s_il),
    s_ij = scale * c_i . c_j. Each query cluster keeps the fewest key clusters that hold `threshold` of P, the crossing
    one included. The first call clusters from evenly spaced tokens; later ones start from the centroids of the call
    before. Text stands behind the video, padding last.

    Args:
        threshold: share of P, above 0; 1 keeps all.
        min_density: share of the key clusters kept in any case.
        query_clusters, key_clusters: as in the paper, and at most the number of blocks.
        first_iterations, iterations: of k-means at the first and at later calls.
        flavour: "clusters" visits every block with tokens of a chosen pair, a superset of the paper's (whose kernel
            has blocks of any size); "blocks" scores the blocks of the permuted sequence by their own means instead,
            which wastes nothing where clusters end inside blocks.

    Raises:
        ValueError: a value out of range, an unknown flavour.
    """

    threshold: float = 0.9
    min_density: float = 0.1
    query_clusters: int = 300
    key_clusters: int = 1000
    first_iterations: int = 50
    iterations: int = 2
    flavour: str = "clusters"

    name: ClassVar[str] = "svg2"

    def check(self) -> None:
        arguments.store(
            self,
            threshold=checks.share("threshold", self.threshold),
            min_density=checks.number("min_density", self.min_density, least=0, most=1),
        )
        for name in ("query_clusters", "key_clusters"):
            arguments.at_least_one(name, getattr(self, name))
        for name in ("first_iterations", "iterations"):
            arguments.whole(name, getattr(self, name), least=0)
        arguments.one_of("flavour", self.flavour, ("clusters", "blocks"))

    def select(self, q: Tensor, k: Tensor, cut: Partition, context: SelectionContext) -> Selection:
        notes = context.memory(self, q, k).notes
        counts = self._clusters(cut.length, cut.block)
        sides = [
            self._arranged(x, name, count, rest, cut, notes)
            for x, name, count, rest in ((q, "q", counts[0], cut.sees_all), (k, "k", counts[1], cut.seen_by_all))
        ]
        (order_q, q_sorted, q_sizes), (order_k, k_sorted, k_sizes) = sides
        if self.flavour == "blocks":
            ends = q_sorted, k_sorted
            chosen = self._blocks(reorder(q, order_q), reorder(k, order_k), ends, counts, cut, scale_of(q, context))
        else:
            kept = self._clusters_kept(notes["q"], notes["k"], k_sizes, scale_of(q, context))
            chosen = reached_blocks(with_the_rest(kept, q_sizes, k_sizes), q_sorted, k_sorted, cut.block)
        mask = to_block_mask(cut.unsettled().finish(chosen), cut.length, cut.block)
        return Selection(mask, order_q, order_k)

    def _clusters(self, length: int, block: tuple[int, int]) -> tuple[int, int]:
        nq, nk = block_counts((length, length), block)
        return min(self.query_clusters, nq), min(self.key_clusters, nk)

    def _arranged(
        self, x: Tensor, name: str, count: int, rest: Tensor, cut: Partition, notes: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cluster one side; (order, sorted labels, sizes) of `arrangement`. Keeps the centroids in `notes`."""
        outside = rest | ~cut.valid_tokens
        start, iterations = notes.get(name), self.iterations
        if start is None:
            index = sampled_queries(cut, count)[:, None, :, None]
            start = x.gather(2, index.expand(*x.shape[:2], -1, x.shape[3])).float()
            iterations = self.first_iterations
        labels, notes[name] = kmeans(x, start, iterations, outside)
        count = start.shape[2]
        return arrangement(labelled(labels, count, rest, cut), count + 2)

    def _clusters_kept(self, q_means: Tensor, k_means: Tensor, k_sizes: Tensor, scale: float) -> Tensor:
        """bool [B, H, Cq, Ck]."""
        heads, count = q_means.shape[1], k_means.shape[2]
        sizes = for_heads(k_sizes[..., :count], heads)[:, :, None]
        scores = products(q_means, k_means, scale) + sizes.clamp(min=1).log()
        weights = softmax_over(scores, sizes > 0)
        least = torch.full((1, 1, 1), max(1, int(self.min_density * count)), device=scores.device)
        return top_p(weights, self.threshold, sizes > 0, least=least)

    def _blocks(
        self,
        q: Tensor,
        k: Tensor,
        ends: tuple[Tensor, Tensor],
        counts: tuple[int, int],
        cut: Partition,
        scale: float,
    ) -> Tensor:
        """bool [B, H, nQ, nK] by the means of permuted blocks; those with text or sinks are kept."""
        moved = cut.unsettled()
        scores = products(*pooled(q, k, moved), scale) + moved.k_sizes.clamp(min=1).log()[:, None, None]
        forced = []
        for labels, size, number in zip(ends, cut.block, counts, strict=True):
            starts = torch.arange(0, cut.length, size, device=q.device)
            last = labels[..., (starts + size).clamp(max=cut.length) - 1]
            # Labels ascend: clusters, the rest, padding. A block holds the rest if it begins before and ends behind it.
            rest = (labels == number).any(-1, keepdim=True)
            forced.append(for_heads((labels[..., starts] <= number) & (last >= number) & rest, q.shape[1]))
        competing = moved.candidates & ~forced[1][:, :, None]
        chosen = top_p(softmax_over(scores, competing), self.threshold, competing, least=moved.budget(self.min_density))
        return chosen | forced[0][..., None] | forced[1][:, :, None]

    def cost(self, grid: TokenGrid, block: tuple[int, int], heads: int, head_dim: int) -> float:
        """heads * D * S * 2 (Cq + Ck) * iterations: products of tokens and centroids in later calls; the first call
        takes first_iterations / iterations times as long."""
        clusters = sum(self._clusters(grid.seq_len, block))
        return 2.0 * heads * head_dim * grid.seq_len * clusters * max(1, self.iterations)
