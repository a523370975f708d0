"""Full attention: every token sees every token."""

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
class Full(Pattern):
    """Everything sees everything; density 1. Layers with this pattern keep their dense kernel."""

    name: ClassVar[str] = "full"
    sees_itself: ClassVar[bool] = True

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        return torch.ones(torch.broadcast_shapes(q.t.shape, k.t.shape), dtype=torch.bool)

    def rule(self, grid: TokenGrid) -> Rule:
        return Constant(True)


if __name__ == "__main__":
    from sparsereel.patterns.draw import main

    main(Full())
