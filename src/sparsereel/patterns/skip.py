"""Skipped heads: nothing is attended, the output is 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns.base import Pattern
from sparsereel.patterns.layout import Tokens
from sparsereel.patterns.rules import Constant, Rule


@dataclass(frozen=True, eq=False)
class Skip(Pattern):
    """No token sees any token, text included: output 0, lse -inf, density 0. Cannot be part of `&` or `|`.

    3-6% of the heads of a video transformer can be skipped outright (Sparse-vDiT, arXiv 2506.03065); which ones, a
    search has to find out.
    """

    name: ClassVar[str] = "skip"

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        return torch.zeros(torch.broadcast_shapes(q.t.shape, k.t.shape), dtype=torch.bool)

    def rule(self, grid: TokenGrid) -> Rule:
        return Constant(False)

    def token_mask(self, grid: TokenGrid, *, layer: int = 0, head: int | None = None) -> Tensor:
        return torch.zeros(grid.seq_len, grid.seq_len, dtype=torch.bool)


if __name__ == "__main__":
    from sparsereel.patterns.draw import main

    main(Skip())
