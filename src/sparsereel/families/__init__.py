"""The model families whose attention sparsereel can replace, and how to find the one a model belongs to."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsereel.families.base import Family
from sparsereel.families.cogvideox import CogVideoX
from sparsereel.families.hunyuan_video import HunyuanVideo
from sparsereel.families.stable_diffusion import StableDiffusion
from sparsereel.families.wan import Wan

__all__ = ["FAMILIES", "Family", "find", "models_of", "unwrap"]

FAMILIES: tuple[Family, ...] = (Wan(), HunyuanVideo(), CogVideoX(), StableDiffusion())


def unwrap(model: Any) -> Any:
    """The module behind `torch.compile`'s wrapper."""
    return getattr(model, "_orig_mod", model)


def find(model: Any) -> Family | None:
    """The family of a model, by the names of its class and base classes; None when there is none."""
    names = {cls.__name__ for cls in type(unwrap(model)).__mro__}
    for family in FAMILIES:
        if names.intersection(family.classes):
            return family
    return None


def models_of(pipe_or_model: Any) -> dict[str, nn.Module]:
    """Supported models by component name: those of a pipeline, or the one model given.

    Raises:
        ValueError: nothing here is of a known family; the text lists the known classes.
    """
    if isinstance(pipe_or_model, nn.Module):
        family = find(pipe_or_model)
        found = {} if family is None else {family.component: unwrap(pipe_or_model)}
        given = type(unwrap(pipe_or_model)).__name__
    else:
        components = getattr(pipe_or_model, "components", None)
        if not isinstance(components, dict):
            raise ValueError(
                f"expected a diffusers pipeline or one of its models, got {type(pipe_or_model).__name__}; "
                f"known models: {_known()}"
            )
        modules = {name: value for name, value in components.items() if isinstance(value, nn.Module)}
        found = {name: unwrap(value) for name, value in modules.items() if find(value) is not None}
        given = f"{type(pipe_or_model).__name__} with " + ", ".join(
            sorted({type(unwrap(value)).__name__ for value in modules.values()})
        )
    if not found:
        raise ValueError(f"no model of a known family in {given}; known models: {_known()}")
    return found


def _known() -> str:
    return ", ".join(name for family in FAMILIES for name in family.classes)
