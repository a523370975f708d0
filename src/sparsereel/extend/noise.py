"""The noise that a longer clip starts from: shared between windows (FreeNoise), or against the phase (FLEX)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rescheduled:
    """FreeNoise (arXiv 2310.15169): later frames get the noise of earlier ones, shuffled, so that windows agree.

    The first f = trained frames keep their noise. Frames i .. i + stride - 1, for i = f, f + stride ..., take that of
    frames i - f .. i - f + stride - 1 in an order drawn from the user's generator.

    Args:
        stride: frames shuffled together, as a share of the trained length; the paper's 4 of 16.

    Raises:
        ValueError: a stride outside (0, 1].
    """

    stride: float = 0.25

    name: ClassVar[str] = "rescheduled noise"

    def __post_init__(self) -> None:
        if not 0 < self.stride <= 1:
            raise ValueError(f"rescheduled noise needs a stride in (0, 1], got {self.stride}")

    def apply(self, noise: Tensor, trained: int, generator: torch.Generator | None) -> Tensor:
        """Noise (B, C, F, H, W) rearranged; a clip no longer than `trained` latent frames stays as it is."""
        frames = noise.shape[2]
        stride = max(1, round(trained * self.stride))
        order = list(range(min(trained, frames)))
        for start in range(trained, frames, stride):
            earlier = order[start - trained : start - trained + stride]
            device = None if generator is None else generator.device
            places = torch.randperm(len(earlier), generator=generator, device=device).tolist()
            order += [earlier[place] for place in places]
        return noise[:, :, order[:frames]]


@dataclass(frozen=True)
class Antiphase:
    """Neighbouring frames get opposed noise: z_0 = e_0, z_t = rho z_{t-1} + sqrt(1 - rho^2) e_t, e_t ~ N(0, I).

    Every frame stays standard normal; frames h apart correlate by rho^h, so that with rho < 0 energy moves to fast
    changes. FLEX (arXiv 2602.14027) names such noise; its formula is not published, this is the usual reading.

    Args:
        rho: in (-1, 1); beyond -0.7 frames flicker.
        scope: "clip" runs through all frames, "chunk" starts anew every `chunk` latent frames.
        apply_to: "init" is the noise that a clip starts from, "renoise" that which a sampler adds between its steps.

    Raises:
        ValueError: a rho outside (-1, 1), a chunk below 1, an unknown scope or use.
    """

    rho: float = -0.7
    scope: Literal["clip", "chunk"] = "chunk"
    chunk: int = 3
    apply_to: Literal["init", "renoise", "both"] = "init"

    name: ClassVar[str] = "antiphase noise"

    def __post_init__(self) -> None:
        if not -1 < self.rho < 1 or self.chunk < 1:
            raise ValueError(f"antiphase noise needs rho in (-1, 1) and a chunk of 1 or more, got {self}")
        if self.scope not in ("clip", "chunk") or self.apply_to not in ("init", "renoise", "both"):
            raise ValueError(
                "antiphase noise takes scope 'clip' or 'chunk' and apply_to 'init', 'renoise' or 'both', "
                f"got {self.scope!r} and {self.apply_to!r}"
            )

    def apply(self, noise: Tensor, trained: int, generator: torch.Generator | None) -> Tensor:
        """Independent noise (B, C, F, H, W) made antiphase."""
        return self.correlate(noise) if self.apply_to != "renoise" else noise

    def correlate(self, noise: Tensor, before: Tensor | None = None, start: int = 0) -> Tensor:
        """The recursion over the frames of (B, C, F, H, W), in float32.

        Args:
            before: the frame before the first, (B, C, H, W), of a clip that goes on.
            start: number of the first frame in its clip.
        """
        out, last = [], before
        fresh = math.sqrt(1 - self.rho**2)
        for number, frame in enumerate(noise.float().unbind(2), start):
            if last is None or (self.scope == "chunk" and number % self.chunk == 0):
                last = frame
            else:
                last = self.rho * last.float() + fresh * frame
            out.append(last)
        return torch.stack(out, dim=2).to(noise.dtype)

    def renoise(self, stepped: Tensor, clean: Tensor, sigma: float) -> Tensor:
        """A flow-matching sample (1 - sigma) clean + sigma e whose noise e becomes antiphase."""
        if sigma <= 0:
            return stepped
        fresh = (stepped.float() - (1 - sigma) * clean.float()) / sigma
        return ((1 - sigma) * clean.float() + sigma * self.correlate(fresh)).to(stepped.dtype)


Noise = Rescheduled | Antiphase


def redraw(noise: Noise, latents: Any, trained: int, generator: Any) -> Any:
    """What `prepare_latents` returned, with its noise changed: a tensor, or a tuple that begins with it."""
    if isinstance(latents, tuple):
        return (redraw(noise, latents[0], trained, generator), *latents[1:])
    if isinstance(generator, list | tuple):
        generator = generator[0]
    return noise.apply(latents, trained, generator)
