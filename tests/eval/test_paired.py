"""Figures of pairs against hand-computed values and reference packages; statistics; refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsereel.media import write_mp4
from sparsereel_eval import intervals, paired, warping
from sparsereel_eval.lpips import Lpips, MissingWeights, load_lpips


def texture(height=48, width=64, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = torch.tensor(rng.random((1, 3, height // 6, width // 6)))
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return fine[0].clamp(0, 1).permute(1, 2, 0).numpy()


def moving(frames=5, dy=2, dx=-3) -> np.ndarray:
    return np.stack([np.roll(texture(), (dy * i, dx * i), (0, 1)) for i in range(frames)])


def test_constant_offset_has_known_figures():
    a = moving() * 0.5
    result = paired.compare_arrays(a, a + 0.1)
    assert result.values["psnr"] == pytest.approx(20.0)
    assert result.values["temporal_psnr"] > 99.9, "a constant offset does not move"
    assert result.values["flicker"] == pytest.approx(0, abs=1e-9)
    assert len(result.per_frame["psnr"]) == 5
    assert len(result.per_frame["flicker"]) == 4


def test_equal_clips():
    result = paired.compare_arrays(moving(), moving())
    assert (result.values["psnr"], result.identical) == (100, 5)
    assert result.values["ssim"] == pytest.approx(1)
    assert result.values["warping"] == 0


def test_flicker_of_alternating_brightness():
    a = np.full((6, 16, 16, 3), 0.5)
    b = a + 0.02 * (-1.0) ** np.arange(6)[:, None, None, None]
    result = paired.compare_arrays(a, b)
    assert result.values["flicker"] == pytest.approx(0.04 * 255)
    assert result.values["temporal_psnr"] == pytest.approx(-20 * np.log10(0.04))
    assert result.own["flicker"] == pytest.approx((0, 0.04 * 255))
    assert result.own["warping"] == pytest.approx((0, 0.04**2))


def test_motion_is_found_and_followed():
    a = moving(2, dy=2, dx=-3)
    shifts, seen = warping.find_motion(a[0], a[1])
    # What moved by (2, -3) came from (-2, 3).
    inner = shifts[1:-1, 1:-1].reshape(-1, 2)
    assert (inner == (-2, 3)).all()
    assert seen[1:-1, 1:-1].all()
    assert warping.warping_error(a[0], a[1], (shifts, seen)) < 1e-4
    still = warping.warping_error(a[0], a[1], (np.zeros_like(shifts), seen))
    assert still > 1e-3, "without motion compensation the moved texture must not match"
    assert warping.motion_length((shifts[1:-1, 1:-1], seen[1:-1, 1:-1])) == pytest.approx(13**0.5)


def test_what_has_no_match_is_not_counted():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 32, 32, 3))
    motion = warping.find_motion(a, b)
    assert not motion[1].any()
    assert warping.warping_error(a, b, motion) is None
    assert "matched" in paired.compare_arrays(np.stack([a, b]), np.stack([a, b])).missing["warping"]


def test_ms_ssim_and_small_pictures():
    big = np.stack([texture(176, 180)])
    noisy = np.clip(big + np.random.default_rng(1).normal(0, 0.05, big.shape), 0, 1)
    values = paired.compare_arrays(big, noisy).values
    assert values["ssim"] < values["ms_ssim"] < 1
    small = paired.compare_arrays(big[:, :10, :10], noisy[:, :10, :10])
    assert set(small.missing) == {"ssim", "ms_ssim", "temporal_psnr", "flicker", "warping"}
    assert small.values.keys() == {"psnr"}


@pytest.mark.parametrize(("net", "package"), [("alex", "lpips"), ("vgg", "lpips"), ("alex", "torchmetrics")])
def test_lpips_equals_its_packages(net, package):
    """With a random network; the published heads are in both packages."""
    torch.manual_seed(3)
    if package == "lpips":
        theirs = pytest.importorskip("lpips").LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    else:
        from torchmetrics.functional.image.lpips import _LPIPS

        theirs = _LPIPS(pretrained=True, net=net, pnet_rand=True, use_dropout=True, eval_mode=True)
    layers = [layer for part in range(1, 6) for layer in getattr(theirs.net, f"slice{part}")]
    ours = Lpips(torch.nn.Sequential(*layers), net)
    x, y = torch.rand(2, 2, 3, 40, 48)
    torch.testing.assert_close(ours(x, y), theirs(x * 2 - 1, y * 2 - 1).flatten(), rtol=1e-4, atol=1e-7)
    assert ours(x, x).tolist() == [0, 0]


def test_lpips_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"alexnet-owt-7be5be79\.pth.*--download"):
        load_lpips()
    with pytest.raises(ValueError, match="unknown LPIPS network 'squeeze'"):
        load_lpips("squeeze")
    bad = tmp_path / "alexnet-owt-7be5be79.pth"
    bad.write_bytes(b"not it")
    with pytest.raises(ValueError, match="damaged: its SHA-256"):
        load_lpips("alex", bad)
    from safetensors.torch import save_file
    from torchvision.models import alexnet

    trunk = alexnet(weights=None)
    kept = {k: v for k, v in trunk.state_dict().items() if k.startswith("features.")}
    save_file(kept, tmp_path / "a.safetensors")
    x, y = torch.rand(2, 1, 3, 40, 40)
    got = load_lpips("alex", tmp_path / "a.safetensors")(x, y)
    assert torch.equal(got, Lpips(trunk.features, "alex")(x, y))
    with pytest.raises(ValueError, match="does not hold the vgg weights"):
        load_lpips("vgg", tmp_path / "a.safetensors")


def test_differing_clips_are_refused(tmp_path):
    a = (moving(4) * 255).astype(np.uint8)
    np.save(tmp_path / "a.npy", a)
    for other, text in ((a[:3], "4 frames.*3 frames.*equally many"), (a[:, :40], "64 x 48.*64 x 40.*same size")):
        np.save(tmp_path / "b.npy", other)
        with pytest.raises(ValueError, match=text):
            paired.compare_clips(tmp_path / "a.npy", tmp_path / "b.npy")


def test_encoded_clips_of_unequal_length_or_rate_are_refused(tmp_path):
    """Lengths of encoded clips show only at their end."""
    a = (moving(4) * 255).astype(np.uint8)
    for name, clip, fps in (("a", a, 8), ("short", a[:3], 8), ("fast", a, 16)):
        write_mp4(tmp_path / f"{name}.mp4", clip, fps)
    for left, right in (("a", "short"), ("short", "a")):
        with pytest.raises(ValueError, match=r"has [34] frames.* has [34]; they must be equally many"):
            paired.compare_clips(tmp_path / f"{left}.mp4", tmp_path / f"{right}.mp4")
    with pytest.raises(ValueError, match="8 frames a second.*16 frames a second"):
        paired.compare_clips(tmp_path / "a.mp4", tmp_path / "fast.mp4")
    np.save(tmp_path / "a.npy", a)
    result = paired.compare_clips(tmp_path / "a.npy", tmp_path / "a.mp4")
    assert result.lossy
    assert 25 < result.values["psnr"] < 60


def test_memory_does_not_grow_with_the_clip():
    """A clip of 100 frames holds no more than a few at a time."""
    from sparsereel_eval.readers import ClipFile

    alive, most = [0], [0]

    class Frame(np.ndarray):
        def __del__(self):
            if self.base is None:
                alive[0] -= 1

    def frames():
        for i in range(100):
            frame = np.full((8, 8, 3), i % 250, np.uint8).view(np.ndarray)
            made = Frame((8, 8, 3), np.uint8)
            made[:] = frame
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            yield made

    clip = ClipFile("x", 8, 8, 100, None, False, frames)
    running = paired._Running(clip, clip, None)
    for x, y in zip(clip, clip, strict=True):
        running.add(x, y)
    assert running.finish().frames == 100
    assert most[0] < 20


def test_interval_covers_the_mean():
    """Of 200 samples of 25, the 95 % interval holds the true mean in about nine of ten or more."""
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(200):
        low, high = intervals.bootstrap_interval(rng.normal(3, 1, 25).tolist())
        hits += low <= 3 <= high
    assert 178 <= hits <= 199
    assert intervals.bootstrap_interval([1.0]) is None
    assert intervals.bootstrap_interval([1.0, 2.0], ["p", "p"]) is None


def test_seeds_of_a_prompt_are_not_independent():
    values = [v for v in (1.0, 2.0, 3.0, 4.0) for _ in range(8)]
    loose = intervals.bootstrap_interval(values, list(values))
    tight = intervals.bootstrap_interval(values)
    assert loose[1] - loose[0] > 2 * (tight[1] - tight[0])
    # A prompt with many seeds weighs as one prompt.
    assert intervals.summarise([0.0, 0.0, 0.0, 4.0], ["a", "a", "a", "b"])["mean"] == 2


def test_wilcoxon():
    assert intervals.wilcoxon([1, 2, 3], [1, 2, 3]) is None
    assert intervals.wilcoxon(range(1, 9), [0] * 8) == pytest.approx(2 / 2**8)
    with pytest.raises(ValueError, match="equally many"):
        intervals.wilcoxon([1], [1, 2])


def test_thresholds():
    table = {"psnr": {"mean": 24.0, "higher_is_better": True}, "warping": {"mean": 0.5, "higher_is_better": False}}
    assert paired.missed(table, paired.parse_thresholds(["psnr=24,warping=0.5"])) == []
    assert paired.missed(table, {"psnr": 25, "warping": 0.1}) == [
        "psnr is 24, below the threshold of 25",
        "warping is 0.5, above the threshold of 0.1",
    ]
    with pytest.raises(ValueError, match="not measured"):
        paired.missed(table, {"ssim": 0.5})
    for text in ("psnr", "psnr=x", "nice=3", "psnr=nan"):
        with pytest.raises(ValueError, match="NAME=NUMBER"):
            paired.parse_thresholds([text])
