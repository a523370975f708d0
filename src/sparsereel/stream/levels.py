"""Noise levels of a sampler and the step between two of them, frame by frame.

Flow matching: x = (1 - s) x_0 + s noise at level s, and the model predicts v = noise - x_0. Frames of one pass may be
at different levels. Steps are of first order whatever solver the pipeline's scheduler is; its noise levels are kept.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparsereel.stream.noise import NoiseSource

Sampler = Literal["euler", "renoise"]


@dataclass(frozen=True)
class Levels:
    """The sampler of a stream.

    Attributes:
        sigmas: (steps + 1,) float32, falling to 0; `sigmas[n]` is the level of a frame with n steps done.
        timesteps: (steps + 1,) float32, what the model is told; the last is that of a clean frame.
        sampler: "euler" walks along v. "renoise" jumps to the predicted x_0 and adds fresh noise of the next level, as
            models distilled to few steps want (Self-Forcing and its family).
    """

    sigmas: Tensor
    timesteps: Tensor
    sampler: Sampler = "euler"

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return self.sigmas.shape[0] - 1

    def advance(self, x: Tensor, velocity: Tensor, done: Sequence[int], start: int, noise: NoiseSource) -> Tensor:
        """Latents (C, F, h, w) after one step of every frame; `done` counts the steps before it."""
        now, following = (self._of(self.sigmas, [n + ahead for n in done], x) for ahead in (0, 1))
        if self.sampler == "euler":
            return x + (following - now) * velocity
        clean = x - now * velocity
        if max(done) == self.steps - 1 == min(done):
            return clean
        draws = [noise.frames(start + i, start + i + 1, n + 1) for i, n in enumerate(done)]
        return (1 - following) * clean + following * torch.cat(draws, dim=1).to(x)

    def noised(self, clean: Tensor, done: Sequence[int], noise: Tensor) -> Tensor:
        """Clean frames (C, F, h, w) put back to the levels that they had after `done` steps."""
        sigma = self._of(self.sigmas, done, clean)
        return (1 - sigma) * clean + sigma * noise.to(clean)

    @staticmethod
    def _of(values: Tensor, done: Sequence[int], like: Tensor) -> Tensor:
        return values[list(done)].to(like.device).view(1, -1, 1, 1)


def scheduler_levels(scheduler: Any, steps: int) -> Levels:
    """The levels that a pipeline's scheduler uses in so many steps; the scheduler itself is left alone.

    Raises:
        ValueError: no flow-matching scheduler, or one that shifts its levels by the size of the picture.
    """
    config = scheduler.config
    flow = "FlowMatch" in type(scheduler).__name__ or (
        getattr(config, "use_flow_sigmas", False) and config.prediction_type == "flow_prediction"
    )
    if not flow or getattr(config, "use_dynamic_shifting", False):
        raise ValueError(
            f"streaming needs a flow-matching scheduler with a fixed shift; {type(scheduler).__name__} as configured "
            "is none"
        )
    own = copy.deepcopy(scheduler)
    if "num_inference_steps" not in inspect.signature(own.set_timesteps).parameters:
        raise ValueError(f"{type(scheduler).__name__} takes no number of steps")
    own.set_timesteps(steps)
    sigmas, timesteps = own.sigmas.float().cpu(), own.timesteps.float().cpu()
    if sigmas.shape[0] != steps + 1 or timesteps.shape[0] != steps or float(sigmas[-1]) != 0.0:
        raise ValueError(f"{type(scheduler).__name__} does not give {steps} levels that end in 0, as streaming needs")
    return Levels(sigmas, torch.cat([timesteps, torch.zeros(1)]))


def distilled_levels(timesteps: Sequence[float], shift: float) -> Levels:
    """Levels of a few-step model: timesteps out of 1000, each warped by sigma = shift u / (1 + (shift - 1) u).

    Raises:
        ValueError: timesteps that do not fall within 1000 .. 1.
    """
    given = list(timesteps)
    if not given or any(not 0 < t <= 1000 for t in given) or sorted(given, reverse=True) != given:
        raise ValueError(f"timesteps must fall from at most 1000 towards 0, got {given}")
    u = torch.tensor(given, dtype=torch.float64) / 1000
    sigmas = torch.cat([shift * u / (1 + (shift - 1) * u), torch.zeros(1, dtype=torch.float64)]).float()
    return Levels(sigmas, 1000 * sigmas, "renoise")
