"""What queries may see in a larger grid: windows of the trained size, or regions in turn; and how sharp softmax is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from sparsereel.extend.regions import Regions
from sparsereel.extend.sizes import Triple
from sparsereel.patterns.base import Pattern
from sparsereel.patterns.neighborhood import Neighborhood
from sparsereel.patterns.sink import Sink


@dataclass(frozen=True)
class InwardWindow:
    """Each query sees a window of the trained size around it, shifted inward at the borders (FreeSwim, 2511.14712).

    With d = floor(trained / 2) an axis that grew has windows of 2 d + 1 positions, everywhere the same number; an axis
    that did not grow is seen whole. So a query's context is as large as any that the model was trained on.

    Args:
        time, space: axes that have a window at all.
        sink: frames at the beginning that every query sees besides.

    Raises:
        ValueError: neither axis, or a negative sink.
    """

    time: bool = True
    space: bool = True
    sink: int = 0

    name: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        if not (self.time or self.space) or self.sink < 0:
            raise ValueError(f"a window needs an axis, and a sink of no fewer than 0 frames, got {self}")

    def pattern(self, tokens: Triple, trained: Triple, layer: int) -> Pattern | None:
        """The window of a layer; None where everything is seen."""
        windowed = (self.time, self.space, self.space)
        sizes = [
            min(length, 2 * (old // 2) + 1) if length > old and axis else length
            for length, old, axis in zip(tokens, trained, windowed, strict=True)
        ]
        if sizes == list(tokens):
            return None
        near: Pattern = Neighborhood(window=(sizes[0], sizes[1], sizes[2]))
        return near | Sink(frames=self.sink) if self.sink and sizes[0] < tokens[0] else near


@dataclass(frozen=True)
class Alternating:
    """Regions of about the trained size in one layer, a coarse view of the whole picture in the next.

    With n = round(length / trained) along rows and columns: even layers see their own of n x n contiguous regions, odd
    layers every n-th row and column (tokens with the same place modulo n). Each costs 1 / n^2 of full attention, and
    two layers carry a token's message anywhere. "GRI-style": regional and global attention in turn, after the idea of
    A-SDM's global-regional interactive attention (arXiv 2312.15516), whose own form is trained and not published.
    """

    name: ClassVar[str] = "gri"

    def pattern(self, tokens: Triple, trained: Triple, layer: int) -> Pattern | None:
        """The regions of a layer; None where everything is seen."""
        rows, columns = (max(1, round(tokens[axis] / trained[axis])) for axis in (1, 2))
        return None if rows == columns == 1 else Regions(rows, columns, strided=layer % 2 == 1)


@dataclass(frozen=True)
class LocalRegions:
    """K x K regions in even layers, (K + 1) x (K + 1) in odd ones, so that borders move (UltraGen, arXiv 2510.18775).

    K = round(length / trained) along each side, so that a region is about as large as the trained picture.
    """

    name: ClassVar[str] = "regions"

    def pattern(self, tokens: Triple, trained: Triple, layer: int) -> Pattern | None:
        """The regions of a layer; None where everything is seen."""
        rows, columns = (max(1, round(tokens[axis] / trained[axis])) for axis in (1, 2))
        if rows == columns == 1:
            return None
        more = layer % 2
        return Regions(rows + more * (rows > 1), columns + more * (columns > 1))


Window = InwardWindow | Alternating | LocalRegions


@dataclass(frozen=True)
class Entropy:
    """Softmax as sharp as it was over the trained number of keys: the scale times sqrt(ln visible / ln trained).

    FreeSwim multiplies by a constant, 1.046, whatever the size; `constant` is that form.

    Args:
        constant: factor in place of the formula.

    Raises:
        ValueError: a constant that is not positive.
    """

    constant: float | None = None

    name: ClassVar[str] = "entropy"

    def __post_init__(self) -> None:
        if self.constant is not None and self.constant <= 0:
            raise ValueError(f"the factor on the softmax scale must be positive, got {self.constant}")

    def factor(self, tokens: Triple, trained: Triple, pattern: Pattern | None) -> float:
        """For a call over so many tokens, of which `pattern` lets a query see some."""
        if self.constant is not None:
            return self.constant
        seen = tokens
        if isinstance(pattern, Neighborhood):
            seen = pattern.window  # type: ignore[assignment]  # always three ints here
        return math.sqrt(math.log(math.prod(seen)) / math.log(math.prod(trained)))
