"""Sharded heads: each sees what is near and a shard of the rest; the shards of all heads together are everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.patterns.base import Pattern
from sparsereel.patterns.layout import Coordinate, Tokens
from sparsereel.patterns.rules import Axis, Rule


@dataclass(frozen=True, eq=False)
class Sharded(Pattern):
    """Heterogeneous sharding of S2-Attention (arXiv 2407.17678), for attention in both directions.

    Tokens are cut into runs of `run`: r = floor(n / run), n = number of a token inside the video. Head h sees run r_k
    from r_q if |r_q - r_k| < local, or (r_k + h) mod stride = 0. Any `stride` heads in a row cover every run between
    them. The method was published with training; without it, expect a loss.

    Args:
        run: Tokens of a run; the paper's blocks have 64.
        local: Runs seen around the own one, the own included; at least 1.
        stride: Runs from one of the shard to the next; larger is sparser.
        offset: Added to the number of the head; the heads of a layer set it themselves.

    Raises:
        ValueError: a run, local or stride below 1, a negative offset.
    """

    run: int = 64
    local: int = 2
    stride: int = 4
    offset: int = 0

    name: ClassVar[str] = "sharded"
    sees_itself: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("run", "local", "stride"):
            arguments.at_least_one(name, getattr(self, name))
        arguments.whole("offset", self.offset, least=0)

    def for_head(self, layer: int, head: int) -> Pattern:
        return _Shard(self.run, self.local, self.stride, (self.offset + head) % self.stride)

    def _near_or_of_shard(self, q: Tensor, k: Tensor) -> Tensor:
        return ((q - k).abs() < self.local) | ((k + self.offset) % self.stride == 0)

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        return self._near_or_of_shard(q.index // self.run, k.index // self.run)

    def rule(self, grid: TokenGrid) -> Rule:
        runs = torch.arange(-(-grid.frames * grid.frame_len // self.run))
        return Axis(Coordinate("index", divisor=self.run), self._near_or_of_shard(runs[:, None], runs))


class _Shard(Sharded):
    """The shard of one head: the same formula, but heads no longer change it."""

    def for_head(self, layer: int, head: int) -> Pattern:
        return self


if __name__ == "__main__":
    from sparsereel.patterns.draw import main

    main(Sharded(run=16))
