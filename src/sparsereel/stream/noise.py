"""Noise that depends on the seed, the frame and the draw only, so that any frame's noise can be made again at any time.

A stream therefore needs no state of a random generator: resumed, cut or run at once, it meets the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def frame_noise(seed: int, frame: int, draw: int, shape: tuple[int, ...]) -> Tensor:
    """float32 standard normal noise of one latent frame, on the CPU.

    Args:
        frame: latent frame; may be negative.
        draw: 0 for the noise a frame starts from, the number of done steps for a later one.
    """
    generator = torch.Generator().manual_seed(_mix(_mix(_mix(seed) ^ (frame & _MASK)) ^ draw) >> 1)
    return torch.randn(shape, generator=generator)


def _mix(x: int) -> int:
    """splitmix64's finaliser: neighbouring numbers become unrelated seeds."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@dataclass(frozen=True)
class NoiseSource:
    """Where a stream's noise comes from.

    Args:
        shape: of one frame, (channels, height, width).
        correlation: rho of an order-1 autoregression over the frames of a chunk, z_0 = e_0 and
            z_t = rho z_{t-1} + sqrt(1 - rho^2) e_t. Negative = antiphase, which moves energy to fast changes. 0 =
            independent frames. Every frame stays standard normal.
        chunk: frames after which the recursion starts anew.

    Raises:
        ValueError: correlation outside (-1, 1).
    """

    seed: int
    shape: tuple[int, ...]
    correlation: float = 0.0
    chunk: int = 1

    def __post_init__(self) -> None:
        if not -1 < self.correlation < 1:
            raise ValueError(f"the correlation of neighbouring frames must be in (-1, 1), got {self.correlation}")

    def frames(self, start: int, stop: int, draw: int = 0) -> Tensor:
        """float32 (channels, stop - start, height, width)."""
        return torch.stack([self._frame(frame, draw) for frame in range(start, stop)], dim=1)

    def _frame(self, frame: int, draw: int) -> Tensor:
        if not self.correlation or draw:
            return frame_noise(self.seed, frame, draw, self.shape)
        first = frame - frame % self.chunk
        z = frame_noise(self.seed, first, draw, self.shape)
        for number in range(first + 1, frame + 1):
            z = self.correlation * z + math.sqrt(1 - self.correlation**2) * frame_noise(
                self.seed, number, draw, self.shape
            )
        return z
