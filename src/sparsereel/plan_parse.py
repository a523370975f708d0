"""Plans from plain data and back. Every error names the place, what was given and what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from itertools import combinations
from typing import Any, NoReturn

from sparsereel import compensation, patterns, selectors
from sparsereel.patterns import AllOf, AnyOf, Pattern, Skip
from sparsereel.patterns.sink_tokens import Place as SinkPlace
from sparsereel.patterns.sink_tokens import check_places
from sparsereel.plan import VERSION, AttentionPlan, ModelSpec
from sparsereel.plan_entries import (
    Choice,
    Combined,
    LayerEntry,
    LayerKey,
    Named,
    Numbers,
    SinkMap,
    StepRange,
    Timeline,
    Use,
)
from sparsereel.plan_file import Keys, Source
from sparsereel.registry import lists, tuples
from sparsereel.schedule import Schedule
from sparsereel.selectors import Selector

TOP_KEYS = (
    "version",
    "model",
    "schedule",
    "keep_sinks",
    "sink_map",
    "compensation",
    "patterns",
    "components",
    "calibration",
    "source",
)
MODEL_KEYS = {"family": "family", "class": "class_name", "layers": "layers", "heads": "heads"}
WORDS = ("any", "all", "selector")
RANGES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
STEPS = re.compile(r"(\d+)(?:-(\d+))?|(\d*\.\d+)-(\d+\.?\d*)|(\d+)-(\d*\.\d+)")
# Largest layer, head or step number: more is a slip of the keyboard.
LARGEST_NUMBER = 9999


class Place:
    """One entry of the plain data, with what is needed to say where it stands."""

    def __init__(self, value: Any, source: Source, keys: Keys = ()) -> None:
        self.value, self.source, self.keys = value, source, keys

    def fail(self, message: str) -> NoReturn:
        """Raise ValueError for this place."""
        self.source.fail(self.keys, message)

    def checked(self, make: Callable[[], Any]) -> Any:
        """`make()`, with the place in front of what it complains about."""
        try:
            return make()
        except ValueError as error:
            self.fail(str(error))

    def items(self, what: str, allowed: tuple[str, ...] | None = None) -> Iterator[tuple[str, Place]]:
        """(key, place) of a mapping, whose keys must be `allowed` (None = free)."""
        if not isinstance(self.value, dict):
            self.fail(f"{what} must be a mapping, got {_short(self.value)}")
        for key, value in self.value.items():
            place = Place(value, self.source, (*self.keys, key))
            if not isinstance(key, str):
                place.fail(f"keys must be text, got {key!r}")
            if allowed is not None and key not in allowed:
                place.fail(f"unknown key {key!r}; allowed are {', '.join(allowed)}")
            yield key, place

    def elements(self, what: str) -> list[Place]:
        """Places of a list, which must not be empty."""
        if not isinstance(self.value, (list, tuple)) or not self.value:
            self.fail(f"{what} must be a list of at least one entry, got {_short(self.value)}")
        return [Place(value, self.source, (*self.keys, i)) for i, value in enumerate(self.value)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def parse_plan(data: Any, source: Source) -> AttentionPlan:
    """The plan that plain data describes.

    Raises:
        ValueError: the first thing that is wrong.
    """
    root = Place(data, source)
    parts = dict(root.items("a plan", TOP_KEYS))
    version = parts.get("version")
    if version is None or version.value != VERSION or isinstance(version.value, bool):
        given = "none" if version is None else _short(version.value)
        (version or root).fail(f"version must be {VERSION}, got {given}")
    named = _parse_patterns(parts.get("patterns"))
    return AttentionPlan(
        model=_parse_model(parts["model"]) if "model" in parts else ModelSpec(),
        schedule=_parse_schedule(parts["schedule"]) if "schedule" in parts else Schedule(),
        keep_sinks=_parse_flag(parts["keep_sinks"]) if "keep_sinks" in parts else "sink_map" in parts,
        patterns=tuple(named.items()),
        components=_parse_components(parts["components"], named) if "components" in parts else (),
        calibration=_parse_notes(parts["calibration"]) if "calibration" in parts else {},
        source=_parse_notes(parts["source"]) if "source" in parts else {},
        compensation=_parse_compensation(parts.get("compensation")),
        sink_map=_parse_sinks(parts["sink_map"]) if "sink_map" in parts else None,
    )


def _parse_model(place: Place) -> ModelSpec:
    values: dict[str, Any] = {}
    for key, entry in place.items("model", tuple(MODEL_KEYS)):
        number = key in ("layers", "heads")
        fits = isinstance(entry.value, int) and not isinstance(entry.value, bool) and entry.value > 0
        if number and not fits:
            entry.fail(f"{key} must be a whole number above 0, got {_short(entry.value)}")
        if not number and not (isinstance(entry.value, str) and entry.value):
            entry.fail(f"{key} must be a name, got {_short(entry.value)}")
        values[MODEL_KEYS[key]] = entry.value
    return ModelSpec(**values)


def _parse_schedule(place: Place) -> Schedule:
    values: dict[str, Any] = {}
    for key, entry in place.items("schedule", tuple(f.name for f in fields(Schedule))):
        values[key] = entry.value
        entry.checked(lambda: Schedule(**values))
    return Schedule(**values)


def _parse_flag(place: Place) -> bool:
    if not isinstance(place.value, bool):
        place.fail(f"must be true or false, got {_short(place.value)}")
    return bool(place.value)


def _parse_sinks(place: Place) -> SinkMap:
    entries = []
    for key, entry in place.items("sink_map"):
        places: tuple[SinkPlace, ...] = entry.checked(partial(check_places, tuples(entry.value)))
        entries.append((_parse_numbers(key.replace(" ", ""), entry), places, entry))
    _refuse_overlaps("layer", [(numbers, entry) for numbers, _, entry in entries])
    return SinkMap(tuple((numbers, places) for numbers, places, _ in entries))


def _parse_compensation(place: Place | None) -> compensation.Compensation | None:
    if place is None or place.value is None:
        return None
    found: compensation.Compensation = place.checked(lambda: compensation.from_plain(place.value))
    return found


def _parse_patterns(place: Place | None) -> dict[str, Use]:
    named: dict[str, Use] = {}
    if place is None:
        return named
    for name, entry in place.items("patterns"):
        if name in (*patterns.names(), *WORDS):
            entry.fail(f"{name!r} is the name of a pattern itself; choose another")
        # A name may refer to those above it, so chains end.
        named[name] = parse_use(entry, named)
    return named


def parse_use(place: Place, named: dict[str, Use]) -> Use:
    """A pattern or selector: a name, {name: arguments}, {any: [...]}, {all: [...]}, {selector: name, ...}."""
    if isinstance(place.value, str):
        if place.value in named:
            return Named(place.value)
        return _make(place, place.value, {}, named)
    if not isinstance(place.value, dict) or not place.value:
        shapes = "a name, {name: {arguments}}, {any: [...]}, {all: [...]} or {selector: name, arguments}"
        place.fail(f"a pattern must be {shapes}, got {_short(place.value)}")
    if "selector" in place.value:
        selector: Selector = place.checked(lambda: selectors.from_mapping(place.value))
        return selector
    entries = list(place.items("a pattern"))
    if len(entries) != 1:
        place.fail(f"a pattern must have one name, got {', '.join(key for key, _ in entries)}")
    name, arguments = entries[0]
    if name in ("any", "all"):
        return _combine(arguments, name, named)
    return _make(arguments, name, dict(arguments.items(f"the arguments of {name}")), named)


def _make(place: Place, name: str, arguments: dict[str, Place], named: dict[str, Use]) -> Pattern:
    if name.replace("-", "_") not in patterns.names():
        own = f"; named in this plan: {', '.join(named)}" if named else ""
        place.fail(f"unknown pattern {name!r}; the patterns are {', '.join(patterns.names())}{own}")
    values = {key: tuples(entry.value) for key, entry in arguments.items()}
    pattern: Pattern = place.checked(lambda: patterns.make(name, **values))
    return pattern


def _combine(place: Place, kind: str, named: dict[str, Use]) -> Use:
    parts = tuple(parse_use(entry, named) for entry in place.elements(kind))
    if _holds(Selector, parts, named):
        place.fail(f"a selector cannot be part of {kind}: its blocks are known at run time only")
    if _holds(Skip, parts, named):
        place.fail(f"skip cannot be part of {kind}: a head is either skipped or not")
    if all(isinstance(part, Pattern) for part in parts):
        return AnyOf(parts) if kind == "any" else AllOf(parts)  # type: ignore[arg-type]
    return Combined(kind, parts)


def _holds(kind: type, parts: tuple[Use, ...], named: dict[str, Use]) -> bool:
    for part in parts:
        while isinstance(part, Named):
            part = named[part.name]
        if isinstance(part, kind):
            return True
    return False


def _parse_components(place: Place, named: dict[str, Use]) -> tuple[Any, ...]:
    components = []
    for name, component in place.items("components"):
        parts = dict(component.items("a component", ("layers",)))
        if "layers" not in parts:
            component.fail("a component needs the key layers")
        layers = [(_parse_layer_key(key, entry), entry) for key, entry in parts["layers"].items("layers")]
        numbered = [(key, entry) for key, entry in layers if isinstance(key, Numbers)]
        _refuse_overlaps("layer", numbered)
        components.append((name, tuple((key, _parse_layer(entry, named)) for key, entry in layers)))
    return tuple(components)


def _parse_layer_key(key: str, place: Place) -> LayerKey:
    compact = key.replace(" ", "")
    if not compact:
        place.fail("layers must be named by numbers such as 0-3 or by a glob over module names")
    return _parse_numbers(compact, place) if set(compact) <= set("0123456789,-") else key


def _parse_numbers(text: str, place: Place) -> Numbers:
    if not RANGES.fullmatch(text):
        place.fail(f'expected numbers and ranges such as "0,3,7-9", got {text!r}')
    ranges = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        ranges.append((int(first), int(last or first)))
        if ranges[-1][0] > ranges[-1][1] or ranges[-1][1] > LARGEST_NUMBER:
            place.fail(f"the range {part!r} must run upwards and end at {LARGEST_NUMBER} or below")
    numbers = [n for first, last in ranges for n in range(first, last + 1)]
    if len(set(numbers)) != len(numbers):
        place.fail(f"number {next(n for n in numbers if numbers.count(n) > 1)} is named twice in {text!r}")
    return Numbers(text, tuple(ranges))


def _refuse_overlaps(what: str, entries: list[tuple[Numbers, Place]]) -> None:
    for (one, _), (other, place) in combinations(entries, 2):
        if one.overlaps(other):
            place.fail(f"a {what} is named twice: {one.text!r} and {other.text!r} overlap")


def _parse_layer(place: Place, named: dict[str, Use]) -> LayerEntry:
    if not isinstance(place.value, dict) or not {"default", "heads"} & place.value.keys():
        return LayerEntry(_parse_choice(place, named))
    parts = dict(place.items("a layer", ("default", "heads")))
    default = _parse_choice(parts["default"], named) if "default" in parts else patterns.Full()
    if "heads" not in parts:
        return LayerEntry(default)
    heads = [(_parse_heads(key, entry), entry) for key, entry in parts["heads"].items("heads")]
    _refuse_overlaps("head", heads)
    return LayerEntry(default, tuple((numbers, _parse_choice(entry, named)) for numbers, entry in heads))


def _parse_heads(key: str, place: Place) -> Numbers:
    compact = key.replace(" ", "")
    if compact in ("even", "odd"):
        return Numbers(compact)
    if not RANGES.fullmatch(compact):
        place.fail(f'heads must be numbers and ranges such as "0,3,7-9", or even, or odd, got {key!r}')
    return _parse_numbers(compact, place)


def _parse_choice(place: Place, named: dict[str, Use]) -> Choice:
    """A pattern, or a list of {steps: ..., use: pattern}."""
    if not isinstance(place.value, list):
        return parse_use(place, named)
    stretches = []
    for entry in place.elements("a list of step ranges"):
        parts = dict(entry.items("an entry of a list of step ranges", ("steps", "use")))
        if parts.keys() != {"steps", "use"}:
            entry.fail("an entry of a list of step ranges needs the keys steps and use")
        stretches.append((_parse_steps(parts["steps"]), parse_use(parts["use"], named)))
    _check_stretches(place, [stretch for stretch, _ in stretches])
    return Timeline(tuple(stretches))


def _parse_steps(place: Place) -> StepRange:
    value = place.value
    text = str(value).replace(" ", "") if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    match = STEPS.fullmatch(text)
    if match is None:
        place.fail(f'steps must be whole numbers such as "0-9" or shares such as "0.0-0.4", got {_short(value)}')
    if match[1] is not None:
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last > LARGEST_NUMBER:
            place.fail(f"steps must run upwards and end at {LARGEST_NUMBER} or below, got {text!r}")
        return StepRange(text, first, last)
    start, _, stop = text.partition("-")
    if not 0 <= float(start) < float(stop) <= 1:
        place.fail(f"shares of steps must run upwards inside 0.0-1.0, got {text!r}")
    return StepRange(text, float(start), float(stop))


def _check_stretches(place: Place, stretches: list[StepRange]) -> None:
    if len({type(stretch.first) for stretch in stretches}) > 1:
        place.fail("one list of step ranges must use whole numbers or shares, not both")
    for one, other in combinations(sorted(stretches, key=lambda s: s.first), 2):
        touching = other.first <= one.last if isinstance(one.last, int) else other.first < one.last
        if touching:
            place.fail(f"steps {one.text!r} and {other.text!r} overlap")


def _parse_notes(place: Place) -> dict[str, Any]:
    return {key: _plain_value(entry) for key, entry in place.items("an entry")}


def _plain_value(place: Place) -> Any:
    value = place.value
    if isinstance(value, dict):
        return {key: _plain_value(entry) for key, entry in place.items("an entry")}
    if isinstance(value, (list, tuple)):
        return [_plain_value(Place(v, place.source, (*place.keys, i))) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        place.fail(f"numbers must be finite, got {value}")
    if value is not None and not isinstance(value, (bool, int, float, str)):
        place.fail(f"only text, numbers, true, false, lists and mappings can be stored, got {_short(value)}")
    return value


def describe_plan(plan: AttentionPlan) -> dict[str, Any]:
    """Plain data such that `parse_plan` gives `plan` back."""
    model = {key: getattr(plan.model, name) for key, name in MODEL_KEYS.items()}
    data: dict[str, Any] = {
        "version": VERSION,
        "model": {key: value for key, value in model.items() if value is not None},
        "schedule": {f.name: getattr(plan.schedule, f.name) for f in fields(Schedule)},
        "keep_sinks": plan.keep_sinks,
    }
    if plan.sink_map is not None:
        data["sink_map"] = {numbers.text: lists(places) for numbers, places in plan.sink_map.entries}
    if plan.compensation is not None:
        data["compensation"] = plan.compensation.to_plain()
    if plan.patterns:
        data["patterns"] = {name: describe_use(use) for name, use in plan.patterns}
    data["components"] = {
        name: {"layers": {_key_text(key): _describe_layer(entry) for key, entry in layers}}
        for name, layers in plan.components
    }
    if plan.calibration:
        data["calibration"] = _parse_notes(Place(plan.calibration, Source(), ("calibration",)))
    if plan.source:
        data["source"] = _parse_notes(Place(plan.source, Source(), ("source",)))
    return data


def _key_text(key: LayerKey) -> str:
    return key.text if isinstance(key, Numbers) else key


def _describe_layer(entry: LayerEntry) -> Any:
    default = _describe_choice(entry.default)
    if not entry.heads:
        return default
    return {"default": default, "heads": {numbers.text: _describe_choice(choice) for numbers, choice in entry.heads}}


def _describe_choice(choice: Choice) -> Any:
    if isinstance(choice, Timeline):
        return [{"steps": stretch.text, "use": describe_use(use)} for stretch, use in choice.stretches]
    return describe_use(choice)


def describe_use(use: Use) -> Any:
    """A pattern or selector as plans write it; see `parse_use`."""
    if isinstance(use, Named):
        return use.name
    if isinstance(use, Selector):
        return use.to_mapping()
    if isinstance(use, Combined):
        return {use.kind: [describe_use(part) for part in use.parts]}
    if isinstance(use, (AnyOf, AllOf)):
        return {use.name: [describe_use(part) for part in use.parts]}
    if getattr(use, "name", None) not in patterns.names():
        raise ValueError(f"{use!r} has no name in plans; those that have are {', '.join(patterns.names())}")
    arguments = {key: lists(value) for key, value in use.arguments().items()}
    return {use.name: arguments} if arguments else use.name
