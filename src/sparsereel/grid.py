"""Where every token of a sequence sits: frame, row and column of the video, or outside it.

Sizes are counts of tokens after patchify, always in the order (frames, height, width). A sequence is a tuple of
segments; one of them is the video (or the image), the others are text and conditions. Inside the video tokens are
frame-major: token = (t * height + h) * width + w, as diffusers models lay them out. Padding is never part of a grid.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

KINDS = ("video", "image", "text", "condition")
TEXT_SIDES = ("before", "after")


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


@dataclass(frozen=True)
class Segment:
    """One run of tokens: `Segment(kind, frames, height, width)` or `Segment(kind, length=n)`.

    Args:
        kind: "video" or "image" (what patterns act on), "text" or "condition" (sees and is seen by everything).
        frames, height, width: Size in tokens; all three or none.
        length: Number of tokens of a segment that has no geometry.

    Raises:
        ValueError: unknown kind, a size below 1, or neither geometry nor length.
    """

    kind: str
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    length: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"segment kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        sizes = (self.frames, self.height, self.width)
        if all(size is None for size in sizes):
            if self.kind in ("video", "image"):
                raise ValueError(f"a {self.kind} segment needs frames, height and width")
            _positive("segment length", self.length)
            return
        tokens = math.prod(
            _positive(f"segment {n}", s) for n, s in zip(("frames", "height", "width"), sizes, strict=True)
        )
        if self.length not in (0, tokens):
            raise ValueError(f"segment length {self.length} does not equal frames x height x width = {tokens}")
        object.__setattr__(self, "length", tokens)


@dataclass(frozen=True, eq=False)
class Permutation:
    """A reordering of tokens: `x_permuted = x[indices]`.

    Args:
        indices: [S] integers, each of 0..S-1 exactly once.

    Two permutations are equal when their indices are, so they can be part of a cache key.
    """

    indices: Tensor

    def __post_init__(self) -> None:
        indices = self.indices.detach().to("cpu", torch.int64)
        if indices.dim() != 1 or not _is_permutation(indices):
            raise ValueError(f"a permutation needs each of 0..S-1 exactly once, got shape {tuple(self.indices.shape)}")
        object.__setattr__(self, "indices", indices)

    def __len__(self) -> int:
        return self.indices.numel()

    @cached_property
    def inverse(self) -> Permutation:
        """The permutation that undoes this one."""
        inverse = torch.empty_like(self.indices)
        inverse[self.indices] = torch.arange(len(self))
        return Permutation(inverse)

    def apply(self, x: Tensor, dim: int) -> Tensor:
        """Reorder `x` along `dim`, whose size must be the length of the permutation."""
        if x.shape[dim] != len(self):
            raise ValueError(
                f"the permutation has {len(self)} tokens, dimension {dim} of shape {tuple(x.shape)} does not"
            )
        return x.index_select(dim, self.on(x.device))

    def on(self, device: torch.device) -> Tensor:
        """The indices on a device, copied there once: each copy to a GPU would wait for it."""
        if device not in self._copies:
            self._copies[device] = self.indices.to(device)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def digest(self) -> str:
        """Hash of the content, computed once."""
        return hashlib.sha256(self.indices.numpy().tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Permutation) and (self is other or self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True, init=False)
class TokenGrid:
    """The tokens of one attention call: `TokenGrid(frames, height, width, text=0, text_side="after")`.

    The short form of `TokenGrid.of(segments)`; both give equal grids for equal sequences.

    Args:
        frames, height, width: Size of the video in tokens. An image has one frame.
        text: Number of text tokens.
        text_side: Whether the text stands "before" or "after" the video.

    Raises:
        ValueError: a size below 1, negative text, an unknown side.
    """

    segments: tuple[Segment, ...]

    def __init__(self, frames: int, height: int, width: int, text: int = 0, text_side: str = "after") -> None:
        if isinstance(text, bool) or not isinstance(text, int) or text < 0:
            raise ValueError(f"text must be a number of tokens, 0 or more, got {text!r}")
        if text_side not in TEXT_SIDES:
            raise ValueError(f"text_side must be one of {', '.join(TEXT_SIDES)}, got {text_side!r}")
        video = Segment("video", frames, height, width)
        words = (Segment("text", length=text),) if text else ()
        object.__setattr__(self, "segments", (*words, video) if text_side == "before" else (video, *words))

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> TokenGrid:
        """The grid of `segments` in sequence order.

        Exactly one segment is what patterns act on: the "video", or the "image" where there is no video.
        Images beside a video count as conditions.

        Raises:
            ValueError: no such segment, or several.
        """
        segments = tuple(segments)
        videos = [s for s in segments if s.kind == "video"] or [s for s in segments if s.kind == "image"]
        if len(videos) != 1:
            raise ValueError(
                f"a grid needs exactly one video (or, without one, exactly one image) segment, got {len(videos)}; "
                'give reference frames and images the kind "condition"'
            )
        grid = object.__new__(cls)
        object.__setattr__(grid, "segments", segments)
        return grid

    @cached_property
    def _video(self) -> tuple[int, Segment]:
        """Position of the first video token, and the segment."""
        start, image = 0, None
        for segment in self.segments:
            if segment.kind == "video":
                return start, segment
            if segment.kind == "image":
                image = (start, segment)
            start += segment.length
        assert image is not None
        return image

    @property
    def frames(self) -> int:
        """Frames of the video, in tokens."""
        return self._video[1].frames or 0

    @property
    def height(self) -> int:
        """Rows of a frame, in tokens."""
        return self._video[1].height or 0

    @property
    def width(self) -> int:
        """Columns of a frame, in tokens."""
        return self._video[1].width or 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width) of the video, in tokens."""
        return self.frames, self.height, self.width

    @property
    def frame_len(self) -> int:
        """Tokens of one frame."""
        return self.height * self.width

    @property
    def video_start(self) -> int:
        """Position of the first video token in the sequence."""
        return self._video[0]

    @property
    def video_len(self) -> int:
        """Tokens of the video."""
        return self._video[1].length

    @cached_property
    def seq_len(self) -> int:
        """Tokens of the whole sequence."""
        return sum(segment.length for segment in self.segments)

    @property
    def text(self) -> int:
        """Tokens of all text segments."""
        return sum(segment.length for segment in self.segments if segment.kind == "text")

    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """(t, h, w): three int64 tensors [seq_len]; -1 outside the video."""
        index = self.video_index()
        inside = index >= 0
        outside = torch.full_like(index, -1)
        t = torch.where(inside, index // self.frame_len, outside)
        h = torch.where(inside, index % self.frame_len // self.width, outside)
        w = torch.where(inside, index % self.width, outside)
        return t, h, w

    def video_index(self) -> Tensor:
        """[seq_len] int64: number of the token inside the video (0, 1, ...); -1 outside."""
        index = torch.full((self.seq_len,), -1, dtype=torch.int64)
        index[self.video_start : self.video_start + self.video_len] = torch.arange(self.video_len)
        return index

    def tile_order(self, tile: tuple[int, int, int] = (4, 8, 8)) -> Permutation:
        """The order in which the tokens of each 3-D tile are neighbours.

        Tiles follow each other frame-major, and so do the tokens inside a tile. Tiles at the far edges are smaller
        where the grid does not divide; other segments stay where they are.

        Args:
            tile: (frames, height, width) of a tile in tokens; more than the grid has means the whole axis.
        """
        sizes = tuple(tile)
        if len(sizes) != 3:
            raise ValueError(f"tile must be (frames, height, width), got {tile!r}")
        return _tile_order(self, tuple(_positive("tile size", size) for size in sizes))

    def __repr__(self) -> str:
        parts = (
            f"{s.kind} {s.frames}x{s.height}x{s.width}" if s.frames is not None else f"{s.kind} {s.length}"
            for s in self.segments
        )
        return f"TokenGrid({' + '.join(parts)})"


def _is_permutation(indices: Tensor) -> bool:
    if indices.numel() == 0:
        return True
    if int(indices.min()) < 0 or int(indices.max()) >= indices.numel():
        return False
    return bool((torch.bincount(indices, minlength=indices.numel()) == 1).all())


@lru_cache(maxsize=64)
def _tile_order(grid: TokenGrid, tile: tuple[int, ...]) -> Permutation:
    axes = [torch.arange(size) for size in grid.shape]
    counts = [-(-size // step) for size, step in zip(grid.shape, tile, strict=True)]
    t, h, w = (axis // step for axis, step in zip(axes, tile, strict=True))
    tile_number = (t[:, None, None] * counts[1] + h[:, None]) * counts[2] + w
    indices = torch.arange(grid.seq_len)
    stop = grid.video_start + grid.video_len
    indices[grid.video_start : stop] = grid.video_start + tile_number.flatten().argsort(stable=True)
    return Permutation(indices)
