"""Attention plans: what each head of each layer does at each step of a generation.

    plan = AttentionPlan.load("plan.yaml")
    layers = plan.resolve("transformer", ["blocks.0.attn1", "blocks.1.attn1"], heads=[12, 12])
    layers[1].at(step=7, total=50)            # one pattern a head

Layers and steps that a plan does not name are full. Geometry is in frames, rows and columns or fractions of the grid,
never in blocks, so one plan serves many sizes. plan_parse.py reads plans from plain data, plan_file.py from files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsereel import plan_file
from sparsereel.patterns import AllOf, AnyOf, Full, KeepSinks, Pattern, Skip

VERSION = 1
Amount = int | float


def share_of(amount: Amount, total: int) -> int:
    """`amount` of `total` steps: an int is steps, a float a share of the total, rounded up."""
    if isinstance(amount, int):
        return amount
    # Products such as 0.1 * 70 land a hair above the whole number that is meant.
    return math.ceil(amount * total - 1e-9)


@dataclass(frozen=True)
class Schedule:
    """When attention stays dense whatever the patterns say.

    Args:
        dense_first, dense_last: Steps at the start and at the end that stay dense: an int is steps, a float in [0, 1]
        a share
            of the steps run, rounded up. More costs time and keeps quality.
        min_tokens: Sequences shorter than this stay dense.
        max_density: Masks that visit a larger share of blocks than this stay dense.

    Raises:
        ValueError: a value out of range.
    """

    dense_first: Amount = 0
    dense_last: Amount = 0
    min_tokens: int = 0
    max_density: float = 1.0

    def __post_init__(self) -> None:
        for name in ("dense_first", "dense_last"):
            value = getattr(self, name)
            steps = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            share = isinstance(value, float) and 0 <= value <= 1
            if not (steps or share):
                raise ValueError(f"{name} must be a number of steps or a share in [0.0, 1.0], got {value!r}")
        if isinstance(self.min_tokens, bool) or not isinstance(self.min_tokens, int) or self.min_tokens < 0:
            raise ValueError(f"min_tokens must be a number of tokens, 0 or more, got {self.min_tokens!r}")
        number = isinstance(self.max_density, (int, float)) and not isinstance(self.max_density, bool)
        if not number or not 0 < self.max_density <= 1:
            raise ValueError(f"max_density must be above 0 and at most 1, got {self.max_density!r}")

    @property
    def needs_step(self) -> bool:
        """Whether `dense_at` differs between steps."""
        return bool(self.dense_first or self.dense_last)

    def dense_at(self, step: int, total: int) -> bool:
        """Whether step `step` (from 0) of `total` is dense.

        Raises:
            ValueError: step outside 0..total - 1.
        """
        _check_step(step, total)
        return step < share_of(self.dense_first, total) or step >= total - share_of(self.dense_last, total)


def _check_step(step: int, total: int) -> None:
    if not 0 <= step < total:
        raise ValueError(f"step must be in 0..total - 1, got step {step} of {total}")


@dataclass(frozen=True)
class ModelSpec:
    """The model a plan was made for; None (and family "any") fits every model."""

    family: str = "any"
    class_name: str | None = None
    layers: int | None = None
    heads: int | None = None


@dataclass(frozen=True)
class Named:
    """A pattern of the plan's `patterns` table."""

    name: str


@dataclass(frozen=True)
class Combined:
    """`any` or `all` of parts that are not all plain patterns (those become AnyOf and AllOf at once)."""

    kind: str
    parts: tuple[Use, ...]


Use = Pattern | Named | Combined


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


# Layers are named by number (Numbers) or by a glob over module names (str).
LayerKey = Numbers | str


@dataclass(frozen=True)
class LayerPlan:
    """What one layer does: for each head, (stretch or None for always, pattern) in order of precedence."""

    name: str
    index: int
    heads: tuple[tuple[tuple[StepRange | None, Pattern], ...], ...]

    def at(self, step: int, total: int) -> tuple[Pattern, ...]:
        """One pattern a head at step `step` (from 0) of `total`.

        Raises:
            ValueError: step outside 0..total - 1.
        """
        _check_step(step, total)
        return self._always or tuple(_pattern_at(head, step, total) for head in self.heads)

    @cached_property
    def _always(self) -> tuple[Pattern, ...] | None:
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

    def distinct(self) -> set[Pattern]:
        """All patterns that occur in any head at any step."""
        return {pattern for head in self.heads for _, pattern in head}

    def describe(self) -> str:
        """Short form for tables: what the heads do, the most frequent first."""
        counts = Counter(_describe_head(head) for head in self.heads)
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{count} x {text}" for text, count in counts.most_common())


