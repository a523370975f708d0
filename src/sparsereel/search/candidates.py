"""What a head may do: a small grid of arguments for each method, as far as it is distinct and sparse on a token grid.

Sizes are shares of the grid where the method takes them, so that a plan serves other sizes too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sparsereel import patterns, selectors
from sparsereel.grid import TokenGrid
from sparsereel.patterns import Full, Neighborhood, Pattern, Radial, Sink, Skip, SlidingTile, Spatial, Temporal
from sparsereel.plan import AttentionPlan
from sparsereel.plan_entries import Method, Timeline
from sparsereel.presets import load as load_preset
from sparsereel.presets import names as preset_names
from sparsereel.presets import resolve_plan
from sparsereel.selectors import Selector
from sparsereel.token_order import MASKS

if TYPE_CHECKING:
    from sparsereel.inject import PlanLike

#: a pattern that allows more of the pairs than this saves too little to be worth a launch
MOST = 0.9

NAMES = ("full", "skip", "radial", "neighborhood", "sliding_tile", "spatial", "temporal", "block_topk", "spargeattn")


def default_grid() -> dict[str, tuple[Method, ...]]:
    """Candidates by name of their method."""
    near = (Spatial(0), Spatial(1), Spatial(2))
    places = tuple(Temporal(width) for width in (0.05, 0.1, 0.2))
    return {
        "full": (Full(),),
        "skip": (Skip(),),
        "radial": tuple(Radial(decay, sink) for decay in (0.1, 0.2, 0.5, 1.0) for sink in (0, 1)),
        "neighborhood": tuple(_windows()),
        "sliding_tile": tuple(SlidingTile(w) for w in ((0.4, 1.0, 1.0), (1.0, 0.5, 0.5), (0.6, 0.6, 0.6))),
        "spatial": (*near, *(pattern | Sink(1) for pattern in near)),
        "temporal": (*places, *(pattern | Sink(1) for pattern in places)),
        "block_topk": tuple(selectors.BlockTopk(density) for density in (0.1, 0.2, 0.4)),
        "spargeattn": (selectors.Spargeattn(density=0.3),),
    }


def _windows() -> Iterator[Method]:
    for window in ((0.6, 0.6, 0.6), (1.0, 0.4, 0.4), (0.35, 0.7, 0.7)):
        yield Neighborhood(window)
        yield Neighborhood(window) | Sink(1)
    yield Neighborhood((0.6, 0.6, 0.6), stride=(2, 8, 8))


def resolve(
    given: Sequence[str | Pattern | Selector] | None, refine: PlanLike | None, grid: TokenGrid
) -> tuple[Method, ...]:
    """The candidates for a grid: `full` first, then all others that are distinct and sparse there.

    Args:
        given: names of methods, patterns, selectors; None = `default_grid`.
        refine: a plan whose methods are the candidates.

    Raises:
        ValueError: an unknown name, both arguments, nothing but `full`.
    """
    if given is not None and refine is not None:
        raise ValueError("give either candidates or a plan to refine, not both")
    wanted = methods_of(refine) if refine is not None else _named(given)
    found: list[Method] = [Full()]
    seen: list[Pattern] = []
    for method in dict.fromkeys(wanted):
        if isinstance(method, Full):
            continue
        if isinstance(method, (Selector, Skip)) or _worth(method, grid, seen):
            found.append(method)
    if len(found) == 1:
        raise ValueError(f"no candidate besides full is sparse on {grid}; asked for: {_listed(wanted)}")
    return tuple(found)


def _named(given: Sequence[str | Pattern | Selector] | None) -> list[Method]:
    grid = default_grid()
    if given is None:
        # What presets do is tried as well, so that the result can be told apart from every one of them.
        hand_set = [method for plan in general_presets().values() for method in methods_of(plan)]
        return [method for methods in grid.values() for method in methods] + hand_set
    if isinstance(given, str) or not given:
        raise ValueError(f"candidates must be a list of names, patterns or selectors, got {given!r}")
    wanted: list[Method] = []
    for entry in given:
        if isinstance(entry, (Pattern, Selector)):
            wanted.append(entry)
            continue
        name = str(entry).strip().replace("-", "_")
        if name in grid:
            wanted += grid[name]
        elif name in selectors.names():
            wanted.append(selectors.make(name))
        else:
            own = [name for name in selectors.names() if name not in grid]
            raise ValueError(f"unknown candidate {entry!r}; allowed: {', '.join([*grid, *own])}")
    return wanted


def general_presets() -> dict[str, AttentionPlan]:
    """The presets that are for no model in particular, by name."""
    plans = {name: load_preset(name) for name in preset_names()}
    return {name: plan for name, plan in plans.items() if plan.model.family == "any"}


def methods_of(plan: PlanLike) -> list[Method]:
    """What the heads of a plan do at any step, sinks included, in the order of the plan."""
    resolved = resolve_plan(plan)
    wanted: list[Method] = []
    for _, layers in resolved.components:
        for _, entry in layers:
            for choice in (entry.default, *(choice for _, choice in entry.heads)):
                uses = [use for _, use in choice.stretches] if isinstance(choice, Timeline) else [choice]
                wanted += [kept_sinks(resolved.pattern_of(use), resolved.keep_sinks) for use in uses]
    return wanted


def kept_sinks(method: Method, keep: bool) -> Method:
    """`method` as a candidate does what a plan with `keep_sinks` makes of it."""
    # A pattern that keeps sinks has no name in plans; the combination of its parts does.
    if not keep or isinstance(method, (Full, Skip, Selector)):
        return method
    return method | patterns.Sink(1)


def _worth(pattern: Pattern, grid: TokenGrid, seen: list[Pattern]) -> bool:
    mask = MASKS.get((pattern,), grid)
    if mask is None or mask.token_density > MOST:
        return False
    for other in seen:
        known = MASKS.get((other,), grid)
        if known is not None and _alike(mask, known):
            return False
    seen.append(pattern)
    return True


def _alike(one: object, other: object) -> bool:
    """Whether two masks allow the same pairs; masks are built in one way, so equal pairs have equal lists."""
    from sparsereel.mask_cache import FIELDS

    a, b = ([getattr(mask, name) for name in FIELDS] for mask in (one, other))
    return all(x.shape == y.shape and bool((x == y).all()) for x, y in zip(a, b, strict=True))


def _listed(methods: Sequence[Method]) -> str:
    return ", ".join(map(str, methods))
