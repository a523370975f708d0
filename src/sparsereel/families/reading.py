"""Facts that stand in a tensor's values rather than in its shape, such as position numbers of packed tokens.

Pipelines hand the same tensor at every step, so its values are fetched (and a GPU is waited for) once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")

#: tensor: its version and what was read
_KNOWN = WeakIdKeyDictionary()

#: why a family that reads values stays dense while a whole model is compiled
COMPILED = "token positions stand in a tensor's values, which a whole compiled model hides; compile its blocks instead"


def read_once(tensor: torch.Tensor, read: Callable[[torch.Tensor], T]) -> T | None:
    """`read(tensor on the CPU)`, remembered while the tensor lives unchanged; None inside `torch.compile`."""
    if torch.compiler.is_compiling():
        return None
    if tensor.is_inference():
        return read(tensor.cpu())  # its changes are not counted
    known = _KNOWN.get(tensor)
    if known is None or known[:2] != (tensor._version, read):
        known = (tensor._version, read, read(tensor.detach().cpu()))
        _KNOWN[tensor] = known
    result: T = known[2]
    return result


def row_major(ids: torch.Tensor) -> tuple[int, int, int] | None:
    """(height, width, tokens after them) of packed image tokens from their position numbers.

    Args:
        ids: (S, axes) or (B, S, axes); axis 0 is a frame or image number, axes 1 and 2 are row and column. The first
            image is what is generated; tokens with another number, or after its last row, are conditions.

    Returns:
        None where the numbers are not those of one row-major image.
    """
    if ids.ndim == 3:
        if not bool((ids == ids[:1]).all()):
            return None
        ids = ids[0]
    if ids.ndim != 2 or ids.shape[1] < 3 or not len(ids):
        return None
    other = (ids[:, 0] != ids[0, 0]).nonzero()
    first = ids[: int(other[0])] if len(other) else ids
    rows, columns = first[:, 1] - first[0, 1], first[:, 2] - first[0, 2]
    height, width = int(rows.max()) + 1, int(columns.max()) + 1
    size = height * width
    if size > len(first):
        return None
    index = torch.arange(size)
    same = (rows[:size] == index // width) & (columns[:size] == index % width)
    return (height, width, len(ids) - size) if bool(same.all()) else None


def last_video(coordinates: torch.Tensor) -> tuple[int, int, int, int] | None:
    """(tokens before it, frames, height, width) of the video that a sequence ends in, from its tokens' coordinates.

    Args:
        coordinates: (B, 3, S) or, as bounds, (B, 3, S, 2): frame, row and column of every token.

    Returns:
        None where the sequence does not end in frames of equal rows and columns, in time order from the earliest time.
    """
    if coordinates.ndim == 4:
        coordinates = coordinates[..., 0]
    if coordinates.ndim != 3 or not bool((coordinates == coordinates[:1]).all()):
        return None
    t, h, w = coordinates[0]
    tokens = len(t)
    other = (t != t[-1]).nonzero()
    area = tokens - 1 - int(other[-1]) if len(other) else tokens
    rows, columns = h[-area:].unique(), w[-area:].unique()  # sorted
    places = torch.stack([h[-area:], w[-area:]])
    if len(rows) * len(columns) != area or not bool((places == torch.cartesian_prod(rows, columns).T).all()):
        return None
    start = tokens - area
    while start >= area:
        frame = slice(start - area, start)
        same_places = bool((torch.stack([h[frame], w[frame]]) == places).all())
        if not same_places or not bool((t[frame] == t[start - area]).all()) or not bool(t[start - area] < t[start]):
            break
        start -= area
    if bool(t[start] > t.min()):
        return None
    return start, (tokens - start) // area, len(rows), len(columns)


def one_length(mask: torch.Tensor) -> int:
    """The number of kept tokens of a prompt mask (B, S), where it is the same prefix of every sample; else -1."""
    kept = mask != 0
    lengths = kept.sum(1)
    prefix = torch.arange(mask.shape[1]) < lengths[:1]
    return int(lengths[0]) if bool((kept == prefix).all()) else -1
