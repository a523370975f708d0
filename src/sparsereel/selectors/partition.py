"""How the tokens of one call fall into blocks, and which blocks are settled before any score is looked at.

Blocks with text or condition tokens see and are seen by everything, blocks of the first frames are seen by everything
where sinks are kept, and blocks that hold nothing but padding are never chosen. The rest are *candidates*: they compete
for the budget of a selector. Forced blocks come on top of the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsereel.grid import Permutation, TokenGrid
from sparsereel.patterns.sink_tokens import Place, marks_of
from sparsereel_kernels.block_lists import block_counts, check_block

# Numbers that a selector holds at a time in a table over blocks or tokens, where work can be cut: on a CPU few enough
# to stay near its caches, on a GPU enough to fill it.
NUMBERS_AT_ONCE = {"cpu": 2**22}
NUMBERS_ELSEWHERE = 2**25


@dataclass(frozen=True, eq=False)
class Partition:
    """Blocks of one call.

    Attributes:
        length: tokens of the sequence.
        block: (query, key) tokens of a block.
        sees_all: bool [S], queries that see everything.
        seen_by_all: bool [S], keys that everything sees.
        rows: bool [nQ], query blocks with such a query.
        columns: bool [nK], key blocks with such a key.
        video: int64 [V], ascending positions of the video tokens.
        valid: int64 [B or 1], tokens of each sample that are not padding.
    """

    length: int
    block: tuple[int, int]
    sees_all: Tensor
    seen_by_all: Tensor
    rows: Tensor
    columns: Tensor
    video: Tensor
    valid: Tensor

    @classmethod
    def of(
        cls,
        grid: TokenGrid,
        block: tuple[int, int],
        *,
        order: Permutation | None = None,
        sink_frames: int = 0,
        sinks: tuple[Place, ...] = (),
        key_lengths: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Partition:
        """The blocks of a sequence in this order.

        Args:
            order: order of the tokens in the sequence; None = grid order.
            sink_frames: frames at the start of a video that everything sees; an image has none.
            sinks: places of tokens that everything sees, in images too.
            key_lengths: [B], tokens of each sample that are not padding.
        """
        block = check_block(block)
        settled = _settled(grid, block, order, sink_frames if grid.frames > 1 else 0, sinks)
        if key_lengths is None:
            valid = torch.full((1,), grid.seq_len, dtype=torch.int64, device=device)
        else:
            valid = key_lengths.to(device, torch.int64).clamp(0, grid.seq_len)
        return cls(grid.seq_len, block, **{name: tensor.to(device) for name, tensor in settled.items()}, valid=valid)

    def unsettled(self) -> Partition:
        """The same blocks of a sequence whose tokens were moved: nothing is forced by its place."""
        return replace(self, rows=torch.zeros_like(self.rows), columns=torch.zeros_like(self.columns))

    @property
    def counts(self) -> tuple[int, int]:
        """(nQ, nK)."""
        return block_counts((self.length, self.length), self.block)

    @cached_property
    def padded(self) -> bool:
        """Whether any sample has padding."""
        return bool((self.valid < self.length).any())

    @cached_property
    def forces(self) -> bool:
        """Whether any block is forced."""
        return bool(self.rows.any() | self.columns.any())

    @property
    def all_compete(self) -> bool:
        """Whether every key block is a candidate and every key is valid."""
        return not (self.padded or self.forces)

    @cached_property
    def q_sizes(self) -> Tensor:
        """int64 [B or 1, nQ] valid tokens of each query block."""
        return _sizes(self.valid, self.counts[0], self.block[0])

    @cached_property
    def k_sizes(self) -> Tensor:
        """int64 [B or 1, nK] valid tokens of each key block."""
        return _sizes(self.valid, self.counts[1], self.block[1])

    @cached_property
    def present(self) -> Tensor:
        """bool [B or 1, 1, 1, nK]: key blocks with at least one valid token."""
        return (self.k_sizes > 0)[:, None, None]

    @cached_property
    def candidates(self) -> Tensor:
        """bool [B or 1, 1, 1, nK]: key blocks that compete for the budget."""
        return self.present & ~self.columns

    @cached_property
    def candidate_tokens(self) -> Tensor:
        """bool [B or 1, 1, 1, S]: valid keys in candidate blocks."""
        tokens = self.candidates.repeat_interleave(self.block[1], 3)[..., : self.length]
        return tokens & self.valid_tokens[:, None, None]

    @cached_property
    def valid_tokens(self) -> Tensor:
        """bool [B or 1, S]."""
        return torch.arange(self.length, device=self.valid.device) < self.valid[:, None]

    def budget(self, density: float) -> Tensor:
        """int64 [B or 1, 1, 1]: `density` of the candidates, rounded up, at least 1."""
        candidates = self.candidates.sum(-1)
        # Products such as 0.1 * 70 land a hair above the whole number that is meant.
        return (candidates.double() * density - 1e-9).ceil().to(torch.int64).clamp(min=1)

    def finish(self, chosen: Tensor) -> Tensor:
        """Forced blocks added, padding removed, and no row left empty.

        Args:
            chosen: bool [B, H, nQ, nK], changed in place.

        Returns:
            The map. A row that would be empty sees the block of its own tokens; only samples without any valid token
            keep empty rows.
        """
        if self.forces:
            chosen |= self.columns | self.rows[:, None]
        if self.padded:
            chosen &= self.present
        empty = ~chosen.any(-1, keepdim=True)
        if empty.any():
            chosen |= self._own & empty
        return chosen

    @cached_property
    def _own(self) -> Tensor:
        """bool [B or 1, 1, nQ, nK]: the key block where each query block starts, or the last present one."""
        starts = torch.arange(self.counts[0], device=self.valid.device) * self.block[0] // self.block[1]
        last = (self.valid - 1) // self.block[1]
        own = torch.minimum(starts, last[:, None])[:, None, :, None]
        return own == torch.arange(self.counts[1], device=self.valid.device)


def _sizes(valid: Tensor, count: int, block: int) -> Tensor:
    starts = torch.arange(count, device=valid.device) * block
    return (valid[:, None] - starts).clamp(0, block)


@lru_cache(maxsize=64)
def _settled(
    grid: TokenGrid, block: tuple[int, int], order: Permutation | None, sink_frames: int, sinks: tuple[Place, ...]
) -> dict[str, Tensor]:
    """The fields of a Partition that depend on the grid alone, on the CPU."""
    frame = frames_in_order(grid, order)
    outside = frame < 0
    seen = outside | (frame < sink_frames)
    if sinks:
        marked = torch.zeros(grid.seq_len, dtype=torch.bool)
        marked[grid.video_start : grid.video_start + grid.video_len] = marks_of(sinks, grid)
        seen |= marked if order is None else marked[order.indices]
    return {
        "sees_all": outside,
        "seen_by_all": seen,
        "rows": _any(outside, block[0]),
        "columns": _any(seen, block[1]),
        "video": (~outside).nonzero().flatten(),
    }


def frames_in_order(grid: TokenGrid, order: Permutation | None) -> Tensor:
    """int64 [S]: frame of each token of the sequence, -1 for text and conditions.

    Raises:
        ValueError: an order of another length.
    """
    frame = grid.coordinates()[0]
    if order is None:
        return frame
    if len(order) != grid.seq_len:
        raise ValueError(f"the order has {len(order)} tokens, the grid {grid.seq_len}")
    return frame[order.indices]


def _any(tokens: Tensor, block: int) -> Tensor:
    count = math.ceil(tokens.numel() / block)
    return F.pad(tokens, (0, count * block - tokens.numel())).view(count, block).any(1)


def numbers_at_once(x: Tensor) -> int:
    """How many numbers a table on the device of `x` may hold at a time."""
    return NUMBERS_AT_ONCE.get(x.device.type, NUMBERS_ELSEWHERE)


def over_heads(call: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor, numbers: int) -> Tensor:
    """`call(q, k)` for as many heads at a time as keep tables small, put together along the heads.

    Args:
        q, k: [B, H, S, D] and [B, Hkv, S, D]; query heads stay with their key head.
        numbers: size of the table that `call` makes for one head of one sample.
    """
    heads, groups = q.shape[1], k.shape[1]
    ratio = heads // groups
    at_once = max(1, numbers_at_once(q) // max(1, numbers * q.shape[0] * ratio))
    if at_once >= groups:
        return call(q, k)
    parts = (
        call(q[:, start * ratio : (start + at_once) * ratio], k[:, start : start + at_once])
        for start in range(0, groups, at_once)
    )
    return torch.cat(list(parts), 1)
