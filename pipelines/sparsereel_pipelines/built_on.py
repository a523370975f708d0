"""Take over a loaded pipeline, its own defaults and checks included."""

from __future__ import annotations

from typing import Any, TypeVar

from diffusers import DiffusionPipeline, WanPipeline

P = TypeVar("P", bound=type)


def class_on_top(cls: P, pipeline: Any) -> P:
    """`cls`, on top of the class of a Wan pipeline, so that what the latter adds to `WanPipeline` is kept.

    Raises:
        ValueError: another kind of pipeline.
    """
    base = type(pipeline)
    if not issubclass(base, WanPipeline):
        kind = base.__name__ if isinstance(pipeline, DiffusionPipeline) else f"a {base.__name__}"
        raise ValueError(
            f"{cls.__name__} takes the parts of a WanPipeline or of a pipeline built upon it, got {kind}; "
            "sparsereel.sparsify, extend and stream say themselves what they take"
        )
    if issubclass(base, cls):
        return base  # type: ignore[return-value]
    if issubclass(cls, base):
        return cls
    return type(cls.__name__, (cls, base), {"__module__": cls.__module__, "__doc__": cls.__doc__})  # type: ignore[return-value]
