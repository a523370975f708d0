"""Coarse attention over the whole picture beside a window: register tokens, and a compressed global branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsereel.extend.cells import pool_cells, spread_cells
from sparsereel.extend.change import Inner, Where
from sparsereel_kernels import merge_attention

if TYPE_CHECKING:
    from sparsereel.grid import TokenGrid
    from sparsereel.runtime import ModelRuntime


@dataclass(frozen=True)
class Registers:
    """Every query sees, besides its window, one proxy token for each cell of the whole grid.

    Keys and values of a proxy are the means over its cell. Softmax runs over window and proxies together:
    with (o, l) the output and log-sum-exp of either part, out = (e^l1 o1 + e^l2 o2) / (e^l1 + e^l2).

    Args:
        cell: (frames, rows, columns) that one proxy stands for.
        weigh: proxies count as many keys as they stand for (their logits gain ln n), which is what full attention
            would give if the keys of a cell were alike.

    Raises:
        ValueError: a cell without tokens.
    """

    cell: tuple[int, int, int] = (1, 4, 4)
    weigh: bool = False

    name: ClassVar[str] = "registers"

    def __post_init__(self) -> None:
        if min(self.cell) < 1 or len(self.cell) != 3:
            raise ValueError(f"a register's cell is (frames, rows, columns) of at least 1, got {self.cell}")

    @property
    def dense_only(self) -> bool:
        """Plans may rule what is inside the window."""
        return False

    def at(self, where: Where, runtime: ModelRuntime) -> Self:
        """In every layer and step."""
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, grid: TokenGrid, inner: Inner) -> Tensor:
        """See the class."""
        out, lse = inner(q, k, v, lse=True)
        keys, values = pool_cells(k, grid, self.cell), pool_cells(v, grid, self.cell)
        logits = torch.einsum("bhid,bhjd->bhij", q.float() * scale, keys.float())
        if self.weigh:
            logits = logits + _members(grid, self.cell).log().to(logits.device)
        proxies = torch.einsum("bhij,bhjd->bhid", logits.softmax(-1), values.float())
        return merge_attention(out, lse, proxies.to(out.dtype), logits.logsumexp(-1))[0]


def _members(grid: TokenGrid, cell: tuple[int, int, int]) -> Tensor:
    """float32 (cells,): tokens in each cell; those at far borders may hold fewer."""
    counts = []
    for length, size in zip(grid.shape, cell, strict=True):
        start = torch.arange(0, length, size)
        counts.append((start + size).clamp(max=length) - start)
    return (counts[0][:, None, None] * counts[1][:, None] * counts[2]).float().flatten()


@dataclass(frozen=True)
class Compressed:
    """UltraGen's global branch without its training (arXiv 2510.18775): out = share global + (1 - share) local.

    The global branch is attention among the means over cells of `cell` x `cell` tokens, all frames, brought back to the
    grid linearly. UltraGen learns its pooling, weights and share; here the pooling is the mean that it starts from, the
    weights are the model's own, and the share is fixed.

    Args:
        cell: rows and columns of a cell.
        share: of the global branch, in [0, 1].

    Raises:
        ValueError: a cell below 2, a share outside [0, 1].
    """

    cell: int = 4
    share: float = 0.2

    name: ClassVar[str] = "compressed"

    def __post_init__(self) -> None:
        if self.cell < 2 or not 0 <= self.share <= 1:
            raise ValueError(f"compressed attention needs cells of 2 or more and a share in [0, 1], got {self}")

    @property
    def dense_only(self) -> bool:
        """Plans may rule what is local."""
        return False

    def at(self, where: Where, runtime: ModelRuntime) -> Self:
        """In every layer and step."""
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, grid: TokenGrid, inner: Inner) -> Tensor:
        """See the class."""
        local = inner(q, k, v)
        cell = (1, self.cell, self.cell)
        a, b, c = (pool_cells(x, grid, cell) for x in (q, k, v))
        coarse = spread_cells(F.scaled_dot_product_attention(a, b, c, scale=scale), grid, cell)
        mixed: Tensor = (1 - self.share) * local + self.share * coarse
        return mixed
