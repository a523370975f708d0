"""Warping error: how far a frame is from the one before it, moved along the reference's motion.

    E_t = mean over seen pixels of (x_t - warp(x_{t-1}))^2,  values in [0, 1]

after Lai et al., "Learning Blind Video Temporal Consistency" (2018). Motion is found in the reference clip and used for
both clips, so that flicker of the tested clip cannot hide as motion. It comes from block matching on grey pictures:
each 8 x 8 block takes the whole-pixel shift within 7 pixels with the least mean absolute difference, near ties going
to the shorter shift. It needs no weights and gives the same figures everywhere; motion beyond 7 pixels a frame is not
followed. Blocks whose match is poor in the reference itself (uncovered background) are not counted.
"""

from __future__ import annotations

import numpy as np

BLOCK, RADIUS = 8, 7
# Mean absolute difference of a block's best match, in [0, 1], above which the reference is taken as not matched.
UNMATCHED = 0.04
# Cost of a pixel of shift: far below visible differences, decides between equal matches on flat ground.
SHORTER = 1e-4
_GREY = np.array((0.299, 0.587, 0.114), np.float32)

_CACHED = 2**17  # numbers

Motion = tuple[np.ndarray, np.ndarray]


def find_motion(before: np.ndarray, after: np.ndarray) -> Motion:
    """Where each block of `after` was in `before`.

    Args:
        before, after: (H, W, 3) float in [0, 1]; sides of 8 pixels or more (what is over a multiple of 8 is cut).

    Returns:
        Shifts (rows, columns, 2) as (y, x) in pixels, int64, and bool (rows, columns), False where nothing matches.
    """
    # numpy, not torch: hundreds of short operations, which starting threads for each would slow tenfold.
    grey_before, grey_after = before.astype(np.float32) @ _GREY, after.astype(np.float32) @ _GREY
    height, width = (side // BLOCK * BLOCK for side in grey_after.shape)
    grey_after = grey_after[:height, :width]
    # Outside the frame lies a value no pixel has, so that no block is matched there.
    padded = np.pad(grey_before, RADIUS, constant_values=4.0)
    span = 2 * RADIUS + 1
    costs = np.empty((span, height // BLOCK, span, width // BLOCK), np.float32)
    # In bands that stay in the processor's cache.
    band = max(1, _CACHED // (span * width * BLOCK)) * BLOCK
    # (height, shifts along a row, width), without copies.
    windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=1)[:, :span]
    for top in range(0, height, band):
        part = grey_after[top : top + band, None]
        for row in range(span):
            moved = windows[top + row : top + row + len(part)]
            costs[row, top // BLOCK : (top + len(part)) // BLOCK] = _block_means(np.abs(part - moved))
    steps = np.arange(-RADIUS, RADIUS + 1)
    costs += (SHORTER * np.hypot(steps[:, None], steps)).astype(np.float32)[:, None, :, None]
    flat = costs.transpose(0, 2, 1, 3).reshape(span * span, height // BLOCK, width // BLOCK)
    # Short shifts first: of equal costs the first is taken.
    pairs = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
    order = np.argsort(np.hypot(*pairs.T), kind="stable")
    best = flat[order].argmin(0)
    return pairs[order][best], flat.min(0) < UNMATCHED


def _block_means(values: np.ndarray) -> np.ndarray:
    """(height, N, width) to (height / 8, N, width / 8)."""
    height, count, width = values.shape
    rows = values.reshape(height // BLOCK, BLOCK, count, width).sum(1)
    # Slices add up faster than a sum over a last axis of 8.
    total = sum((rows[..., start::BLOCK] for start in range(1, BLOCK)), start=rows[..., ::BLOCK])
    return total / np.float32(BLOCK**2)


def warping_error(before: np.ndarray, after: np.ndarray, motion: Motion) -> float | None:
    """Mean squared error between `after` and `before` moved along `motion`; None when no block was matched.

    Args:
        before, after: (H, W, 3) float in [0, 1], of the clip `motion` was found in or of one that follows it.
    """
    shifts, seen = motion
    if not seen.any():
        return None
    rows, columns = (_to_pixels(shifts[..., axis]) for axis in (0, 1))
    height, width = rows.shape
    y, x = np.arange(height)[:, None] + rows, np.arange(width)[None, :] + columns
    # Blocks without a match keep a shift that may lie outside; they are masked out below.
    warped = before[y.clip(0, before.shape[0] - 1), x.clip(0, before.shape[1] - 1)]
    error = np.square(after[:height, :width].astype(np.float64) - warped).mean(2)
    return float(error[_to_pixels(seen)].mean())


def motion_length(motion: Motion) -> float:
    """Mean length of the matched shifts in pixels a frame; 0 for a still clip."""
    shifts, seen = motion
    lengths = np.hypot(shifts[..., 0], shifts[..., 1])[seen]
    return float(lengths.mean()) if lengths.size else 0.0


def _to_pixels(blocks: np.ndarray) -> np.ndarray:
    return blocks.repeat(BLOCK, 0).repeat(BLOCK, 1)
