"""Plans that come with the library, by name, and everything else that `sparsify` accepts as a plan."""

from __future__ import annotations

from pathlib import Path

from sparsereel.patterns import Pattern
from sparsereel.plan import AttentionPlan
from sparsereel.selectors.base import Selector

FOLDER = Path(__file__).with_name("presets")


def names() -> tuple[str, ...]:
    """Names of the general presets."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def published(family: str | None = None) -> tuple[str, ...]:
    """Names of the settings that papers published for a model, such as "wan/radial"; those of one family, or all."""
    found = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.yaml"))
    return tuple(name for name in found if family is None or name.startswith(f"{family}/"))


def _known(name: str) -> str | None:
    """The preset that `name` stands for: hyphen and underscore are alike."""
    alike = {known.replace("_", "-"): known for known in (*names(), *published())}
    return alike.get(name.replace("_", "-"))


def _listed() -> str:
    return f"{', '.join(names())}; for one model: {', '.join(published())}"


def load(name: str) -> AttentionPlan:
    """The preset `name`; hyphen and underscore are alike.

    Raises:
        ValueError: no such preset; the text lists them.
    """
    known = _known(name)
    if known is None:
        raise ValueError(f"unknown preset {name!r}; the presets are {_listed()}")
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
    if _known(plan) is not None:
        return load(plan)
    path = Path(plan)
    if path.suffix in (".yaml", ".yml", ".json") or path.is_file():
        return AttentionPlan.load(path)
    raise ValueError(f"{plan!r} is neither a preset ({_listed()}) nor a plan file (.yaml, .yml, .json)")
