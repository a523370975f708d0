"""PSNR and SSIM between two videos of the same size: how far one run drifted from another.

Definitions. PSNR of a frame is 10 log10(1 / MSE) over its pixels and channels, values in [0, 1]; a video's figure is
the mean over its frames, as the sparse-attention papers print it. SSIM (Wang et al., 2004) uses the Gaussian window
(sigma 1.5, 11 x 11), population covariances, K1 = 0.01, K2 = 0.03, data range 1, each colour channel on its own; the
outer 5 pixels, where the window would leave the image, are not counted. It equals scikit-image's
`structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`.

Compare float frames where there are any: rounding to 8 bits caps PSNR near 59 dB, an mp4 near 38 dB.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

Video: TypeAlias = "np.ndarray | torch.Tensor"

# Identical frames have infinite PSNR, which neither averages nor fits into JSON.
PSNR_CAP = 100.0
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def psnr(a: Video, b: Video) -> float:
    """Mean over frames of the peak signal-to-noise ratio, in dB; higher is closer, equal frames count as 100 dB.

    Args:
        a, b: (F, H, W, 3) uint8, or floats in [0, 1].

    Raises:
        ValueError: the shapes differ, or a video is not (F, H, W, 3) of an allowed type and range.
    """
    return float(psnr_per_frame(a, b).mean())


def psnr_per_frame(a: Video, b: Video) -> torch.Tensor:
    """PSNR of each frame in dB: (F,) fp64, at most 100. Arguments and errors as `psnr`."""
    left, right = _pair(a, b)
    mse = (left - right).square().flatten(1).mean(1)
    return (-10 * torch.log10(mse)).clamp_max(PSNR_CAP)


def ssim(a: Video, b: Video) -> float:
    """Mean over frames of the structural similarity, at most 1. As `psnr`; frames of 11 px or more."""
    return float(ssim_per_frame(a, b).mean())


def ssim_per_frame(a: Video, b: Video) -> torch.Tensor:
    """SSIM of each frame: (F,) fp64. Arguments and errors as `ssim`."""
    left, right = _pair(a, b)
    if min(left.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs frames of at least {WINDOW} x {WINDOW} pixels, got {tuple(left.shape[1:3])}.")
    # One frame at a time: five filtered copies of a long clip in fp64 would not fit.
    return torch.stack([_frame_ssim(x, y) for x, y in zip(left, right, strict=True)])


def _frame_ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """SSIM of one frame pair (H, W, 3), mean over the inner pixels and the channels."""
    x, y = x.permute(2, 0, 1), y.permute(2, 0, 1)
    mean_x, mean_y, xx, yy, xy = _blur(torch.stack([x, y, x * x, y * y, x * y]))
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    structure = (2 * cov + K2**2) / (var_x + var_y + K2**2)
    return (luminance * structure).mean()


def _blur(maps: torch.Tensor) -> torch.Tensor:
    """Gaussian-filter (N, C, H, W), keeping only places where the whole window lies inside."""
    offsets = torch.arange(WINDOW, dtype=maps.dtype, device=maps.device) - WINDOW // 2
    kernel = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    kernel = kernel / kernel.sum()
    flat = maps.flatten(0, 1).unsqueeze(1)
    flat = F.conv2d(F.conv2d(flat, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return flat.view(*maps.shape[:2], *flat.shape[2:])


def _pair(a: Video, b: Video) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = _unit_range(a), _unit_range(b)
    if left.shape != right.shape:
        raise ValueError(f"The videos differ in shape: {tuple(left.shape)} and {tuple(right.shape)}.")
    return left, right.to(left.device)


def _unit_range(video: Video) -> torch.Tensor:
    """Any accepted video as fp64 in [0, 1]."""
    tensor = torch.as_tensor(video)
    if tensor.ndim != 4 or tensor.shape[-1] != 3 or 0 in tensor.shape:
        raise ValueError(f"A video must have the shape (frames, height, width, 3), got {tuple(tensor.shape)}.")
    if tensor.dtype == torch.uint8:
        return tensor.double() / 255
    if not tensor.is_floating_point():
        raise ValueError(f"A video must be uint8 or float, got {tensor.dtype}.")
    low, high = tensor.min().item(), tensor.max().item()
    # Written so that NaN fails too; a hair outside the range is rounding of the decoder.
    if not (low >= -1e-3 and high <= 1 + 1e-3 and math.isfinite(high)):
        raise ValueError(f"A float video must lie in [0, 1], got values from {low:.3g} to {high:.3g}.")
    return tensor.double().clamp(0, 1)
