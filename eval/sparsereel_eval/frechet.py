"""Distances between two sets of features: Frechet (FID, FVD) and kernel (KID).

Frechet distance of the Gaussians fitted to both sets (Heusel et al., 2017; for clips Unterthiner et al., 2018):

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)

KID (Binkowski et al., 2018): squared MMD with the kernel (x.y / D + 1)^3, in its unbiased form, so its mean is 0 for
two samples of one distribution at any size; it may be negative. Frechet distance is biased upward by about c / n:
compare it only at equal n, or extrapolated to n = infinity (Chong and Forsyth, 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

SUBSETS, SUBSET_SIZE = 100, 1000


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of n feature vectors, fp64."""

    n: int
    mean: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def fit(cls, features: torch.Tensor) -> Gaussian:
        """Fit to (N, D) finite features, N >= 2; the covariance divides by N - 1."""
        x = check_features(features)
        centred = x - x.mean(0)
        return cls(len(x), x.mean(0), centred.T @ centred / (len(x) - 1))


def check_features(features: torch.Tensor) -> torch.Tensor:
    """(N, D) fp64 on the CPU.

    Raises:
        ValueError: another shape, fewer than two vectors, or values that are not finite.
    """
    if features.ndim != 2 or features.shape[0] < 2 or features.shape[1] < 1:
        raise ValueError(f"features must have the shape (N >= 2, D >= 1), got {tuple(features.shape)}")
    x = features.detach().double().cpu()
    if not bool(torch.isfinite(x).all()):
        raise ValueError("features hold NaN or infinite values")
    return x


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Frechet distance of two Gaussians, at least 0.

    The trace of the root is the sum of the roots of the eigenvalues of A C2 A^T with A = C1^(1/2): symmetric, real, and
    sound where there are fewer samples than dimensions, which a general matrix root is not.

    Raises:
        ValueError: the features differ in length.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"the features differ in length: {len(a.mean)} and {len(b.mean)}")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = values.clamp_min(0).sqrt()[:, None] * vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root.T).clamp_min(0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    # Rounding leaves about -1e-6 for a set against itself.
    return max(0.0, float(distance))


def fid(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of two sets of features (N, D) and (M, D)."""
    return frechet_distance(Gaussian.fit(a), Gaussian.fit(b))


def fid_infinity(a: torch.Tensor, b: torch.Tensor, *, points: int = 12, repeats: int = 4, seed: int = 0) -> float:
    """Frechet distance extrapolated to infinitely many samples: the intercept of a line through distances over 1/n.

    Both sets are drawn down to the same n, without replacement. May be slightly negative for equal distributions.

    Args:
        points: Number of sizes, from a third of the smaller set to all of it.
        repeats: Draws averaged at each size.

    Raises:
        ValueError: a set has fewer than 30 samples, too few for a line.
    """
    a, b = check_features(a), check_features(b)
    most = min(len(a), len(b))
    if most < 30:
        raise ValueError(f"extrapolation needs at least 30 samples in each set, got {most}")
    generator = torch.Generator().manual_seed(seed)
    sizes = np.unique(np.linspace(most / 3, most, points).astype(int))
    means = []
    for size in sizes.tolist():
        draws = [
            fid(*(x[torch.randperm(len(x), generator=generator)[:size]] for x in (a, b)))
            for _ in range(1 if size == most and len(a) == len(b) else repeats)
        ]
        means.append(np.mean(draws))
    _, intercept = np.polyfit(1 / sizes, means, 1)
    return float(intercept)


@dataclass(frozen=True)
class Kid:
    """KID: mean and standard deviation over random subsets, and the estimate from all samples at once.

    The deviation says how much subsets differ; as they overlap it is no confidence interval.
    """

    mean: float
    std: float
    full: float
    subsets: int
    subset_size: int


def kid(
    a: torch.Tensor, b: torch.Tensor, *, subsets: int = SUBSETS, subset_size: int | None = None, seed: int = 0
) -> Kid:
    """KID of two sets of features (N, D) and (M, D).

    Args:
        subset_size: Samples drawn from each set; default 1000, or half the smaller set where that is less.
        seed: Of the draws; torch's global generator is not touched.

    Raises:
        ValueError: the features differ in length, or a subset is larger than a set.
    """
    a, b = check_features(a), check_features(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"the features differ in length: {a.shape[1]} and {b.shape[1]}")
    smaller = min(len(a), len(b))
    size = max(2, min(SUBSET_SIZE, smaller // 2)) if subset_size is None else subset_size
    if not 2 <= size <= smaller or subsets < 1:
        raise ValueError(f"a subset must have 2 to {smaller} samples and there must be one or more, got {size}")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        x, y = (part[torch.randperm(len(part), generator=generator)[:size]] for part in (a, b))
        values.append(unbiased_mmd(x, y))
    return Kid(float(np.mean(values)), float(np.std(values)), unbiased_mmd(a, b), subsets, size)


def unbiased_mmd(a: torch.Tensor, b: torch.Tensor) -> float:
    """Squared MMD of all samples under the cubic kernel; a sample is never compared with itself."""
    n, m = len(a), len(b)
    within_a, within_b = _kernel(a, a), _kernel(b, b)
    first = (within_a.sum() - within_a.trace()) / (n * (n - 1))
    second = (within_b.sum() - within_b.trace()) / (m * (m - 1))
    return float(first + second - 2 * _kernel(a, b).mean())


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def sample_warning(n: int, dimensions: int) -> str | None:
    """What to say about a Frechet distance from so few samples; None where there are enough."""
    if n >= 2 * dimensions:
        return None
    return (
        f"{n} samples for {dimensions} dimensions: the Frechet distance is biased upward; "
        f"compare it only at equal numbers, or use KID, which is not biased"
    )
