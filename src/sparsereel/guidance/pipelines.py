"""SoftPAG in ordinary pipelines, which know no guiders: the conditional prediction is moved before CFG sees it.

A pipeline computes uncond + w (cond - uncond). With cond + (s / w) (cond - perturbed) in place of cond the sum becomes

    uncond + w (cond - uncond) + s (cond - perturbed)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from sparsereel.families import models_of
from sparsereel.guidance.perturbation import HeadPerturbation, Perturbing, perturbed
from sparsereel.inject import injection_of, is_sparsified, restore, sparsify
from sparsereel.patterns import Full
from sparsereel.plan import AttentionPlan


@contextmanager
def guided(
    pipe: Any, perturbation: HeadPerturbation, *, scale: float, start: float = 0.0, stop: float = 1.0
) -> Iterator[None]:
    """Calls of `pipe` inside the block are guided away from predictions with perturbed heads.

    Each step from `start` to `stop` (shares of the steps) costs one more forward pass of the conditional branch; where
    a pipeline runs both branches as one batch, one more of the batch. A plan that is in force stays in force.

    Args:
        scale: s; comparable between pipelines with and without classifier-free guidance.

    Raises:
        ValueError: a bare model, an unknown model, a layer or head that it does not have, a scale or stretch of steps
            that is out of range.
    """
    if isinstance(pipe, nn.Module):
        raise ValueError(f"guidance needs a pipeline, got the model {type(pipe).__name__} alone; see perturbed()")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not scale >= 0:
        raise ValueError(f"scale must be a number, 0 or more, got {scale!r}")
    if not 0 <= start <= stop <= 1:
        raise ValueError(f"start and stop must be shares of the steps, 0 <= start <= stop <= 1, got {start} and {stop}")
    models = models_of(pipe)
    own = not any(map(is_sparsified, models.values()))
    with ExitStack() as undo:
        if own:
            sparsify(pipe, AttentionPlan.uniform(Full()))
            undo.callback(restore, pipe)
        for name, model in models.items():
            runtime = injection_of(model).runtime
            runtime.dense_as_found = runtime.dense_as_found or own
            # Refused here rather than in the middle of a run.
            Perturbing(perturbation, runtime)
            undo.callback(_Guide(pipe, name, model, perturbation, float(scale), (start, stop)).install())
        yield


class _Guide:
    """Hooks on one model."""

    def __init__(
        self,
        pipe: Any,
        name: str,
        model: nn.Module,
        perturbation: HeadPerturbation,
        scale: float,
        window: tuple[float, float],
    ) -> None:
        self.pipe, self.name, self.model = pipe, name, model
        self.perturbation, self.scale, self.window = perturbation, scale, window
        self.branch: str | None = None
        self.inside = False
        self.arguments: tuple[Any, Any] | None = None

    def install(self) -> Callable[[], None]:
        """Add the hooks; returns what removes them."""
        handles = [
            # Before all other hooks: the second pass gets what the pipeline gave.
            self.model.register_forward_pre_hook(self._note, prepend=True, with_kwargs=True),
            self.model.register_forward_hook(self._move),
        ]
        found = vars(self.model).get("cache_context")
        context = getattr(self.model, "cache_context", None)
        if context is not None:
            self.model.__dict__["cache_context"] = self._noting(context)

        def remove() -> None:
            for handle in handles:
                handle.remove()
            if context is not None:
                del self.model.__dict__["cache_context"]
            if found is not None:
                self.model.__dict__["cache_context"] = found

        return remove

    def _noting(self, context: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def cache_context(name: str, **kwargs: Any) -> Iterator[Any]:
            before, self.branch = self.branch, name
            try:
                with context(name, **kwargs) as value:
                    yield value
            finally:
                self.branch = before

        return cache_context

    def _note(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.inside:
            self.arguments = (args, kwargs)

    def _move(self, model: nn.Module, args: Any, output: Any) -> Any:
        if self.inside or not self.scale or not self.perturbation.count or not self._in_window():
            return output
        if self.branch is not None and self.branch not in ("cond", "cond_uncond"):
            return output
        assert self.arguments is not None
        given, named = self.arguments
        self.inside = True
        try:
            with perturbed(model, self.perturbation):
                weak = model(*given, **named)
        finally:
            self.inside = False
        return _with_prediction(output, self._moved(_prediction(output), _prediction(weak)))

    def _moved(self, strong: torch.Tensor, weak: torch.Tensor) -> torch.Tensor:
        if not getattr(self.pipe, "do_classifier_free_guidance", False):
            return strong + self.scale * (strong - weak)
        step = self.scale / max(self._guidance_scale(), 1e-6)
        if self.branch == "cond":
            return strong + step * (strong - weak)
        # Both branches in one batch, the conditional one last.
        half = len(strong) // 2
        return torch.cat([strong[:half], strong[half:] + step * (strong[half:] - weak[half:])])

    def _guidance_scale(self) -> float:
        second = getattr(self.pipe, "_guidance_scale_2", None)
        if self.name == "transformer_2" and second is not None:
            return float(second)
        return float(self.pipe.guidance_scale)

    def _in_window(self) -> bool:
        step = injection_of(self.model).runtime.step()
        if step is None:
            raise ValueError("the denoising step is unknown here, so guidance cannot follow start and stop")
        first, last = (share * step.total for share in self.window)
        return first <= step.index < last


def _prediction(output: Any) -> torch.Tensor:
    found = output[0] if isinstance(output, tuple) else output.sample
    assert isinstance(found, torch.Tensor)
    return found


def _with_prediction(output: Any, prediction: torch.Tensor) -> Any:
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    output.sample = prediction
    return output
