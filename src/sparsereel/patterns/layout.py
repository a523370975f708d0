"""Tokens cut into blocks: the coordinates of each block, and which blocks look alike.

Video grids repeat: in most sequences a few dozen kinds of blocks, seen through one coordinate, make up all of them.
Rules (rules.py) decide once for a pair of kinds instead of once for a pair of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sparsereel.grid import TokenGrid

OUTSIDE = -1


@dataclass(frozen=True)
class Tokens:
    """Coordinates of tokens, int64 tensors of one shape; all are -1 outside the video.

    index: number inside the video, frame-major. place: number inside the frame. t, h, w: frame, row, column.
    """

    index: Tensor
    place: Tensor
    t: Tensor
    h: Tensor
    w: Tensor

    @classmethod
    def of(cls, grid: TokenGrid) -> Tokens:
        """All tokens of the sequence in grid order, [seq_len]."""
        index = grid.video_index()
        place = torch.where(index >= 0, index % grid.frame_len, index)
        return cls(index, place, *grid.coordinates())

    def map(self, change: Any) -> Tokens:
        """Apply `change` (tensor -> tensor) to every coordinate."""
        return Tokens(*(change(getattr(self, field.name)) for field in fields(self)))

    @property
    def outside(self) -> Tensor:
        """True for text and conditions."""
        return self.index < 0


@dataclass(frozen=True)
class Coordinate:
    """One number of a token: a field of `Tokens`, divided by `divisor`, then modulo `modulus`; -1 outside the video."""

    field: str
    divisor: int = 1
    modulus: int | None = None

    def of(self, tokens: Tokens) -> Tensor:
        raw: Tensor = getattr(tokens, self.field)
        value = raw // self.divisor
        if self.modulus is not None:
            value = value % self.modulus
        return torch.where(raw < 0, raw, value)


FRAME, ROW, COLUMN = Coordinate("t"), Coordinate("h"), Coordinate("w")
PLACE, INDEX = Coordinate("place"), Coordinate("index")


@dataclass(frozen=True)
class Kinds:
    """Blocks grouped by the coordinates they hold.

    of_block: [n] kind of each block. rows: [kinds, B] coordinates of one such block, less `base` of the block.
    base: [n] smallest coordinate inside the video where kinds are taken up to a shift, else zeros.
    """

    of_block: Tensor
    rows: Tensor
    base: Tensor


class Side:
    """The query side or the key side of an attention: its tokens in blocks of `block`.

    The last block is filled up with copies of the last token, so that "all" and "any" over a block need no exception;
    `valid` in the last block tells how many are real.
    """

    def __init__(self, tokens: Tokens, block: int) -> None:
        self.length = tokens.index.numel()
        self.block = block
        self.count = -(-self.length // block)
        self.valid_in_last = self.length - (self.count - 1) * block
        positions = torch.arange(self.count * block).clamp_(max=self.length - 1).view(self.count, block)
        self.tokens = tokens.map(lambda x: x[positions])
        self._kinds: dict[tuple[Coordinate, bool], Kinds] = {}

    def kinds(self, coordinate: Coordinate, *, shifted: bool = False) -> Kinds:
        """Blocks grouped by `coordinate`; with `shifted` blocks that differ by a constant are of one kind."""
        known = self._kinds.get((coordinate, shifted))
        if known is None:
            known = self._kinds[coordinate, shifted] = self._group(coordinate.of(self.tokens), shifted)
        return known

    def _group(self, values: Tensor, shifted: bool) -> Kinds:
        base = torch.zeros(self.count, dtype=torch.int64)
        if shifted:
            large = torch.iinfo(torch.int64).max
            base = torch.where(values < 0, large, values).amin(1)
            base = torch.where(base == large, 0, base)
            values = torch.where(values < 0, values, values - base[:, None])
        of_block, first = unique_rows(values)
        return Kinds(of_block, values[first], base)

    def extent(self, coordinate: Coordinate) -> tuple[Tensor, Tensor, Tensor]:
        """[n] int32 smallest and largest coordinate inside the video, and whether any token is outside of it.

        A block without video tokens has an empty extent: a smallest (2^29) far above its largest (-2^29).
        """
        values = coordinate.of(self.tokens).to(torch.int32)
        far = torch.tensor(2**29, dtype=torch.int32)
        smallest = torch.where(values < 0, far, values).amin(1)
        largest = torch.where(values < 0, -far, values).amax(1)
        return smallest, largest, (values < 0).any(1)


def _multipliers(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0x5EED)
    return torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1


def hash_rows(rows: Tensor) -> Tensor:
    """[n, m] int64 -> [n] int64; equal rows have equal hashes."""
    return scramble((rows * _multipliers(rows.shape[1])).sum(1))


def scramble(x: Tensor) -> Tensor:
    """Mix the bits of int64 numbers, one to one (products wrap around)."""
    # Only shifts that bring in zeros are one to one under "xor", so the copies of the sign bit are cut off.
    x = (x ^ ((x >> 31) & (2**33 - 1))) * 0x9E3779B97F4A7C1
    return x ^ ((x >> 29) & (2**35 - 1))


def unique_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(inverse [n], first [u]) such that rows[first][inverse] == rows and rows[first] has no duplicates.

    Rows are compared by hash and the result is checked, so a collision costs time, never correctness.
    """
    _, inverse = torch.unique(hash_rows(rows), return_inverse=True)
    first = first_occurrence(inverse)
    if not torch.equal(rows[first[inverse]], rows):
        _, inverse = torch.unique(rows, dim=0, return_inverse=True)
        first = first_occurrence(inverse)
    return inverse, first


def first_occurrence(inverse: Tensor) -> Tensor:
    """Position of the first appearance of 0, 1, ... in `inverse`."""
    count = int(inverse.max()) + 1 if inverse.numel() else 0
    first = torch.full((count,), inverse.numel(), dtype=torch.int64)
    return first.scatter_reduce_(0, inverse, torch.arange(inverse.numel()), "amin")


def distinct_values(rows: Tensor) -> Tensor:
    """[n, B] -> [n, m]: the different values of each row, filled up with repeats."""
    ordered = rows.sort(1).values
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    slot = fresh.cumsum(1) - 1
    # Repeated values land on the slot of their first appearance; slots never reached keep the smallest value.
    out = ordered[:, :1].repeat(1, int(slot.max()) + 1)
    return out.scatter_(1, slot, ordered)
