"""Sink tokens: single places of the video that every query sees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns import arguments
from sparsereel.patterns.base import Pattern
from sparsereel.patterns.layout import Tokens
from sparsereel.patterns.rules import Marked, Rule

# A frame, row or column: a number, or a share of the axis.
Where = int | float
Place = tuple[Where, Where, Where]


@dataclass(frozen=True, eq=False)
class SinkTokens(Pattern):
    """Every query sees a few tokens: allowed if (t_k, h_k, w_k) is one of the places. Meant for `|`, like `sink`.

    Attention sinks of diffusion transformers are single patches, mostly of the first frame (Wan, LTX-Video), which
    soak up attention of all queries (RefAM, arXiv 2509.22650); without them a row's weights are spread over the rest.
    `sparsereel inspect --sinks` finds them. A block of keys that holds one is visited by all, so a few columns cost a
    few blocks.

    Args:
        places: (frame, row, column) each; a whole number counts tokens, a float in [0, 1) is a share of the axis
            (floor(share x size)). Places outside the grid are left out.

    Raises:
        ValueError: no places, one that is not three numbers, a negative one, a share of 1 or more.
    """

    places: tuple[Place, ...]

    name: ClassVar[str] = "sink_tokens"

    def __post_init__(self) -> None:
        arguments.store(self, places=check_places(self.places))

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        marks = marks_of(self.places, grid)
        # A grid so small that it holds none of them: everything sees its first token, so that no query is left alone.
        marks[0] |= ~marks.any()
        return marks[k.index.clamp(min=0)].expand(torch.broadcast_shapes(q.t.shape, k.t.shape))

    def rule(self, grid: TokenGrid) -> Rule:
        marks = marks_of(self.places, grid)
        marks[0] |= ~marks.any()
        return Marked("keys", marks)


def check_places(given: object) -> tuple[Place, ...]:
    """Cleaned places.

    Raises:
        ValueError: see `SinkTokens`.
    """
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(f"places must name at least one (frame, row, column), got {given!r}")
    return tuple(_place(place) for place in given)


def _place(place: object) -> Place:
    if not isinstance(place, (list, tuple)) or len(place) != 3:
        raise ValueError(f"a place must be (frame, row, column), got {place!r}")
    for value in place:
        share = isinstance(value, float) and 0 <= value < 1
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not (share or whole):
            raise ValueError(f"a place counts from 0 or is a share in [0.0, 1.0) of the axis, got {value!r}")
    return place[0], place[1], place[2]


def marks_of(places: tuple[Place, ...], grid: TokenGrid) -> Tensor:
    """bool [video tokens]: the tokens at these places."""
    marks = torch.zeros(grid.shape, dtype=torch.bool)
    for place in places:
        token = [v if isinstance(v, int) else math.floor(v * n) for v, n in zip(place, grid.shape, strict=True)]
        if all(t < n for t, n in zip(token, grid.shape, strict=True)):
            marks[tuple(token)] = True
    return marks.flatten()


if __name__ == "__main__":
    from sparsereel.patterns.draw import main

    main(SinkTokens(places=((0, 0.3, 0.5), (0, 0.8, 0.1))))
