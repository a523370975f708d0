"""From choices to a plan: heads that do the same share an entry, neighbouring stretches of steps too."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from sparsereel.families.layout import decode
from sparsereel.patterns import Full, Skip
from sparsereel.plan import AttentionPlan
from sparsereel.plan_entries import Choice, LayerEntry, LayerKey, LayerPlan, Method, Named, Numbers, StepRange, Timeline
from sparsereel.schedule import Schedule
from sparsereel.search.costs import Item
from sparsereel.search.record import Study
from sparsereel.token_order import Tile, best_tile

#: what a head does in each stretch of steps, as numbers of candidates
Course = tuple[int, ...]


def plan_of(study: Study, items: list[Item], choice: np.ndarray) -> AttentionPlan:
    """The plan in which item i follows candidate `choice[i]`; what was not recorded is full."""
    courses: dict[tuple[str, int], list[list[int]]] = {
        key: [[0] * len(study.buckets) for _ in range(facts.heads)] for key, facts in study.facts.layers.items()
    }
    for item, number in zip(items, choice.tolist(), strict=True):
        courses[item.component, item.layer][item.head][item.bucket] = number
    used = sorted({n for heads in courses.values() for course in heads for n in course})
    names = _names(study.candidates, used)
    components: dict[str, dict[str, LayerEntry]] = {}
    for (component, layer), heads in sorted(courses.items()):
        entry = _entry(study, [tuple(course) for course in heads], names)
        components.setdefault(component, {})[str(layer)] = entry
    return AttentionPlan(
        model=study.facts.spec,
        schedule=Schedule(dense_first=study.settings.dense_first, min_tokens=_least_tokens(study)),
        patterns=tuple((name, study.candidates[number]) for number, name in names.items()),
        components=tuple((component, _joined(layers)) for component, layers in components.items()),
    )


def _least_tokens(study: Study) -> int:
    """Tokens from which on the plan is sparse: of a run that a small one leads, those of the large one."""
    return min(decode(layer.layout).seq_len for layer in study.facts.layers.values()) if study.facts.led else 0


def _names(candidates: tuple[Method, ...], used: list[int]) -> dict[int, str]:
    """Short names such as "radial-2" for the candidates in use."""
    names: dict[int, str] = {}
    counts: Counter[str] = Counter()
    for number in used:
        method = candidates[number]
        if isinstance(method, (Full, Skip)):
            continue
        word = method.parts[0].name + "-sink" if method.name == "any" else method.name  # type: ignore[union-attr]
        counts[word] += 1
        names[number] = f"{word.replace('_', '-')}-{counts[word]}"
    return names


def _entry(study: Study, heads: list[Course], names: dict[int, str]) -> LayerEntry:
    common = Counter(heads).most_common(1)[0][0]
    groups: dict[Course, list[int]] = {}
    for head, course in enumerate(heads):
        if course != common:
            groups.setdefault(course, []).append(head)
    others = tuple((numbers(group), _choice(study, course, names)) for course, group in groups.items())
    return LayerEntry(_choice(study, common, names), others)


def _choice(study: Study, course: Course, names: dict[int, str]) -> Choice:
    if len(set(course)) == 1:
        return _use(study, course[0], names)
    stretches: list[tuple[StepRange, Any]] = []
    first = 0
    for last in range(1, len(course) + 1):
        if last < len(course) and course[last] == course[first]:
            continue
        # Steps in no stretch are full.
        if not isinstance(study.candidates[course[first]], Full):
            a, b = study.buckets[first].stretch, study.buckets[last - 1].stretch
            text = f"{a.text.split('-')[0]}-{b.text.split('-')[1]}"
            stretches.append((StepRange(text, a.first, b.last), _use(study, course[first], names)))
        first = last
    return Timeline(tuple(stretches))


def _use(study: Study, number: int, names: dict[int, str]) -> Named | Method:
    return Named(names[number]) if number in names else study.candidates[number]


def numbers(members: list[int]) -> Numbers:
    """Ascending numbers as plans write them: "0,3,7-9"."""
    ranges: list[tuple[int, int]] = []
    for member in members:
        if ranges and ranges[-1][1] == member - 1:
            ranges[-1] = (ranges[-1][0], member)
        else:
            ranges.append((member, member))
    return Numbers(",".join(f"{a}-{b}" if a < b else str(a) for a, b in ranges), tuple(ranges))


def _joined(layers: dict[str, LayerEntry]) -> tuple[tuple[LayerKey, LayerEntry], ...]:
    groups: dict[LayerEntry, list[int]] = {}
    for layer, entry in layers.items():
        groups.setdefault(entry, []).append(int(layer))
    return tuple((numbers(sorted(group)), entry) for entry, group in groups.items())


def tile_of(study: Study, plan: AttentionPlan) -> Tile | None:
    """The token order that the plan will run in, by the rule of `sparsify`."""
    grids = [decode(layer.layout) for layer in study.facts.layers.values()]
    uses: Counter[Method] = Counter(
        method
        for component in dict.fromkeys(component for component, _ in study.facts.layers)
        for layer in resolved(study, plan, component)
        for head in layer.heads
        for _, method in head
        if not isinstance(method, Full)
    )
    largest = max(grids, key=lambda grid: grid.seq_len)
    every_call = not study.facts.ordered
    return best_tile(uses, largest, every_call=every_call, kernel=study.kernel) if uses else None


def resolved(study: Study, plan: AttentionPlan, component: str) -> list[LayerPlan]:
    """What a plan does in every layer of a component; layers are in forward order."""
    layers = {index: facts for (name, index), facts in study.facts.layers.items() if name == component}
    # Layers that cannot be replaced have a number too.
    known = [layers.get(index) for index in range(max(layers) + 1)]
    names = [facts.name if facts else f"layer {index}" for index, facts in enumerate(known)]
    return plan.resolve(component, names, [facts.heads if facts else 1 for facts in known])
