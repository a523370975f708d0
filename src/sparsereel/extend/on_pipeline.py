"""What an extension changes on the pipeline around the model: attributes and hooks of this one pipeline, undone by
`restore`. Everything here asks whether its model is still extended, so that a model restored alone is really itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from sparsereel.extend.extension import Extension

_ATTRIBUTE = "_sparsereel_extension"


class OnPipeline:
    """The handles of one pipeline."""

    def __init__(self) -> None:
        self.handles: list[Any] = []

    def remove(self) -> None:
        """Put everything back, latest first."""
        for handle in reversed(self.handles):
            handle.remove()
        self.handles.clear()


def install(pipe: Any, model: nn.Module, extension: Extension) -> None:
    """Change a pipeline as its model's extension asks; on any error nothing is changed.

    Raises:
        ValueError: the recipe does not go with this pipeline.
    """
    held = OnPipeline()
    recipe = extension.recipe
    try:
        vae = getattr(pipe, "vae", None)
        if recipe.statistics is not None and vae is not None:
            held.handles += recipe.statistics.install_vae(vae, extension, model)
    except BaseException:
        held.remove()
        raise
    if held.handles:
        setattr(pipe, _ATTRIBUTE, held)


def remove(pipe_or_model: Any) -> None:
    """Undo `install`; harmless where there is nothing."""
    held = vars(pipe_or_model).pop(_ATTRIBUTE, None) if hasattr(pipe_or_model, "__dict__") else None
    if held is not None:
        held.remove()


def at_work(model: nn.Module, extension: Extension) -> bool:
    """Whether the model is still extended in this way."""
    injection = getattr(model, "_sparsereel_injection", None)
    return injection is not None and injection.runtime.extension is extension
