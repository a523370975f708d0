"""What leaves a full cache: pure functions of scores and sizes, and the two policies built on them.

Tokens lie as sink | candidates | recent. Sink and recent tokens are never candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fifo:
    """Oldest first, the sink excepted: what is left is sink + a recent window (StreamingLLM, LongLive)."""

    name: ClassVar[str] = "fifo"


@dataclass(frozen=True)
class Participation:
    """Keep of the middle what recent queries attend to (participative compression of Deep Forcing, arXiv 2512.05081).

    When the cached frames and the new chunk exceed the window, at the first denoising step of that chunk, every layer
    scores its middle tokens j by phi_j = sum over recent queries r and heads h of q_rh . k_jh (rotated, before softmax)
    and keeps the best, so that `budget` frames' worth of tokens remain, sink and recent included.

    Args:
        budget: frames' worth of tokens after compression (paper: N = 16 of a window of 21).
        recent: newest frames, the chunk being denoised included, that are kept whole and whose queries vote (R = 4).
        max_reuse: a token that has survived so often is evicted next time; 0 = no cap. The paper has no cap; the
            released code has one of 7.

    Raises:
        ValueError: recent < 1, budget <= recent, or max_reuse < 0.
    """

    budget: int
    recent: int
    max_reuse: int = 7

    name: ClassVar[str] = "participation"

    def __post_init__(self) -> None:
        if self.recent < 1 or self.budget <= self.recent:
            raise ValueError(
                f"participation needs 1 <= recent < budget frames, got recent={self.recent}, budget={self.budget}"
            )
        if self.max_reuse < 0:
            raise ValueError(f"max_reuse must be 0 (no cap) or more, got {self.max_reuse}")


Eviction = Fifo | Participation


def fifo_keep(count: int, sink: int, room: int, device: torch.device) -> Tensor:
    """int64 indices of what stays of `count` tokens when only `room` fit: the first `sink`, then the newest."""
    recent = room - sink
    everything = torch.arange(count, device=device)
    return torch.cat([everything[:sink], everything[count - recent :]])


def participation_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """phi (n,) in float32 from the sum of the recent queries (H, D) and the candidates' keys (H, n, D).

    A sum of dot products is the dot product of the sum, so the queries never have to be kept one by one.
    """
    return torch.einsum("hd,hnd->n", queries.float(), keys.float())


def participation_keep(scores: Tensor, reuse: Tensor, wanted: int, max_reuse: int, never_chosen: int) -> Tensor:
    """int64 indices (ascending) of the surviving candidates.

    Args:
        scores: (n,).
        reuse: (n,) int, how often each was chosen before.
        wanted: how many may stay.
        max_reuse: those chosen so often go; 0 = no cap.
        never_chosen: candidates surely within the cap. The result's length must not depend on values on the device, so
            it is `wanted` or, where only these are sure, their number.
    """
    if max_reuse:
        wanted = min(wanted, max(never_chosen, 0))
        scores = scores.masked_fill(reuse >= max_reuse, -torch.inf)
    best = scores.topk(min(wanted, scores.shape[0])).indices
    return best.sort().values
