"""Plans that come with the library, by name, and everything else that `sparsify` accepts as a plan."""

from __future__ import annotations

from pathlib import Path

from sparsereel.patterns import Pattern
from sparsereel.plan import AttentionPlan
from sparsereel.selectors.base import Selector

FOLDER = Path(__file__).with_name("presets")


def names() -> tuple[str, ...]:
    """Names of the presets."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load(name: str) -> AttentionPlan:
    """The preset `name`; hyphen and underscore are alike.

    Raises:
        ValueError: no such preset; the text lists them.
    """
    known = name.replace("_", "-")
    if known not in names():
        raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(names())}")
    return AttentionPlan.load(FOLDER / f"{known}.yaml")


def resolve_plan(plan: str | Path | AttentionPlan | Pattern | Selector) -> AttentionPlan:
    """The plan that a name, a file, a plan, or a pattern or selector (for every head at every step) stands for.

    Raises:
        ValueError: neither a preset nor a readable plan file, or another kind of object.
    """
    if isinstance(plan, AttentionPlan):
        return plan
    if isinstance(plan, (Pattern, Selector)):
        return AttentionPlan.uniform(plan)
    if isinstance(plan, Path):
        return AttentionPlan.load(plan)
    if not isinstance(plan, str):
        raise ValueError(
            f"a plan is a preset name, a path, an AttentionPlan, a Pattern or a Selector, got {type(plan).__name__}"
        )
    if plan.replace("_", "-") in names():
        return load(plan)
    path = Path(plan)
    if path.suffix in (".yaml", ".yml", ".json") or path.is_file():
        return AttentionPlan.load(path)
    raise ValueError(f"{plan!r} is neither a preset ({', '.join(names())}) nor a plan file (.yaml, .yml, .json)")