def _describe_head(head: tuple[tuple[StepRange | None, Pattern], ...]) -> str:
    if head[0][0] is None:
        return str(head[0][1])
    return "; ".join(f"{pattern} at steps {stretch.text}" for stretch, pattern in head if stretch is not None)


def _pattern_at(head: tuple[tuple[StepRange | None, Pattern], ...], step: int, total: int) -> Pattern:
    return next(pattern for stretch, pattern in head if stretch is None or (step, total) in stretch)


@dataclass(frozen=True)
class AttentionPlan:
    """What each head of each layer does at each step; see the module docstring. Immutable.

    Args:
        model: The model it was made for.
        schedule: When attention stays dense.
        keep_sinks: Every pattern (but full and skip) also sees the first frame of a video.
        patterns: Named patterns, (name, pattern) pairs in order.
        components: For each component ("transformer", "unet", or a glob such as "*") its layer entries in order.
        calibration: What a search measured; plain data, carried along.
    """

    model: ModelSpec = ModelSpec()
    schedule: Schedule = Schedule()
    keep_sinks: bool = False
    patterns: tuple[tuple[str, Use], ...] = ()
    components: tuple[tuple[str, tuple[tuple[LayerKey, LayerEntry], ...]], ...] = ()
    calibration: dict[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def uniform(cls, pattern: Pattern, **options: Any) -> AttentionPlan:
        """The plan that uses `pattern` for every head of every layer at every step.

        Args:
            options: Fields of `Schedule`, and `keep_sinks`.

        Raises:
            ValueError: not a pattern, an unknown option.
        """
        if not isinstance(pattern, Pattern):
            raise ValueError(f"uniform needs a pattern, such as Radial(), got {pattern!r}")
        keep_sinks = options.pop("keep_sinks", False)
        valid = [f.name for f in fields(Schedule)]
        unknown = [name for name in options if name not in valid]
        if unknown:
            raise ValueError(f"unknown plan option {unknown[0]!r}; the options are {', '.join([*valid, 'keep_sinks'])}")
        everywhere = (("*", (("*", LayerEntry(pattern)),)),)
        return cls(schedule=Schedule(**options), keep_sinks=keep_sinks, components=everywhere)

    @classmethod
    def load(cls, path: str | Path) -> AttentionPlan:
        """The plan in a YAML or JSON file.

        Raises:
            ValueError: one sentence naming the file, the line, the key and what is allowed.
        """
        from sparsereel.plan_parse import parse_plan

        return parse_plan(*plan_file.read(path))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AttentionPlan:
        """The plan that plain data (of `to_dict`, YAML or JSON) describes.

        Raises:
            ValueError: one sentence naming the key and what is allowed.
        """
        from sparsereel.plan_parse import parse_plan

        return parse_plan(data, plan_file.Source())

    def to_dict(self) -> dict[str, Any]:
        """Plain data (dicts, lists, text, numbers) such that `from_dict` gives this plan back.

        Raises:
            ValueError: a pattern of your own class, which has no name in plans.
        """
        from sparsereel.plan_parse import describe_plan

        return describe_plan(self)

    def to_yaml(self) -> str:
        """The plan as YAML text."""
        return plan_file.to_yaml(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write the plan to `path`: JSON where it ends in .json, else YAML; all of it or nothing.

        Raises:
            OSError: the folder is missing or not writable, the disk is full.
        """
        plan_file.write(path, self.to_dict())

    def with_schedule(self, **changes: Any) -> AttentionPlan:
        """The same plan with some fields of the schedule changed."""
        return replace(self, schedule=replace(self.schedule, **changes))

    def check_model(self, family: str, class_name: str, layers: int, heads: int) -> None:
        """Raise ValueError unless this plan fits a model of that family, class, number of layers and heads a layer."""
        wanted = (self.model.family, self.model.class_name, self.model.layers, self.model.heads)
        given = (family, class_name, layers, heads)
        for what, value, found in zip(("family", "class", "layers", "heads"), wanted, given, strict=True):
            if value not in (None, "any", found):
                raise ValueError(f"this plan is for {what} {value}, the model has {what} {found}")

    def describe(self) -> str:
        """One line: the patterns in use and the schedule."""
        uses: dict[str, None] = {}
        for _, layers in self.components:
            for _, entry in layers:
                for choice in (entry.default, *(choice for _, choice in entry.heads)):
                    stretches = choice.stretches if isinstance(choice, Timeline) else ((None, choice),)
                    uses |= dict.fromkeys(str(self._pattern(use)) for _, use in stretches)
        schedule = ", ".join(f"{f.name} {getattr(self.schedule, f.name)}" for f in fields(Schedule))
        return f"{', '.join(uses) or 'full'} ({schedule})"

    def resolve(self, component: str, layer_names: Sequence[str], heads: Sequence[int]) -> list[LayerPlan]:
        """What each layer of one component does.

        A component is found by name, else by the first glob that matches; a layer by number, else by the first glob.

        Args:
            component: Such as "transformer".
            layer_names: Module names of the attention layers, in forward order.
            heads: Number of heads of each.

        Raises:
            ValueError: a layer or a head that the model does not have, a glob that matches no layer.
        """
        entries = self._entries(component)
        for key, _ in entries:
            _check_layer_key(key, component, layer_names)
        numbered = [(key, entry) for key, entry in entries if isinstance(key, Numbers)]
        globs = [(key, entry) for key, entry in entries if isinstance(key, str)]
        plans = []
        for index, (name, count) in enumerate(zip(layer_names, heads, strict=True)):
            found = [entry for key, entry in numbered if index in key]
            found += [entry for key, entry in globs if fnmatchcase(name, key)]
            entry = found[0] if found else LayerEntry(Full())
            plans.append(LayerPlan(name, index, self._heads(entry, name, count)))
        return plans

    def _entries(self, component: str) -> tuple[tuple[LayerKey, LayerEntry], ...]:
        tables = dict(self.components)
        if component in tables:
            return tables[component]
        return next((table for glob, table in self.components if fnmatchcase(component, glob)), ())

    def _heads(
        self, entry: LayerEntry, name: str, count: int
    ) -> tuple[tuple[tuple[StepRange | None, Pattern], ...], ...]:
        for numbers, _ in entry.heads:
            if numbers.largest >= count:
                raise ValueError(f"heads {numbers.text!r}: layer {name} has {count} heads (0-{count - 1})")
        choices = [next((c for numbers, c in entry.heads if head in numbers), entry.default) for head in range(count)]
        return tuple(self._stretches(choice) for choice in choices)

    def _stretches(self, choice: Choice) -> tuple[tuple[StepRange | None, Pattern], ...]:
        if isinstance(choice, Timeline):
            return (*((stretch, self._pattern(use)) for stretch, use in choice.stretches), (None, Full()))
        return ((None, self._pattern(choice)),)

    def _pattern(self, use: Use) -> Pattern:
        pattern = self.pattern_of(use)
        return KeepSinks(pattern) if self.keep_sinks and not isinstance(pattern, (Full, Skip)) else pattern

    def pattern_of(self, use: Use) -> Pattern:
        """The pattern that a name or a combination stands for (without kept sinks)."""
        if isinstance(use, Named):
            return self.pattern_of(dict(self.patterns)[use.name])
        if isinstance(use, Combined):
            parts = tuple(self.pattern_of(part) for part in use.parts)
            return AnyOf(parts) if use.kind == "any" else AllOf(parts)
        return use


def _check_layer_key(key: LayerKey, component: str, layer_names: Sequence[str]) -> None:
    count = len(layer_names)
    if isinstance(key, Numbers) and key.largest >= count:
        raise ValueError(f"layers {key.text!r}: {component} has {count} layers (0-{count - 1})")
    if isinstance(key, str) and key != "*" and not any(fnmatchcase(name, key) for name in layer_names):
        example = f", such as {layer_names[0]}" if layer_names else ""
        raise ValueError(f"layers {key!r} match none of the {count} layers of {component}{example}")
