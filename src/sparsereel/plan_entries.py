"""The entries of an attention plan: patterns by name, stretches of steps, sets of heads and layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from sparsereel.patterns import Full, Pattern
from sparsereel.patterns.sink_tokens import Place
from sparsereel.schedule import Amount, check_step, share_of
from sparsereel.selectors.base import Selector


@dataclass(frozen=True)
class Named:
    """A pattern of the plan's `patterns` table."""

    name: str


@dataclass(frozen=True)
class Combined:
    """`any` or `all` of parts that are not all plain patterns (those become AnyOf and AllOf at once)."""

    kind: str
    parts: tuple[Use, ...]


Use = Pattern | Selector | Named | Combined

# What a head does in the end: blocks by place, or blocks chosen from q and k.
Method = Pattern | Selector


@dataclass(frozen=True)
class StepRange:
    """A stretch of steps: whole numbers first..last, both included, or shares first..last, the last excluded.

    text: as written in the plan.
    """

    text: str
    first: Amount
    last: Amount

    def __contains__(self, step_of_total: tuple[int, int]) -> bool:
        step, total = step_of_total
        if isinstance(self.first, int):
            return self.first <= step <= self.last
        return share_of(self.first, total) <= step < share_of(self.last, total)


@dataclass(frozen=True)
class Timeline:
    """Different choices at different steps; steps in no stretch are full."""

    stretches: tuple[tuple[StepRange, Use], ...]


Choice = Use | Timeline


@dataclass(frozen=True)
class Numbers:
    """A set of heads or layers: ranges of numbers, or "even" or "odd". text: as written in the plan."""

    text: str
    ranges: tuple[tuple[int, int], ...] = ()

    def __contains__(self, number: int) -> bool:
        if self.ranges:
            return any(first <= number <= last for first, last in self.ranges)
        return number % 2 == (self.text == "odd")

    @property
    def largest(self) -> int:
        """Largest number named; -1 for "even" and "odd", which fit any count."""
        return max((last for _, last in self.ranges), default=-1)

    def overlaps(self, other: Numbers) -> bool:
        """Whether some number is in both."""
        if not self.ranges:
            return self.text == other.text if not other.ranges else other.overlaps(self)
        return any(n in other for first, last in self.ranges for n in range(first, last + 1))


@dataclass(frozen=True)
class LayerEntry:
    """What the heads of some layers do: a default, and heads that differ."""

    default: Choice
    heads: tuple[tuple[Numbers, Choice], ...] = ()


@dataclass(frozen=True)
class SinkMap:
    """Where attention sinks sit, layer by layer: (numbers of layers, places) pairs; see `patterns.SinkTokens`."""

    entries: tuple[tuple[Numbers, tuple[Place, ...]], ...] = ()

    def places(self, layer: int) -> tuple[Place, ...]:
        """The sinks of one layer; none where the map does not name it."""
        return next((places for numbers, places in self.entries if layer in numbers), ())


# Layers are named by number (Numbers) or by a glob over module names (str).
LayerKey = Numbers | str


@dataclass(frozen=True)
class LayerPlan:
    """What one layer does: for each head, (stretch or None for always, method) in order of precedence."""

    name: str
    index: int
    heads: tuple[tuple[tuple[StepRange | None, Method], ...], ...]

    def at(self, step: int, total: int) -> tuple[Method, ...]:
        """One pattern or selector a head at step `step` (from 0) of `total`.

        Raises:
            ValueError: step outside 0..total - 1.
        """
        check_step(step, total)
        return self._always or tuple(_pattern_at(head, step, total) for head in self.heads)

    @cached_property
    def _always(self) -> tuple[Method, ...] | None:
        if all(head[0][0] is None for head in self.heads):
            return tuple(head[0][1] for head in self.heads)
        return None

    @cached_property
    def uniform_full(self) -> bool:
        """Whether every head is full at every step."""
        return all(isinstance(pattern, Full) for pattern in self.distinct())

    @cached_property
    def needs_step(self) -> bool:
        """Whether `at` differs between steps."""
        return self._always is None

    @cached_property
    def has_selectors(self) -> bool:
        """Whether any head chooses its blocks at run time at any step."""
        return any(isinstance(method, Selector) for method in self.distinct())

    def distinct(self) -> set[Method]:
        """All patterns and selectors that occur in any head at any step."""
        return {pattern for head in self.heads for _, pattern in head}

    def describe(self) -> str:
        """Short form for tables: what the heads do, the most frequent first."""
        counts = Counter(self.describe_head(head) for head in range(len(self.heads)))
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{count} x {text}" for text, count in counts.most_common())

    def describe_head(self, head: int) -> str:
        """Short form of what one head does."""
        return _describe_head(self.heads[head])


def _describe_head(head: tuple[tuple[StepRange | None, Method], ...]) -> str:
    if head[0][0] is None:
        return str(head[0][1])
    return "; ".join(f"{pattern} at steps {stretch.text}" for stretch, pattern in head if stretch is not None)


def _pattern_at(head: tuple[tuple[StepRange | None, Method], ...], step: int, total: int) -> Method:
    return next(pattern for stretch, pattern in head if stretch is None or (step, total) in stretch)
