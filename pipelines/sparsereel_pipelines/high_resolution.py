"""A Wan pipeline for clips larger or longer than its model was trained for."""

from __future__ import annotations

from typing import Any

from diffusers import WanPipeline

import sparsereel
from sparsereel.families.call_defaults import call_default
from sparsereel_pipelines.built_on import class_on_top


class HighResolutionPipeline(WanPipeline):  # type: ignore[misc]  # diffusers is untyped
    """`WanPipeline` that takes any size; everything else is that pipeline's.

    A call of the trained size is the plain pipeline's, bit for bit. For a larger one `sparsereel.extend` is in place
    while it runs, with or without a sparse plan; without one the cost grows with the square of the tokens.

    Attributes:
        report: what was extended in the last call; None if nothing was.
    """

    report: Any = None

    def __call__(
        self,
        *args: Any,
        height: int | float | None = None,
        width: int | float | None = None,
        num_frames: int | float | None = None,
        method: Any = "auto",
        plan: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Generate.

        Args:
            height, width, num_frames: an int is a size, a float a ratio of the trained one; by keyword.
            method: of `sparsereel.extend`.
            plan: also make the attention sparse.

        Raises:
            ValueError: what `sparsereel.extend` or the pipeline refuses.
        """
        self.report = None
        given = {"height": height, "width": width, "num_frames": num_frames}
        wanted = {name: value for name, value in given.items() if value is not None}
        larger = any(isinstance(size, float) or size != call_default(self, name) for name, size in wanted.items())
        if not larger and plan is None:
            return super().__call__(*args, **wanted, **kwargs)
        named = {name.removeprefix("num_"): size for name, size in wanted.items()}
        if not named:
            with sparsereel.sparsified(self, plan):
                return super().__call__(*args, **kwargs)
        extended = sparsereel.extend(self, **named, method=method, plan=plan)
        try:
            result = super().__call__(*args, **extended.arguments, **kwargs)  # type: ignore[attr-defined]
            self.report = extended
        finally:
            sparsereel.restore(self)
        return result

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """The parts of a loaded Wan pipeline, shared with it; see diffusers' `DiffusionPipeline.from_pipe`.

        Raises:
            ValueError: not a Wan pipeline.
        """
        found = class_on_top(cls, pipeline)
        return super(HighResolutionPipeline, found).from_pipe(pipeline, **kwargs)
