"""Which denoising step is this, of how many?

The scheduler knows; model timesteps are no key (pipelines cast them to bf16 and rescale them). Second-order schedulers
call the model more than once a step and count every call, which is what `step_index` over `len(timesteps)` gives.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch


@dataclass(frozen=True)
class StepInfo:
    """Step `index` (0 = noisiest) of the `total` steps of this run; image-to-image counts only the steps run."""

    index: int
    total: int


class StepSource:
    """Finds the step for one model: from the pipeline that is calling it, else from the pipelines it was given in."""

    def __init__(self) -> None:
        self._pipes: list[weakref.ref[Any]] = []
        self._counters: dict[int, _StepCounter] = {}

    def register(self, pipe: Any) -> None:
        """Remember a pipeline whose scheduler may drive the model outside the pipeline's own call."""
        if not any(ref() is pipe for ref in self._pipes):
            self._pipes.append(weakref.ref(pipe))
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is not None and not hasattr(scheduler, "step_index") and id(scheduler) not in self._counters:
            self._counters[id(scheduler)] = _StepCounter(scheduler)

    def close(self) -> None:
        """Undo what `register` wrapped."""
        for counter in self._counters.values():
            counter.remove()
        self._counters.clear()
        self._pipes.clear()

    def current(self, model: torch.nn.Module) -> StepInfo | None:
        """The step in progress, or None when nothing says."""
        frame = _pipeline_frame(model)
        if frame is not None:
            pipe = frame.f_locals["self"]
            return self._of_scheduler(getattr(pipe, "scheduler", None), frame)
        pipes = [pipe for ref in self._pipes if (pipe := ref()) is not None]
        if len(pipes) != 1:
            return None
        return self._of_scheduler(getattr(pipes[0], "scheduler", None), None)

    def _of_scheduler(self, scheduler: Any, frame: FrameType | None) -> StepInfo | None:
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or len(timesteps) == 0 or getattr(scheduler, "num_inference_steps", 0) is None:
            return None
        if hasattr(scheduler, "step_index"):
            begin = getattr(scheduler, "begin_index", None) or 0
            index = scheduler.step_index
            index = begin if index is None else int(index)
            return _checked(index - begin, len(timesteps) - begin)
        if frame is not None:
            found = _step_of_loop(timesteps, frame)
            if found is not None:
                return found
        counter = self._counters.get(id(scheduler))
        if counter is None or counter.count is None:
            return None
        return _checked(counter.count, len(timesteps))


def _checked(index: int, total: int) -> StepInfo | None:
    return StepInfo(index, total) if 0 <= index < total else None


class _StepCounter:
    """Counts `step` calls of a scheduler that keeps no index; wraps the instance, never the class."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.count: int | None = None
        self._wrap("set_timesteps", self._started)
        self._wrap("step", self._stepped)

    def _wrap(self, name: str, notify: Any) -> None:
        original = getattr(self.scheduler, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            notify()
            return result

        # Pipelines read the signature of `step` and `set_timesteps` to see what they may pass.
        wrapped.__wrapped__ = original  # type: ignore[attr-defined]
        setattr(self.scheduler, name, wrapped)

    def _started(self) -> None:
        self.count = 0

    def _stepped(self) -> None:
        if self.count is not None:
            self.count += 1

    def remove(self) -> None:
        for name in ("set_timesteps", "step"):
            vars(self.scheduler).pop(name, None)


def _pipeline_frame(model: torch.nn.Module) -> FrameType | None:
    """The innermost frame of a pipeline's own call that is running `model` now.

    The pipeline in use is the one whose scheduler counts, whichever of several shares the model.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # Cheap test first: reading f_locals of every frame would copy them.
        if frame.f_code.co_name == "__call__" and "self" in frame.f_code.co_varnames:
            owner = frame.f_locals.get("self")
            if _is_pipeline_with(owner, model):
                return frame
        frame = frame.f_back
    return None


def _is_pipeline_with(owner: Any, model: torch.nn.Module) -> bool:
    if not any(cls.__name__ == "DiffusionPipeline" for cls in type(owner).__mro__):
        return False
    return any(getattr(value, "_orig_mod", value) is model for value in vars(owner).values())


def _step_of_loop(timesteps: torch.Tensor, frame: FrameType) -> StepInfo | None:
    """Step of a pipeline's denoising loop whose scheduler keeps no index: its loop variable `t` in its `timesteps`."""
    t, run = frame.f_locals.get("t"), frame.f_locals.get("timesteps")
    if t is None or not isinstance(run, torch.Tensor) or run.ndim != 1 or len(run) > len(timesteps):
        return None
    hits = (run == t).nonzero().flatten()
    return StepInfo(int(hits[0]), len(run)) if len(hits) == 1 else None
