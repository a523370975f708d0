"""What `extend` does, in order: sizes, recipe, plan, and only then the first change to the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsereel.extend import on_pipeline, recipes, sizes
from sparsereel.extend.extension import Extension
from sparsereel.extend.memory import check_loaded
from sparsereel.extend.passes import passes
from sparsereel.families import find, models_of
from sparsereel.inject import Injection, PlanLike, restore, sparsify
from sparsereel.patterns import Full
from sparsereel.plan import AttentionPlan
from sparsereel.presets import resolve_plan
from sparsereel.report import Report


@dataclass(frozen=True)
class ExtensionReport(Report):
    """The receipt of `extend`: a `Report` of the attention layers, and what was asked for.

    Attributes:
        sizes: trained and wanted.
        recipe: what the method stands for.
        notes: what the user should know.
    """

    sizes: sizes.Sizes
    recipe: recipes.Recipe
    notes: tuple[str, ...] = ()

    @property
    def arguments(self) -> dict[str, int]:
        """What to call the pipeline with to get the wanted size."""
        return self.sizes.arguments

    def to_dict(self) -> dict[str, Any]:
        """Plain data: that of `Report`, and under "extension" the sizes and the method."""
        extension = {
            "trained": self.sizes.trained,
            "target": self.sizes.target,
            "tokens": self.sizes.target_tokens,
            "ratios": self.sizes.ratios,
            "arguments": self.arguments,
            "method": self.recipe.describe(),
            "notes": list(self.notes),
        }
        return {**super().to_dict(), "extension": extension}

    def __str__(self) -> str:
        trained, target = ("x".join(map(str, size)) for size in (self.sizes.trained, self.sizes.target))
        tokens = "x".join(map(str, self.sizes.target_tokens))
        call = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        lines = [
            super().__str__(),
            f"extended from {trained} to {target} (tokens {tokens}): {self.recipe.describe()}",
            f"call the pipeline with {call}",
            *self.notes,
        ]
        return "\n".join(lines)


def run_extend(
    pipe: Any, frames: Any, height: Any, width: Any, method: str | recipes.Recipe, plan: PlanLike | None
) -> ExtensionReport:
    """See `sparsereel.extend`."""
    models = models_of(pipe)
    wanted, recipe = choose(pipe, models, frames, height, width, method)
    largest = max(passes(recipe, wanted, 2), key=lambda run: run.total)
    check_loaded(pipe, next(iter(models.values())), wanted, largest.tokens)
    before = [injection for model in models.values() if (injection := _injection(model)) is not None]
    explicit = next((injection.runtime for injection in before if not injection.runtime.dense_as_found), None)
    backend = "auto" if explicit is None or plan is not None else explicit.backend
    resolved = resolve_plan(plan) if plan is not None else None if explicit is None else explicit.plan
    extensions = {name: Extension(wanted, recipe, find(model).name) for name, model in models.items()}  # type: ignore[union-attr]
    if resolved is not None:
        _check(resolved, models, extensions)
    restore(pipe)
    try:
        done = sparsify(pipe, AttentionPlan.uniform(Full()) if resolved is None else resolved, backend=backend)
        for name, model in models.items():
            injection = _injection(model)
            assert injection is not None
            injection.runtime.dense_as_found = resolved is None
            injection.extend(model, extensions[name])
        on_pipeline.install(pipe, models, extensions)
    except BaseException:
        restore(pipe)
        raise
    return ExtensionReport(done.plan, done.layers, wanted, recipe, notes_of(models, wanted, recipe))


def choose(
    pipe: Any, models: dict[str, nn.Module], frames: Any, height: Any, width: Any, method: str | recipes.Recipe
) -> tuple[sizes.Sizes, recipes.Recipe]:
    """Sizes and recipe of a call of `extend`; changes nothing.

    Raises:
        ValueError: as `sparsereel.extend`.
    """
    model = next(iter(models.values()))
    family = find(model)
    assert family is not None
    if family.name not in recipes.METHODS:
        known = ", ".join(recipes.METHODS)
        raise ValueError(f"extend does not know the family {family.name!r}; it knows: {known}")
    wanted = sizes.resolve(pipe, model, frames, height, width)
    return wanted, recipes.resolve(method, family.name, wanted)


def _injection(model: nn.Module) -> Injection | None:
    return getattr(model, "_sparsereel_injection", None)


def _check(plan: AttentionPlan, models: dict[str, nn.Module], extensions: dict[str, Extension]) -> None:
    """Refuse a plan that does not go with the method before anything is touched."""
    for name, model in models.items():
        family = find(model)
        assert family is not None
        layers = family.self_attention(model)
        heads = [family.heads(module) for _, module in layers]
        plans = plan.resolve(name, [layer for layer, _ in layers], heads)
        extensions[name].check_methods({m for p in plans for head in p.heads for _, m in head})


def notes_of(models: dict[str, nn.Module], wanted: sizes.Sizes, recipe: recipes.Recipe) -> tuple[str, ...]:
    """What the user should know about a recipe at this size."""
    notes = []
    longest = max(wanted.ratios)
    if not wanted.grows:
        notes.append("no axis is longer than trained: calls run as without extend")
    elif longest > 4:
        notes.append(f"{longest:g} times the trained length is beyond the 4x for which any method here was published")
    larger = any(ratio > 1 for ratio in wanted.ratios[1:])
    if larger and recipe == recipes.Recipe(time=recipe.time, decay=recipe.decay):
        notes.append("rows and columns are extrapolated plainly")
    target, trained = wanted.target_tokens, wanted.trained_tokens
    if wanted.grows and recipe.window is not None and recipe.window.pattern(target, trained, 0) is None:
        notes.append(f"{recipe.window.name} changes nothing: no axis that it is for has grown enough")
    if wanted.grows and recipe.views is not None and recipe.views.sides(target, trained) == target:
        notes.append("views change nothing: no axis that they are for has grown")
    rope = getattr(next(iter(models.values())), "rope", None)
    if wanted.ratios[0] > 1 and rope is not None and recipe.time.name == "riflex":
        notes.append(_riflex_note(rope, wanted, recipe))
    return tuple(notes)


def _riflex_note(rope: Any, wanted: sizes.Sizes, recipe: recipes.Recipe) -> str:
    from sparsereel.extend.rope import RIFLEx
    from sparsereel.extend.tables import WAN_BASE, known

    policy = known(recipe.time, rope.t_dim)
    assert isinstance(policy, RIFLEx)
    number, period = policy.intrinsic(rope.t_dim, WAN_BASE, wanted.trained_tokens[0])
    length = wanted.target_tokens[0]
    if length <= period:
        return f"riflex changes nothing: {length} latent frames lie within component {number}'s period of {period}"
    return f"riflex lowers component {number} (period {period} latent frames) for a clip of {length}"
