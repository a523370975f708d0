"""Does a clip repeat itself, and after how many frames? From the frames alone, for RIFLEx and for benchmarks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: side of the small grey pictures that frames are compared as
SIDE = 16
#: correlation from which a return counts as one
THRESHOLD = 0.6


def autocorrelation(video: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(F,) mean correlation of frames h apart, h = 0 .. F - 1; 1 at h = 0.

    Frames are compared as 16 x 16 grey pictures less their mean over the clip, so that a still background counts for
    nothing. A still clip has no variation to compare: it is 1 everywhere.

    Args:
        video: (F, H, W, 3) uint8.

    Raises:
        ValueError: another form, or fewer than three frames.
    """
    small = _small(video)
    moving = small - small.mean(0)
    lengths = np.linalg.norm(moving, axis=1)
    if lengths.max() < 1e-6:
        return np.ones(len(video))
    unit = moving / np.maximum(lengths, 1e-9)[:, None]
    pairs = unit @ unit.T
    return np.array([np.diagonal(pairs, h).mean() for h in range(len(video))])


def loop_score(video: NDArray[np.uint8], shortest: int) -> float:
    """How nearly the clip comes back to where it was: the highest correlation at `shortest` frames or more apart, after
    it has fallen to its first minimum, in [0, 1]; distances that fewer than four pairs share are left out."""
    found = autocorrelation(video)[: max(2, len(video) - 3)]
    start = max(shortest, _first_minimum(found))
    return float(np.clip(found[start:].max(), 0, 1)) if start < len(found) else 0.0


def find_loop(video: NDArray[np.uint8], shortest: int = 8) -> int | None:
    """Frames after which the clip repeats itself; None where it does not.

    The first maximum of the autocorrelation beyond its first minimum that reaches 0.6 and lies `shortest` frames away
    or more. In latent frames, what `RIFLEx(loop=...)` takes, it is that over the VAE's frames a latent one.

    Raises:
        ValueError: as `autocorrelation`.
    """
    found = autocorrelation(video)
    if np.ptp(found) < 1e-9:
        return None
    for h in range(max(shortest, _first_minimum(found), 1), len(found) - 3):
        if found[h] >= THRESHOLD and found[h] >= found[h - 1] and found[h] >= found[h + 1]:
            return h
    return None


def _first_minimum(correlation: NDArray[np.float64]) -> int:
    falling = np.diff(correlation) < 0
    rising = np.flatnonzero(~falling)
    return int(rising[0]) if rising.size else len(correlation)


def _small(video: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(F, 256): grey pictures of 16 x 16, each place the mean of its part of the frame."""
    if video.ndim != 4 or video.shape[-1] != 3 or len(video) < 3 or min(video.shape[1:3]) < SIDE:
        raise ValueError(f"expected frames (F, H, W, 3) of 16 x 16 pixels or more, at least 3, got {video.shape}")
    grey = video.astype(np.float64).mean(-1)
    rows, columns = (np.linspace(0, n, SIDE + 1).astype(int)[:-1] for n in video.shape[1:3])
    sums = np.add.reduceat(np.add.reduceat(grey, rows, axis=1), columns, axis=2)
    sizes = np.diff([*rows, video.shape[1]])[:, None] * np.diff([*columns, video.shape[2]])
    return (sums / sizes).reshape(len(video), -1)
