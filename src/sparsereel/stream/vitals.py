"""How a stream is doing: speed, memory, and how far the picture has drifted from where it began."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sparsereel.media import Frames


def peak_memory() -> int:
    """Most bytes of memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory() -> int:
    """Bytes of memory that this process holds now (the peak where the system does not say)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return peak_memory()
    return pages * resource.getpagesize()


@dataclass
class Drift:
    """Mean and deviation of each colour channel against those of the first second.

    Errors that feed on themselves show as colours that wash out or saturate long before anyone would call the picture
    broken. The figure is the mean absolute change of these six numbers, in levels of 0 .. 255.

    Args:
        reference: frames that make up the beginning.
    """

    reference: int = 16
    _first: list[np.ndarray] = field(default_factory=list)

    def update(self, frames: Frames) -> float | None:
        """Take the next frames; the drift of the last of them, None while the beginning is being collected."""
        for frame in frames[: self.reference - len(self._first)]:
            self._first.append(_statistics(frame))
        if len(self._first) < self.reference:
            return None
        return float(np.abs(_statistics(frames[-1]) - np.mean(self._first, axis=0)).mean())

    def state(self) -> list[list[float]]:
        """For a checkpoint."""
        return [found.tolist() for found in self._first]

    def load(self, found: list[list[float]]) -> None:
        """Undo `state`."""
        self._first = [np.array(one) for one in found]


def _statistics(frame: np.ndarray) -> np.ndarray:
    flat = frame.reshape(-1, 3).astype(np.float64)
    return np.concatenate([flat.mean(0), flat.std(0)])
