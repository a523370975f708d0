"""Cached residuals: what sparsity lost at the last dense step is added at the sparse steps that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparsereel.compensation.base import Compensation
from sparsereel.patterns import arguments


@dataclass(frozen=True, eq=False)
class CachedResidual(Compensation):
    """out_t = sparse_t + (dense_s - sparse_s), with s the latest step at which both were computed.

    Attention changes slowly from step to step, and what sparsity loses changes more slowly still: the windowed
    attention with residual sharing of DiTFastAttn (arXiv 2406.08552). The difference is measured at the last dense step
    of the schedule, which then costs a sparse call more; without dense steps the first sparse step of each layer runs
    dense to measure it. Every layer, guidance branch and geometry has its own, in the dtype of q: S x H x D numbers a
    layer and branch. Zero, and so exact, where nothing is skipped.

    Args:
        every: measure anew (a dense call) after so many steps; None = never.

    Raises:
        ValueError: every below 1.
    """

    every: int | None = None

    name: ClassVar[str] = "cached_residual"
    remembers: ClassVar[bool] = True

    def check(self) -> None:
        if self.every is not None:
            arguments.at_least_one("every", self.every)


@dataclass(eq=False)
class Residuals:
    """The residuals of one model in one generation.

    Attributes:
        held: (step, residual) by layer, branch and geometry.
    """

    held: dict[Any, tuple[int, Tensor]]

    def at(self, key: Any, step: int, every: int | None) -> Tensor | None:
        """The residual to add at `step`; None where there is none, or it is too old, or of another generation."""
        found = self.held.get(key)
        if found is None:
            return None
        measured, residual = found
        if step <= measured or (every is not None and step - measured > every):
            del self.held[key]
            return None
        return residual

    def hold(self, key: Any, step: int, dense: Tensor, sparse: Tensor) -> None:
        """Remember what the sparse call of this step lost."""
        self.held[key] = (step, (dense - sparse).detach())
