"""Which denoising step is this, of how many?

The scheduler knows; model timesteps are no key (pipelines cast them to bf16 and rescale them). Second-order schedulers
call the model more than once a step and count every call, which is what `step_index` over `len(timesteps)` gives.
"""

from __future__ import annotations

import copy
import functools
import sys
import weakref
from dataclasses import dataclass
from types import FrameType, MethodType
from typing import Any

import torch

_COUNTER = "_sparsereel_step_counter"
_COUNTED = ("set_timesteps", "step")


@dataclass(frozen=True)
class StepInfo:
    """Step `index` (0 = noisiest) of the `total` steps of this run; image-to-image counts only the steps run."""

    index: int
    total: int


class StepSource:
    """Finds the step for one model: from the pipeline that is calling it, else from the pipelines it was given in."""

    def __init__(self) -> None:
        self._pipes: list[weakref.ref[Any]] = []
        self._counters: list[_StepCounter] = []
        #: the step, where somebody who runs the model without a scheduler says it
        self.told: StepInfo | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> StepSource:
        # A model copied together with its pipeline belongs to that copy; one copied alone, to no pipeline.
        twin = memo[id(self)] = StepSource()
        copied = [memo[id(pipe)] for ref in self._pipes if (pipe := ref()) is not None and id(pipe) in memo]
        twin._pipes = [weakref.ref(pipe) for pipe in copied]
        twin._counters = copy.deepcopy(self._counters, memo) if copied else []
        return twin

    def register(self, pipe: Any) -> None:
        """Remember a pipeline whose scheduler may drive the model outside the pipeline's own call."""
        if any(ref() is pipe for ref in self._pipes):
            return
        self._pipes.append(weakref.ref(pipe))
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is not None and not hasattr(scheduler, "step_index"):
            self._counters.append(_StepCounter.on(scheduler))

    def pipelines(self) -> list[Any]:
        """The pipelines that were registered and still live."""
        return [pipe for ref in self._pipes if (pipe := ref()) is not None]

    def close(self) -> None:
        """Undo what `register` did to schedulers."""
        for counter in self._counters:
            counter.release()
        self._counters.clear()
        self._pipes.clear()

    def current(self, model: torch.nn.Module) -> StepInfo | None:
        """The step in progress, or None when nothing says."""
        if self.told is not None:
            return self.told
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
        counter = getattr(scheduler, _COUNTER, None)
        if counter is None or counter.count is None:
            return None
        return _checked(counter.count, len(timesteps))


def _checked(index: int, total: int) -> StepInfo | None:
    return StepInfo(index, total) if 0 <= index < total else None


class _StepCounter:
    """Counts `step` calls of a scheduler that keeps no index; wraps the instance, never the class.

    One for each scheduler, stored on it: models that are driven by the same scheduler share the count, copies of a
    scheduler count for themselves, and the last model to leave takes it off.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.users = 0
        self.count: int | None = None
        #: what others had set on the instance
        self.found = {name: vars(scheduler)[name] for name in _COUNTED if name in vars(scheduler)}
        for name in _COUNTED:
            setattr(scheduler, name, MethodType(_counted(type(scheduler), name), scheduler))
        setattr(scheduler, _COUNTER, self)

    @classmethod
    def on(cls, scheduler: Any) -> _StepCounter:
        """The counter of `scheduler`, with one user more."""
        counter: _StepCounter = getattr(scheduler, _COUNTER, None) or cls(scheduler)
        counter.users += 1
        return counter

    def called(self, name: str) -> None:
        """`set_timesteps` starts a count, `step` goes on with it."""
        if name == "set_timesteps":
            self.count = 0
        elif self.count is not None:
            self.count += 1

    def release(self) -> None:
        """One user less; the last one leaves the scheduler as it was found."""
        self.users -= 1
        if self.users:
            return
        for name in (*_COUNTED, _COUNTER):
            vars(self.scheduler).pop(name, None)
        vars(self.scheduler).update(self.found)


def _counted(cls: type, name: str) -> Any:
    # Wrapped, because pipelines read the signature of `step` and `set_timesteps` to see what they may pass.
    @functools.wraps(getattr(cls, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        counter: _StepCounter = getattr(self, _COUNTER)
        found = counter.found.get(name)
        result = getattr(cls, name)(self, *args, **kwargs) if found is None else found(*args, **kwargs)
        counter.called(name)
        return result

    return method


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
    hits = (run == t).nonzero().flatten().tolist()
    if len(hits) == 1:
        return StepInfo(hits[0], len(run))
    # PNDM visits a timestep twice; loops count in `i`.
    count = frame.f_locals.get("i")
    return StepInfo(count, len(run)) if isinstance(count, int) and count in hits else None


def seed_of(model: torch.nn.Module) -> int:
    """Seed of the generator that the pipeline in progress was called with; 0 where it was given none."""
    frame = _pipeline_frame(model)
    generator = None if frame is None else frame.f_locals.get("generator")
    if isinstance(generator, list | tuple) and generator:
        generator = generator[0]
    return generator.initial_seed() if isinstance(generator, torch.Generator) else 0
