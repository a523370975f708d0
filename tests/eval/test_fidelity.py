"""PSNR and SSIM against scikit-image, torchmetrics and hand-computed values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsereel_eval import fidelity


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    smooth = torch.nn.functional.interpolate(torch.tensor(rng.random((3, 3, 6, 8))), size=(37, 50), mode="bicubic")
    a = smooth.clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return a, np.clip(a + rng.normal(0, [0.01, 0.05, 0.2], (37, 50, 3, 3)).transpose(3, 0, 1, 2), 0, 1)


def test_equal_to_scikit_image(pair):
    metrics = pytest.importorskip("skimage.metrics")
    a, b = pair
    expected = [metrics.peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(fidelity.psnr_per_frame(a, b), expected, atol=1e-9)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    expected = [metrics.structural_similarity(x, y, channel_axis=2, **window) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(fidelity.ssim_per_frame(a, b), expected, atol=1e-6)
    assert fidelity.ssim(a, b) == pytest.approx(np.mean(expected), abs=1e-6)


def test_known_values():
    grey = np.full((2, 16, 16, 3), 0.5)
    off = grey.copy()
    off[1] += 0.1
    assert fidelity.psnr_per_frame(grey, off).tolist() == pytest.approx([fidelity.PSNR_CAP, 20.0])
    # A video's PSNR is the mean of its frames', not the PSNR of the mean error.
    assert fidelity.psnr(grey, off) == pytest.approx(60.0)
    assert fidelity.ssim(grey, grey) == pytest.approx(1.0)


def test_types_agree(pair):
    a, b = (np.rint(x * 255).astype(np.uint8) for x in pair)
    as_float = fidelity.psnr(a / 255.0, torch.tensor(b / 255.0))
    assert fidelity.psnr(a, b) == pytest.approx(as_float)
    assert fidelity.ssim(torch.tensor(a), b) == pytest.approx(fidelity.ssim(a / 255.0, b / 255.0))


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (np.zeros((1, 16, 16, 3)), np.zeros((2, 16, 16, 3)), "differ in shape"),
        (np.zeros((16, 16, 3)), np.zeros((16, 16, 3)), r"\(frames, height, width, 3\)"),
        (np.zeros((1, 16, 16, 3), np.int32), np.zeros((1, 16, 16, 3), np.int32), "uint8 or float"),
        (np.full((1, 16, 16, 3), 200.0), np.zeros((1, 16, 16, 3)), r"\[0, 1\]"),
        (np.full((1, 16, 16, 3), np.nan), np.zeros((1, 16, 16, 3)), r"\[0, 1\]"),
    ],
)
def test_bad_input_is_refused(a, b, text):
    with pytest.raises(ValueError, match=text):
        fidelity.psnr(a, b)


def test_small_frames_have_no_ssim():
    with pytest.raises(ValueError, match="at least 11 x 11"):
        fidelity.ssim(np.zeros((1, 8, 16, 3)), np.zeros((1, 8, 16, 3)))
