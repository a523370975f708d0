"""Agent attention for Stable Diffusion, without training (arXiv 2312.08874): a few tokens ask and answer for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor

from sparsereel.extend.cells import pool_cells
from sparsereel.extend.change import Inner, Where

if TYPE_CHECKING:
    from sparsereel.grid import TokenGrid
    from sparsereel.runtime import ModelRuntime


@dataclass(frozen=True)
class AgentAttention:
    """A speed option for large pictures: in the early steps, which lay out the picture, attention goes through agents.

        A = mean of Q over cells of `cell` x `cell` tokens
        O = softmax(Q A^T s2) softmax(A K^T s) V + shortcut V,   s = D^(-1/2), s2 = D^(-scale2 / 2)

    With n agents for N tokens the two products cost 2 n / N of plain attention. Only the level with the most tokens is
    changed. The authors pick agents by merging similar tokens; means over cells are the form of their trained models,
    and need no search. A call that a sparse plan or a window rules is left to it.

    Args:
        cell: tokens a side of a cell; 2 halves the cost, 4 takes an eighth.
        steps: share of the steps, the first ones.
        scale2, shortcut: the authors' values for Stable Diffusion.

    Raises:
        ValueError: a cell below 2, a share outside [0, 1].
    """

    cell: int = 2
    steps: float = 0.4
    scale2: float = 0.3
    shortcut: float = 0.075

    name: ClassVar[str] = "agent"

    def __post_init__(self) -> None:
        if self.cell < 2:
            raise ValueError(f"agent attention needs cells of at least 2 x 2 tokens, got {self.cell}")
        if not 0 <= self.steps <= 1:
            raise ValueError(f"agent attention's steps are a share from 0 to 1, got {self.steps}")

    @property
    def dense_only(self) -> bool:
        """A call that a sparse plan rules is left to it."""
        return True

    def at(self, where: Where, runtime: ModelRuntime) -> AgentAttention | None:
        """Itself where this call goes through agents; an unknown step is none of the first."""
        largest = max((layout[2] * layout[3] for layout in runtime.layouts_seen), default=0)
        step = runtime.step()
        early = step is not None and step.index < int(step.total * self.steps)
        return self if early and where.layout[2] * where.layout[3] == largest else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, grid: TokenGrid, inner: Inner) -> Tensor:
        """See the class."""
        agents = pool_cells(q, grid, (1, self.cell, self.cell))
        answers = F.scaled_dot_product_attention(agents, k, v, scale=scale)
        out = F.scaled_dot_product_attention(q, agents, answers, scale=scale**self.scale2)
        return out + self.shortcut * v
