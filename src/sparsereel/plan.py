"""Attention plans: what each head of each layer does at each step of a generation.

    plan = AttentionPlan.load("plan.yaml")
    layers = plan.resolve("transformer", ["blocks.0.attn1", "blocks.1.attn1"], heads=[12, 12])
    layers[1].at(step=7, total=50)            # one pattern a head

Layers and steps that a plan does not name are full. Geometry is in frames, rows and columns or fractions of the grid,
never in blocks, so one plan serves many sizes. plan_parse.py reads plans from plain data, plan_file.py from files;
both are imported when used, since they need PyYAML and `import sparsereel` does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from sparsereel.compensation.base import Compensation
from sparsereel.patterns import AllOf, AnyOf, Full, KeepSinks, Pattern, Skip
from sparsereel.plan_entries import (
    Choice,
    Combined,
    LayerEntry,
    LayerKey,
    LayerPlan,
    Method,
    Named,
    Numbers,
    SinkMap,
    StepRange,
    Timeline,
    Use,
)
from sparsereel.schedule import Schedule
from sparsereel.selectors.base import Selector

__all__ = ["VERSION", "AttentionPlan", "LayerPlan", "ModelSpec", "Schedule"]

VERSION = 1


@dataclass(frozen=True)
class ModelSpec:
    """The model a plan was made for; None (and family "any") fits every model."""

    family: str = "any"
    class_name: str | None = None
    layers: int | None = None
    heads: int | None = None


@dataclass(frozen=True)
class AttentionPlan:
    """What each head of each layer does at each step; see the module docstring. Immutable.

    Args:
        model: The model it was made for.
        schedule: When attention stays dense.
        keep_sinks: Every pattern (but full and skip) and every selector also sees the sinks: those of `sink_map`, or
            without one the first frame of a video.
        sink_map: Where sinks sit in each layer; layers that it does not name have none.
        patterns: Named patterns, (name, pattern) pairs in order.
        components: For each component ("transformer", "unet", or a glob such as "*") its layer entries in order.
        calibration: What a search measured; plain data, carried along.
        source: Where its settings come from: paper, size, steps, claim; plain data, carried along.
        compensation: What makes up for skipped blocks, in every layer; None = nothing does.
    """

    model: ModelSpec = ModelSpec()
    schedule: Schedule = field(default_factory=Schedule)
    keep_sinks: bool = False
    patterns: tuple[tuple[str, Use], ...] = ()
    components: tuple[tuple[str, tuple[tuple[LayerKey, LayerEntry], ...]], ...] = ()
    calibration: dict[str, Any] = field(default_factory=dict, hash=False)
    compensation: Compensation | None = None
    sink_map: SinkMap | None = None
    source: dict[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def uniform(cls, pattern: Method, **options: Any) -> AttentionPlan:
        """The plan that uses `pattern` (or a selector) for every head of every layer at every step.

        Args:
            options: Fields of `Schedule`, `keep_sinks`, `sink_map` and `compensation` (an object or a name).

        Raises:
            ValueError: not a pattern, an unknown option.
        """
        if not isinstance(pattern, (Pattern, Selector)):
            raise ValueError(f"uniform needs a pattern or a selector, such as Radial(), got {pattern!r}")
        others = {name: options.pop(name) for name in ("keep_sinks", "sink_map", "compensation") if name in options}
        valid = [f.name for f in fields(Schedule)]
        unknown = [name for name in options if name not in valid]
        if unknown:
            names = ", ".join([*valid, "keep_sinks", "sink_map", "compensation"])
            raise ValueError(f"unknown plan option {unknown[0]!r}; the options are {names}")
        if isinstance(others.get("compensation"), (str, dict)):
            from sparsereel.compensation import from_plain

            others["compensation"] = from_plain(others["compensation"])
        everywhere = (("*", (("*", LayerEntry(pattern)),)),)
        return cls(schedule=Schedule(**options), components=everywhere, **others)

    @classmethod
    def load(cls, path: str | Path) -> AttentionPlan:
        """The plan in a YAML or JSON file.

        Raises:
            ValueError: one sentence naming the file, the line, the key and what is allowed.
        """
        from sparsereel import plan_file
        from sparsereel.plan_parse import parse_plan

        return parse_plan(*plan_file.read(path))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AttentionPlan:
        """The plan that plain data (of `to_dict`, YAML or JSON) describes.

        Raises:
            ValueError: one sentence naming the key and what is allowed.
        """
        from sparsereel import plan_file
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
        from sparsereel import plan_file

        return plan_file.to_yaml(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write the plan to `path`: JSON where it ends in .json, else YAML; all of it or nothing.

        Raises:
            OSError: the folder is missing or not writable, the disk is full.
        """
        from sparsereel import plan_file

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
                    uses |= dict.fromkeys(self._describe(use) for _, use in stretches)
        schedule = ", ".join(f"{f.name} {getattr(self.schedule, f.name)}" for f in fields(Schedule))
        more = f"; {self.compensation}" if self.compensation is not None else ""
        return f"{', '.join(uses) or 'full'} ({schedule}{more})"

    def _describe(self, use: Use) -> str:
        if self.sink_map is None:
            return str(self._pattern(use, 0))
        return f"{self.pattern_of(use)}{' + mapped sinks' if self.keep_sinks else ''}"

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
            plans.append(LayerPlan(name, index, self._heads(entry, name, index, count)))
        return plans

    def _entries(self, component: str) -> tuple[tuple[LayerKey, LayerEntry], ...]:
        tables = dict(self.components)
        if component in tables:
            return tables[component]
        return next((table for glob, table in self.components if fnmatchcase(component, glob)), ())

    def _heads(
        self, entry: LayerEntry, name: str, layer: int, count: int
    ) -> tuple[tuple[tuple[StepRange | None, Method], ...], ...]:
        for numbers, _ in entry.heads:
            if numbers.largest >= count:
                raise ValueError(f"heads {numbers.text!r}: layer {name} has {count} heads (0-{count - 1})")
        choices = [next((c for numbers, c in entry.heads if head in numbers), entry.default) for head in range(count)]
        return tuple(self._stretches(choice, layer) for choice in choices)

    def _stretches(self, choice: Choice, layer: int) -> tuple[tuple[StepRange | None, Method], ...]:
        if isinstance(choice, Timeline):
            return (*((stretch, self._pattern(use, layer)) for stretch, use in choice.stretches), (None, Full()))
        return ((None, self._pattern(choice, layer)),)

    def _pattern(self, use: Use, layer: int) -> Method:
        pattern = self.pattern_of(use)
        places = () if self.sink_map is None else self.sink_map.places(layer)
        if not self.keep_sinks or isinstance(pattern, (Full, Skip)) or (self.sink_map is not None and not places):
            return pattern
        if isinstance(pattern, Selector):
            return replace(pattern, keep_sinks=True, sinks=places)
        return KeepSinks(pattern, places=places)

    def pattern_of(self, use: Use) -> Method:
        """The pattern or selector that a name or a combination stands for (without kept sinks)."""
        if isinstance(use, Named):
            return self.pattern_of(dict(self.patterns)[use.name])
        if isinstance(use, Combined):
            # The parser and the constructors of AnyOf and AllOf refuse selectors as parts.
            parts = cast(tuple[Pattern, ...], tuple(self.pattern_of(part) for part in use.parts))
            return AnyOf(parts) if use.kind == "any" else AllOf(parts)
        return use


def _check_layer_key(key: LayerKey, component: str, layer_names: Sequence[str]) -> None:
    count = len(layer_names)
    if isinstance(key, Numbers) and key.largest >= count:
        raise ValueError(f"layers {key.text!r}: {component} has {count} layers (0-{count - 1})")
    if isinstance(key, str) and key != "*" and not any(fnmatchcase(name, key) for name in layer_names):
        example = f", such as {layer_names[0]}" if layer_names else ""
        raise ValueError(f"layers {key!r} match none of the {count} layers of {component}{example}")
