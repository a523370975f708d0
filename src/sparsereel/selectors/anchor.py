"""AnchorAttention: keep what comes close to a near-maximum that is cheap to find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.selectors import checks
from sparsereel.selectors.base import Selector
from sparsereel.selectors.partition import Partition
from sparsereel.selectors.scores import block_means, for_heads
from sparsereel_kernels.block_lists import block_counts


@dataclass(frozen=True, eq=False)
class Anchor(Selector):
    """Difference-aware stripes (AnchorAttention, arXiv 2505.23520), made bidirectional; nothing is sorted.

    The anchor of a query block is the mean over its rows of the largest logit among the anchor keys: the first key
    block, the blocks that everything sees, and the keys of the own group of `group` query blocks. A key is kept for a
    whole group if, for any query block in it, scale * mean(Q_i) . k + theta >= anchor_i. A key block with a kept key is
    visited. Anchor blocks are always visited.

    Args:
        theta: distance to the anchor in natural-log units, at least 0; more keeps more. The paper's 12 suits sharp
            language models; for other models it must be set.
        group: query blocks that share their keys, at least 1. More is looser: blocks are kept if any of them asks.

    Raises:
        ValueError: a value out of range.
    """

    theta: float = 12.0
    group: int = 16

    name: ClassVar[str] = "anchor"

    def check(self) -> None:
        arguments.store(self, theta=checks.number("theta", self.theta, least=0, most=1e30))
        arguments.at_least_one("group", self.group)

    def block_map(self, q: Tensor, k: Tensor, cut: Partition, scale: float) -> Tensor:
        (bq, bk), (nq, nk) = cut.block, cut.counts
        heads, span = q.shape[1], self.group * bq
        valid = cut.valid_tokens[:, None, None] if cut.padded else None
        means = (block_means(q, bq, cut.q_sizes, cut.valid_tokens if cut.padded else None) * scale).to(q.dtype)
        shared = cut.columns.clone()
        shared[0] = True
        shared_tokens = shared.repeat_interleave(bk)[: cut.length].nonzero().flatten()
        keys = for_heads(k, heads)
        first_keys, chosen = keys[:, :, shared_tokens], []
        for start in range(0, cut.length, span):
            own = slice(start, min(start + span, cut.length))
            rows = q[:, :, own] * scale
            top = torch.maximum(
                _largest(rows, keys[:, :, own], None if valid is None else valid[..., own]),
                _largest(rows, first_keys, None if valid is None else valid[..., shared_tokens]),
            )
            blocks = slice(start // bq, min(start // bq + self.group, nq))
            anchors = _mean_of_rows(top, bq, cut.q_sizes[:, blocks])
            near = (means[:, :, blocks] @ keys.transpose(-1, -2)).float() >= (anchors - self.theta)[..., None]
            near = near if valid is None else near & valid
            kept = F.pad(near.any(2), (0, nk * bk - cut.length)).unflatten(2, (nk, bk)).any(3)
            kept[..., own.start // bk : -(-own.stop // bk)] = True
            chosen.append((kept | shared)[:, :, None].expand(-1, -1, blocks.stop - blocks.start, -1))
        return torch.cat(chosen, 2)

    def numbers(self, cut: Partition, head_dim: int) -> int:
        span = min(self.group * cut.block[0], cut.length)
        return max(super().numbers(cut, head_dim), span * span, self.group * cut.length)

    def cost(self, grid: TokenGrid, block: tuple[int, int], heads: int, head_dim: int) -> float:
        """heads * 2 D S * (group BQ + BK + nQ): logits of the anchor keys, and mean queries against all keys."""
        nq, _ = block_counts((grid.seq_len, grid.seq_len), block)
        anchor_keys = min(self.group * block[0], grid.seq_len) + block[1]
        return 2.0 * heads * head_dim * grid.seq_len * (anchor_keys + nq)


def _largest(rows: Tensor, keys: Tensor, valid: Tensor | None) -> Tensor:
    """fp32 [B, H, n]: the largest logit of each row among valid keys (None = all); -inf without any."""
    logits = rows @ keys.transpose(-1, -2)
    return (logits if valid is None else logits.masked_fill_(~valid, -torch.inf)).amax(-1).float()


def _mean_of_rows(top: Tensor, block: int, sizes: Tensor) -> Tensor:
    """fp32 [B, H, n]: mean of [B, H, rows] over the valid rows of each query block; -inf where a row has no key."""
    count = sizes.shape[1]
    padded = F.pad(top, (0, count * block - top.shape[2])).unflatten(2, (count, block))
    inside = torch.arange(block, device=top.device) < sizes[:, None, :, None]
    return padded.masked_fill(~inside, 0).sum(-1) / sizes.clamp(min=1)[:, None]
