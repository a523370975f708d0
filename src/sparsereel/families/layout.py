"""The token layout of one model call as a flat tuple of ints.

Why ints and not a `TokenGrid`: a family computes the layout inside the model's forward, which `torch.compile` may be
tracing; ints from shapes trace without a graph break and travel through a custom op, a validated dataclass does not.
Four ints a segment: kind, then (frames, height, width) for what lies on a grid or (length, 0, 0) for what does not.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from sparsereel.grid import Segment, TokenGrid

Layout = tuple[int, ...]

_KINDS = ("video", "image", "text", "condition")
_ON_GRID = ("video", "image")


def video(frames: int, height: int, width: int) -> Layout:
    """A video segment; sizes in tokens, after patchify."""
    return (0, frames, height, width)


def image(height: int, width: int) -> Layout:
    """One image; sizes in tokens."""
    return (1, 1, height, width)


def text(length: int) -> Layout:
    """Text tokens inside the joint sequence; nothing when there are none."""
    return (2, length, 0, 0) if length else ()


def condition(length: int) -> Layout:
    """Tokens that see and are seen by everything: reference images, history, padding; nothing when there are none."""
    return (3, length, 0, 0) if length else ()


def fixed(layout: Layout) -> Layout:
    """The layout in plain ints: a graph for sizes of any kind becomes one for this size, as token order needs it."""
    if not torch.compiler.is_compiling():
        return layout
    # The length of a list is what the compiler turns into a constant; `int` stays symbolic.
    return tuple(len([0] * size) for size in layout)


@lru_cache(maxsize=256)
def decode(layout: Layout) -> TokenGrid:
    """The grid that a layout stands for.

    Raises:
        ValueError: a size is not positive (the text names the segment).
    """
    segments = []
    for start in range(0, len(layout), 4):
        kind = _KINDS[layout[start]]
        a, b, c = layout[start + 1 : start + 4]
        if kind in _ON_GRID:
            segments.append(Segment(kind, frames=a, height=b, width=c))
        else:
            segments.append(Segment(kind, length=a))
    return TokenGrid.of(tuple(segments))
