"""Patterns made of patterns: `a & b` (YAML `all`), `a | b` (YAML `any`), and the sink frames that a plan keeps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from sparsereel.grid import TokenGrid
from sparsereel.patterns.assemble import rows_with_keys
from sparsereel.patterns.base import Pattern
from sparsereel.patterns.layout import INDEX, Side, Tokens
from sparsereel.patterns.rules import Band, Both, Either, Layout, Marked, Rule
from sparsereel.patterns.sink import Sink
from sparsereel.patterns.sink_tokens import Place, SinkTokens
from sparsereel.patterns.skip import Skip


@dataclass(frozen=True, eq=False)
class _Composition(Pattern):
    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        flat: list[Pattern] = []
        for part in self.parts:
            if not isinstance(part, Pattern):
                raise ValueError(f"{self.name} combines patterns, got {part!r}")
            if isinstance(part, Skip):
                raise ValueError(f"skip cannot be part of {self.name}: a head is either skipped or not")
            flat += part.parts if isinstance(part, type(self)) else (part,)
        if not flat:
            raise ValueError(f"{self.name} needs at least one pattern")
        object.__setattr__(self, "parts", tuple(flat))

    def for_head(self, layer: int, head: int) -> Pattern:
        parts = tuple(part.for_head(layer, head) for part in self.parts)
        return self if parts == self.parts else type(self)(parts)

    def preferred_tile(self, grid: TokenGrid) -> tuple[int, int, int] | None:
        tiles = (part.preferred_tile(grid) for part in self.parts)
        return next((tile for tile in tiles if tile is not None), None)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(str(part) for part in self.parts)})"

    def _masks(self, grid: TokenGrid, layer: int, head: int | None) -> list[Tensor]:
        return [part.token_mask(grid, layer=layer, head=head) for part in self.parts]


@dataclass(frozen=True, eq=False)
class AnyOf(_Composition):
    """A pair is allowed if any part allows it: `a | b`."""

    name: ClassVar[str] = "any"

    @property
    def sees_itself(self) -> bool:  # type: ignore[override]
        return any(part.sees_itself for part in self.parts)

    def token_mask(self, grid: TokenGrid, *, layer: int = 0, head: int | None = None) -> Tensor:
        return reduce(torch.logical_or, self._masks(grid, layer, head))

    def rule(self, grid: TokenGrid) -> Rule:
        return Either(tuple(part.rule(grid) for part in self.parts))


@dataclass(frozen=True, eq=False)
class AllOf(_Composition):
    """A pair is allowed if all parts allow it: `a & b`. A query left without any key sees itself.

    That can only happen with parts such as `sink` and `vertical_stripe`, in which a query need not see itself.
    """

    name: ClassVar[str] = "all"

    @property
    def sees_itself(self) -> bool:  # type: ignore[override]
        return all(part.sees_itself for part in self.parts)

    def token_mask(self, grid: TokenGrid, *, layer: int = 0, head: int | None = None) -> Tensor:
        mask = reduce(torch.logical_and, self._masks(grid, layer, head))
        alone = ~mask.any(1)
        mask[alone, alone] = True
        return mask

    def rule(self, grid: TokenGrid) -> Rule:
        common = Both(tuple(part.rule(grid) for part in self.parts))
        if self.sees_itself:
            return common
        alone = _queries_without_keys(common, grid)
        if not alone.any():
            return common
        return Either((common, Both((Marked("queries", alone), Band(INDEX, before=0, after=0)))))


def _queries_without_keys(rule: Rule, grid: TokenGrid) -> Tensor:
    """bool [video tokens]: queries that the rule leaves without any key in the whole sequence."""
    tokens = Tokens.of(grid)
    seen = rows_with_keys(rule, Layout(Side(tokens, 128), Side(tokens, 64)))
    return ~seen[grid.video_start : grid.video_start + grid.video_len]


@dataclass(frozen=True, eq=False)
class KeepSinks(Pattern):
    """`pattern | sink` in videos, `pattern` alone in one-frame grids, where the first frame would be everything.

    What `keep_sinks: true` in a plan makes of its patterns. With `places`, found by a probe, it is `pattern |
    sink_tokens` instead, in images too: a few columns, not a whole frame.
    """

    pattern: Pattern
    frames: int = 1
    places: tuple[Place, ...] = ()

    name: ClassVar[str] = "keep_sinks"

    @property
    def sees_itself(self) -> bool:  # type: ignore[override]
        return self.pattern.sees_itself

    def __str__(self) -> str:
        return f"{self.pattern} + {f'{len(self.places)} sinks' if self.places else 'first frame'}"

    def _inner(self, grid: TokenGrid) -> Pattern:
        if self.places:
            return self.pattern | SinkTokens(self.places)
        return self.pattern if grid.frames == 1 else self.pattern | Sink(self.frames)

    def for_head(self, layer: int, head: int) -> Pattern:
        pattern = self.pattern.for_head(layer, head)
        return self if pattern == self.pattern else KeepSinks(pattern, self.frames, self.places)

    def preferred_tile(self, grid: TokenGrid) -> tuple[int, int, int] | None:
        return self.pattern.preferred_tile(grid)

    def token_mask(self, grid: TokenGrid, *, layer: int = 0, head: int | None = None) -> Tensor:
        return self._inner(grid).token_mask(grid, layer=layer, head=head)

    def rule(self, grid: TokenGrid) -> Rule:
        return self._inner(grid).rule(grid)
