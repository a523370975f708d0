"""The latents of the frames in flight: a preallocated window over the endless line of latent frames."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsereel.stream.noise import NoiseSource


class LatentWindow:
    """The newest `capacity` frames; a frame that enters is noise.

    Args:
        capacity: frames held.
        first: number of the first frame of all; may be negative.
    """

    def __init__(self, noise: NoiseSource, capacity: int, device: torch.device, first: int = 0) -> None:
        channels, height, width = noise.shape
        self.noise = noise
        self.data = torch.zeros(channels, capacity, height, width, dtype=torch.float32, device=device)
        self.base = first
        self.stop = first

    def extend(self, stop: int) -> None:
        """Let frames enter, up to but without `stop`; the oldest leave."""
        if stop <= self.stop:
            return
        capacity = self.data.shape[1]
        overflow = stop - self.base - capacity
        if overflow > 0:
            held = self.stop - self.base
            self.data[:, : held - overflow] = self.data[:, overflow:held].clone()
            self.base += overflow
        self.data[:, self.stop - self.base : stop - self.base] = self.noise.frames(self.stop, stop).to(self.data)
        self.stop = stop

    def read(self, start: int, stop: int) -> Tensor:
        """A view (C, stop - start, h, w).

        Raises:
            IndexError: frames that have left or not yet entered.
        """
        if not self.base <= start <= stop <= self.stop:
            raise IndexError(f"frames {start} to {stop} are not among the {self.base} to {self.stop} held")
        return self.data[:, start - self.base : stop - self.base]

    def write(self, start: int, frames: Tensor) -> None:
        """Replace frames from `start` on."""
        self.read(start, start + frames.shape[1]).copy_(frames)
