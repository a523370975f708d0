"""A Wan pipeline whose calls run with sparse attention."""

from __future__ import annotations

from typing import Any

from diffusers import WanPipeline

import sparsereel
from sparsereel_pipelines.built_on import class_on_top


class SparseVideoPipeline(WanPipeline):  # type: ignore[misc]  # diffusers is untyped
    """`WanPipeline` with two more arguments; everything else is that pipeline's.

    Between calls the transformer is the untouched original, so other pipelines may share it.

    Attributes:
        report: what ran in every layer in the last call; None before there was one or if it was dense.
    """

    report: Any = None

    def __call__(self, *args: Any, plan: Any = "radial", backend: str = "auto", **kwargs: Any) -> Any:
        """Generate.

        Args:
            plan: a preset name, a plan file, a plan, pattern or selector; None = dense.
            backend: kernel backend.

        Raises:
            ValueError: what `sparsereel.sparsify` or the pipeline refuses.
        """
        self.report = None
        if plan is None:
            return super().__call__(*args, **kwargs)
        with sparsereel.sparsified(self, plan, backend=backend):
            result = super().__call__(*args, **kwargs)
            self.report = sparsereel.report(self)
        return result

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """The parts of a loaded Wan pipeline, shared with it; see diffusers' `DiffusionPipeline.from_pipe`.

        Raises:
            ValueError: not a Wan pipeline.
        """
        found = class_on_top(cls, pipeline)
        return super(SparseVideoPipeline, found).from_pipe(pipeline, **kwargs)
