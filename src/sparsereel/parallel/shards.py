"""Which tokens each process holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from sparsereel.grid import Permutation, TokenGrid

SPLITS = ("sequence", "segments")


@dataclass(frozen=True)
class Shards:
    """The tokens of a sequence dealt out to processes; in each, they stand in the order of `positions`.

    Attributes:
        lengths: tokens of each rank. They may differ.
        order: place in the grid's sequence of every token, rank after rank; None where that is simply 0, 1, 2 ...
    """

    lengths: tuple[int, ...]
    order: Permutation | None = None

    @classmethod
    def of(cls, grid: TokenGrid, size: int, *, split: str = "sequence", lengths: Sequence[int] | None = None) -> Shards:
        """The tokens of `grid` for `size` processes.

        Args:
            split: "sequence" deals out the whole sequence in one piece a rank (Wan, LTX). "segments" does so for each
                segment of the grid, so that every rank holds some text and some video (Flux, Qwen-Image: text and
                image enter the model as two tensors that are split each for itself).
            lengths: tokens of each rank with the split "sequence"; default as even as they come, longer ones first,
                as `torch.tensor_split` does.

        Raises:
            ValueError: an unknown split, lengths that do not fit.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if size < 1:
            raise ValueError(f"size must be at least 1 process, got {size}")
        if lengths is not None:
            return cls(_checked(lengths, grid.seq_len, size, split))
        if split == "sequence" or len(grid.segments) == 1:
            return cls(_even(grid.seq_len, size))
        pieces: list[list[Tensor]] = [[] for _ in range(size)]
        for segment in torch.arange(grid.seq_len).split([segment.length for segment in grid.segments]):
            for mine, piece in zip(pieces, segment.tensor_split(size), strict=True):
                mine.append(piece)
        ranks = [torch.cat(mine) for mine in pieces]
        return cls(tuple(rank.numel() for rank in ranks), Permutation(torch.cat(ranks)))

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each rank's tokens begin when all are put one after the other."""
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    def span(self, rank: int) -> tuple[int, int]:
        """(start, stop) of a rank's tokens when all are put one after the other."""
        return self.starts[rank], self.starts[rank] + self.lengths[rank]

    def positions(self, rank: int) -> Tensor:
        """int64 [lengths[rank]]: places in the grid's sequence of this rank's tokens: `x[:, shards.positions(rank)]`
        is its shard of x (B, S, ...)."""
        start, stop = self.span(rank)
        return torch.arange(start, stop) if self.order is None else self.order.indices[start:stop]


def _even(length: int, size: int) -> tuple[int, ...]:
    return tuple(length // size + (rank < length % size) for rank in range(size))


def _checked(lengths: Sequence[int], total: int, size: int, split: str) -> tuple[int, ...]:
    if split != "sequence":
        raise ValueError(f'lengths go with split="sequence" only, got split={split!r}')
    found = tuple(int(length) for length in lengths)
    if len(found) != size or sum(found) != total or min(found) < 0:
        raise ValueError(f"lengths must be {size} numbers, 0 or more, that add up to {total} tokens, got {found}")
    return found
