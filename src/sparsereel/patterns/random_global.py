"""Random and global runs: no structure at all beyond a few tokens that see all, for ablations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.patterns.base import Pattern
from sparsereel.patterns.layout import Coordinate, Tokens, scramble
from sparsereel.patterns.rules import Axis, Rule


@dataclass(frozen=True, eq=False)
class RandomGlobal(Pattern):
    """The random and global parts of BigBird (arXiv 2007.14062): what any cleverer pattern has to beat.

    Tokens are cut into runs of `run`. A pair of runs is allowed if its hash, a number in [0, 1) that depends on the two
    runs and the seed alone, is below `share`; if either is one of the first `first` runs; or if they are the same.

    Args:
        share: Of all pairs of runs, in [0, 1].
        first: Runs at the start that see and are seen by all.
        run: Tokens of a run.
        seed: Another seed draws other pairs.

    Raises:
        ValueError: a share outside [0, 1], a run below 1, a negative number of first runs or seed.
    """

    share: float = 0.2
    first: int = 1
    run: int = 64
    seed: int = 0

    name: ClassVar[str] = "random_global"
    sees_itself: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number = isinstance(self.share, (int, float)) and not isinstance(self.share, bool)
        if not number or not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], got {self.share!r}")
        arguments.at_least_one("run", self.run)
        for name in ("first", "seed"):
            arguments.whole(name, getattr(self, name), least=0)

    def _allowed_runs(self, q: Tensor, k: Tensor) -> Tensor:
        mixed = scramble(scramble(q.clamp_min(0) * 1_000_003 + k.clamp_min(0)) + self.seed)
        drawn = (mixed & (2**30 - 1)).double() / 2**30 < self.share
        return drawn | (q < self.first) | (k < self.first) | (q == k)

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        return self._allowed_runs(q.index // self.run, k.index // self.run)

    def rule(self, grid: TokenGrid) -> Rule:
        runs = torch.arange(-(-grid.frames * grid.frame_len // self.run))
        return Axis(Coordinate("index", divisor=self.run), self._allowed_runs(runs[:, None], runs))


if __name__ == "__main__":
    from sparsereel.patterns.draw import main

    main(RandomGlobal(run=16))
