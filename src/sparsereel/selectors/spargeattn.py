"""SpargeAttn: pooled scores, but only blocks whose tokens are alike are judged by their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.selectors import checks
from sparsereel.selectors.base import Selector
from sparsereel.selectors.block_topk import pooled_cost
from sparsereel.selectors.choose import top_k, top_p
from sparsereel.selectors.partition import Partition
from sparsereel.selectors.scores import block_means, for_heads, pooled, products, softmax_over

# Below 0 every block is trusted, since a squared norm is never negative.
SIMILARITY = {"top-k": -0.1, "cdf": 0.6}


@dataclass(frozen=True, eq=False)
class Spargeattn(Selector):
    """The first stage of SpargeAttn (arXiv 2502.18137).

    The similarity of a block is the mean cosine of its pairs of tokens, itself included: `|mean(x / |x|)|^2`. A block
    is trusted where that exceeds `similarity`. P = softmax(scale * mean(Q_i) . mean(K_j)) over trusted key blocks;
    each query block keeps its best. Key blocks that are not trusted are seen by everything, query blocks that are not
    trusted see everything.

    Args:
        flavour: "top-k", what the authors recommend today (a share of the blocks, nearly all trusted), or "cdf", the
            paper's (a share of P).
        density: share of the blocks that compete, for "top-k".
        threshold: share of P for "cdf"; 1 keeps all.
        similarity: from -1 (all are trusted) to 1 (none is, everything is kept); None = -0.1 for "top-k", 0.6 for
            "cdf".
        include_crossing: for "cdf", also keep the block that crosses the threshold; the paper and its code do not,
            but always keep one.
        smooth: subtract the mean key from all keys first, which softmax does not see, as the authors' kernels do.
        sink: everything also sees the first key block.

    Raises:
        ValueError: an unknown flavour, a value out of range.
    """

    flavour: str = "top-k"
    density: float = 0.5
    threshold: float = 0.98
    similarity: float | None = None
    include_crossing: bool = False
    smooth: bool = True
    sink: bool = False

    name: ClassVar[str] = "spargeattn"

    def check(self) -> None:
        arguments.one_of("flavour", self.flavour, tuple(SIMILARITY))
        for name in ("include_crossing", "smooth", "sink"):
            arguments.flag(name, getattr(self, name))
        if self.similarity is not None:
            arguments.store(self, similarity=checks.number("similarity", self.similarity, least=-1, most=1))
        arguments.store(
            self, density=checks.share("density", self.density), threshold=checks.share("threshold", self.threshold)
        )

    def block_map(self, q: Tensor, k: Tensor, cut: Partition, scale: float) -> Tensor:
        if self.smooth:
            k = k - _mean_key(k, cut)
        bound = SIMILARITY[self.flavour] if self.similarity is None else self.similarity
        trusted_q = block_similarity(q, cut.block[0], cut.q_sizes, cut) > bound
        trusted_k = for_heads(block_similarity(k, cut.block[1], cut.k_sizes, cut) > bound, q.shape[1])[:, :, None]
        competing = cut.candidates & trusted_k
        weights = softmax_over(products(*pooled(q, k, cut), scale), competing)
        if self.flavour == "top-k":
            chosen = top_k(weights, cut.budget(self.density), competing)
        else:
            chosen = top_p(weights, self.threshold, competing, include_crossing=self.include_crossing)
        chosen = chosen | ~trusted_k | ~trusted_q[..., None]
        if self.sink:
            chosen[..., 0] = True
        return chosen

    def cost(self, grid: TokenGrid, block: tuple[int, int], heads: int, head_dim: int) -> float:
        """heads * D * (10 S + 2 nQ nK): two means, norms, unit vectors and their means; one product of means."""
        return pooled_cost(grid, block, heads, head_dim) + 8.0 * heads * head_dim * grid.seq_len


def block_similarity(x: Tensor, block: int, sizes: Tensor, cut: Partition) -> Tensor:
    """fp32 [B, H, n]: mean cosine of all pairs of valid tokens of each block, in 0..1 up to rounding."""
    # Rounding must not lift a block of equal tokens above 1, where nothing is trusted.
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    means = block_means(unit, block, sizes, cut.valid_tokens if cut.padded else None)
    return means.square().sum(-1).clamp(max=1)


def _mean_key(k: Tensor, cut: Partition) -> Tensor:
    if cut.padded:
        k = k.masked_fill(~cut.valid_tokens[:, None, :, None], 0)
    return (k.sum(2, keepdim=True, dtype=torch.float32) / cut.valid.clamp(min=1)[:, None, None, None]).to(k.dtype)
