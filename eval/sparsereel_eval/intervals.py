"""Means with their uncertainty, and tests of paired values.

The bootstrap draws whole groups (a prompt with all its seeds), as clips of one prompt resemble each other; without
groups every value is its own. Intervals are percentiles of the resampled means (Efron, 1979), from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 10_000
_CHUNK = 4_000_000  # drawn values held at once


def bootstrap_interval(
    values: Sequence[float], groups: Sequence[Hashable] | None = None, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Interval of the mean at `level`; None for fewer than two groups, where nothing can be said.

    The mean is over groups of the mean in each group, so that a prompt with more seeds does not weigh more.

    Raises:
        ValueError: a value is not finite, or groups and values differ in number.
    """
    means = group_means(values, groups)
    if len(means) < 2:
        return None
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(means))
    drawn = []
    for start in range(0, RESAMPLES, rows):
        picks = rng.integers(len(means), size=(min(rows, RESAMPLES - start), len(means)))
        drawn.append(means[picks].mean(1))
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def group_means(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> np.ndarray:
    """Mean of the values of each group, groups in order of appearance."""
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("an interval needs finite values")
    if groups is None:
        return array
    if len(groups) != len(array):
        raise ValueError(f"there are {len(array)} values but {len(groups)} groups")
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(array.tolist(), groups, strict=True):
        members.setdefault(group, []).append(value)
    return np.array([np.mean(part) for part in members.values()])


def wilcoxon(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test on pairs; None when no pair differs.

    With fewer than 6 pairs p cannot fall below 0.05, whatever the values.

    Raises:
        ValueError: the sequences differ in length.
    """
    from scipy import stats

    if len(a) != len(b):
        raise ValueError(f"paired values must be equally many, got {len(a)} and {len(b)}")
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if not difference.any():
        return None
    return float(stats.wilcoxon(difference).pvalue)


def summarise(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> dict:
    """Number, mean, median, smallest, largest and 95 % interval, as plain data."""
    array = np.asarray(values, dtype=np.float64)
    interval = bootstrap_interval(values, groups)
    return {
        "n": len(array),
        "mean": float(group_means(values, groups).mean()),
        "median": float(np.median(array)),
        "min": float(array.min()),
        "max": float(array.max()),
        "interval": None if interval is None else list(interval),
    }
