"""Frechet and kernel distances against torchmetrics, scipy and closed forms; feature extractors; stored features."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsereel.cli.main import run
from sparsereel_eval.digits import render, sample_clip
from sparsereel_eval.feature_files import load_features, save_features, set_features
from sparsereel_eval.features import Extractor, clip_features, make_extractor, pick_frames
from sparsereel_eval.frechet import Gaussian, fid, fid_infinity, frechet_distance, kid, unbiased_mmd
from sparsereel_eval.lpips import MissingWeights
from sparsereel_eval.readers import open_clip


def sample(n, d=6, seed=0, shift=0.0, scale=1.0):
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99)).double()
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double()
    return x @ mix * scale + shift


def test_closed_form_of_diagonal_gaussians():
    a = Gaussian(10, torch.tensor([0.0, 1.0]).double(), torch.diag(torch.tensor([1.0, 4.0]).double()))
    b = Gaussian(10, torch.tensor([2.0, 1.0]).double(), torch.diag(torch.tensor([9.0, 0.25]).double()))
    # (0-2)^2 + (1-3)^2 + (2-0.5)^2
    assert frechet_distance(a, b) == pytest.approx(4 + 4 + 2.25, rel=1e-12)


@pytest.mark.parametrize("n", [40, 4])
def test_equals_scipy(n):
    """Also with fewer samples (4) than dimensions (6)."""
    from scipy.linalg import sqrtm

    a, b = sample(n), sample(n, seed=1, shift=0.3, scale=1.2)
    ca, cb = (np.cov(x.numpy(), rowvar=False) for x in (a, b))
    tiny = np.eye(6) * 1e-10
    root = sqrtm((ca + tiny) @ (cb + tiny)).real
    want = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(ca + cb - 2 * root)
    assert fid(a, b) == pytest.approx(want, rel=1e-4)


class Fixed(torch.nn.Module):
    """Hands out given features in order, as torchmetrics wants a network."""

    num_features = 6

    def __init__(self, rows):
        super().__init__()
        self.rows, self.at = rows, 0

    def forward(self, pictures):
        self.at += len(pictures)
        return self.rows[self.at - len(pictures) : self.at].float()


def test_fid_equals_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = sample(60), sample(70, seed=1, shift=0.4)
    metric = FrechetInceptionDistance(feature=Fixed(torch.cat([a, b])))
    metric.update(torch.zeros(60, 3, 8, 8), real=True)
    metric.update(torch.zeros(70, 3, 8, 8), real=False)
    assert fid(a.float(), b.float()) == pytest.approx(float(metric.compute()), rel=1e-4)


def test_kid_equals_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = sample(50), sample(50, seed=1, shift=0.4)
    metric = KernelInceptionDistance(feature=Fixed(torch.cat([a, b])), subsets=3, subset_size=50)
    metric.update(torch.zeros(50, 3, 8, 8), real=True)
    metric.update(torch.zeros(50, 3, 8, 8), real=False)
    ours = kid(a, b, subsets=3, subset_size=50)
    assert ours.mean == pytest.approx(float(metric.compute()[0]), rel=1e-4)
    assert ours.std == pytest.approx(0, abs=1e-9)
    assert ours.full == pytest.approx(ours.mean)


def test_self_symmetry_and_order():
    a, b = sample(20, 30), sample(25, 30, seed=1)
    assert fid(a, a) < 1e-6 * float(a.var(0).sum())
    assert fid(a, b) == pytest.approx(fid(b, a), rel=1e-7)
    assert fid(a, b) == pytest.approx(fid(a.flip(0), b), rel=1e-7)
    assert unbiased_mmd(a, b) == pytest.approx(unbiased_mmd(b, a), rel=1e-12)


def test_constant_features():
    a = torch.ones(5, 3)
    assert fid(a, a) == 0
    assert fid(a, a + 2) == pytest.approx(12)


def test_kid_of_one_distribution_is_near_zero():
    splits = [
        kid(sample(80, seed=2 * i, scale=0.3), sample(80, seed=2 * i + 1, scale=0.3), subsets=20).full
        for i in range(30)
    ]
    far = kid(sample(80, scale=0.3), sample(80, seed=1, shift=1.0, scale=0.3), subsets=20).full
    assert abs(np.mean(splits)) < 3 * np.std(splits) / 30**0.5
    assert far > 5 * np.std(splits)
    assert min(splits) < 0 < max(splits), "unbiased: both signs occur"


def test_kid_is_reproducible_and_leaves_the_global_generator():
    a, b = sample(40), sample(40, seed=1)
    torch.manual_seed(1)
    first, drawn = kid(a, b), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    assert kid(a, b) == first
    assert kid(a, b, seed=1) != first


def test_extrapolation_removes_the_bias():
    """Two samples of one 12-dimensional Gaussian: the true distance is 0."""
    a, b = sample(300, 12), sample(300, 12, seed=1)
    assert abs(fid_infinity(a, b)) < 0.35 * fid(a, b)
    with pytest.raises(ValueError, match="at least 30"):
        fid_infinity(a[:29], b)


def test_wrong_features():
    a = sample(10)
    for bad, text in (
        (a[:1], "N >= 2"),
        (a[0], "N >= 2"),
        (a * torch.nan, "NaN"),
    ):
        with pytest.raises(ValueError, match=text):
            fid(a, bad)
    with pytest.raises(ValueError, match="differ in length: 6 and 5"):
        fid(a, a[:, :5])
    with pytest.raises(ValueError, match="differ in length"):
        kid(a, a[:, :5])
    with pytest.raises(ValueError, match="2 to 10 samples"):
        kid(a, a, subset_size=11)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Clips of digits: two halves of one distribution and three blurred copies of the first."""
    root = tmp_path_factory.mktemp("digits")
    rng = np.random.default_rng(0)
    for i in range(60):
        video, _ = render(sample_clip(rng, frames=5, height=48, width=48))
        name = "a" if i % 2 == 0 else "b"
        for folder, sigma in ((name, 0.0), *([(f"blur{s}", s) for s in (0.5, 1.0, 2.0)] if name == "a" else [])):
            (root / folder).mkdir(exist_ok=True)
            np.save(root / folder / f"{i}.npy", blur(video, sigma))
    return root


def blur(video, sigma):
    from scipy.ndimage import gaussian_filter

    return video if not sigma else gaussian_filter(video, (0, sigma, sigma, 0))


@pytest.mark.parametrize("metric", ["fid", "kid", "fvd"])
def test_commands(digits, tmp_path, metric, capsys):
    """Distance grows with blur; a set is at 0 from itself."""
    values = {}
    for other in ("a", "b", "blur0.5", "blur1.0", "blur2.0"):
        command = ["eval", metric, str(digits / "a"), str(digits / other), "--cache", str(tmp_path / "kept")]
        command += ["--force"] if metric != "kid" else []
        assert run([*command, "--json", str(tmp_path / "r.json")]) == 0
        values[other] = json.loads((tmp_path / "r.json").read_text())
    assert values["blur0.5"]["value"] < values["blur1.0"]["value"] < values["blur2.0"]["value"]
    if metric != "kid":
        assert values["a"]["value"] == pytest.approx(0, abs=1e-6)
        assert "biased upward" in values["b"]["warnings"][0]
        assert "biased upward" in " ".join(capsys.readouterr().err.split())
    assert len(list((tmp_path / "kept").iterdir())) == 5


def test_too_few_samples_are_refused(digits, capsys):
    one = next((digits / "a").iterdir())
    assert run(["eval", "fvd", str(digits / "a"), str(one), "--force"]) == 2
    assert f"{one.name} gives one clip only; fvd needs two" in " ".join(capsys.readouterr().err.split())
    assert run(["eval", "fvd", str(digits / "a"), str(digits / "b")]) == 2
    assert "--force" in capsys.readouterr().err
    assert run(["eval", "fid", str(digits / "a"), str(digits / "b"), "--features", "nice"]) == 2
    assert "unknown features 'nice'" in capsys.readouterr().err


def test_a_file_of_features_stands_for_its_set(digits, tmp_path, capsys):
    kept = tmp_path / "a.safetensors"
    assert run(["eval", "features", str(digits / "a"), "-o", str(kept)]) == 0
    values = []
    for a in (digits / "a", kept):
        assert run(["eval", "kid", str(a), str(digits / "blur2.0"), "--json", "-"]) == 0
        values.append(json.loads(capsys.readouterr().out)["value"])
    assert values[0] == values[1] != 0
    assert run(["eval", "fvd", str(kept), str(digits / "b"), "--force"]) == 2
    assert "was made with" in capsys.readouterr().err
    assert run(["eval", "features", str(digits / "a"), "-o", str(kept), "--features", "torchvision:resnet18"]) == 4
    assert run(["eval", "fid", str(kept), str(kept), "--features", "torchvision:resnet18"]) == 4
    assert "need a safetensors file" in capsys.readouterr().err


def test_frames_are_spread_evenly(tmp_path):
    np.save(tmp_path / "c.npy", np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2))
    clip = open_clip(tmp_path / "c.npy")
    assert (pick_frames(clip, 2)[:, 0, 0, 0] * 255).round().tolist() == [2, 7]
    assert pick_frames(clip, None).shape == (10, 3, 8, 8)
    with pytest.raises(ValueError, match="has 10 frames, x needs 16"):
        clip_features(tmp_path / "c.npy", Extractor("x", "clips", lambda c: c.mean((1, 3, 4)), 16))


def test_stored_features(digits, tmp_path):
    calls = []

    def mean_colour(pictures):
        calls.append(len(pictures))
        return pictures.mean((2, 3))

    extractor = Extractor("mean", "pictures", mean_colour, 2)
    clips = sorted((digits / "a").iterdir())[:3]
    first = set_features(clips, extractor, cache=tmp_path)
    assert first.shape == (6, 3)
    again = set_features(clips, extractor, cache=tmp_path)
    assert torch.equal(first, again)
    assert calls == [2, 2, 2], "the second time nothing is computed"
    save_features(tmp_path / "set.safetensors", first, extractor)
    assert torch.equal(load_features(tmp_path / "set.safetensors", extractor), first)
    other = Extractor("other", "pictures", mean_colour, 2)
    with pytest.raises(ValueError, match="was made with .*mean.*other"):
        load_features(tmp_path / "set.safetensors", other)


@pytest.mark.parametrize(("of", "net", "length"), [("pictures", "resnet18", 512), ("clips", "r3d_18", 512)])
def test_torchvision_networks(digits, tmp_path, of, net, length):
    from torchvision import models

    package = models if of == "pictures" else models.video
    save_file(getattr(package, net)(weights=None).state_dict(), tmp_path / "w.safetensors")
    frames = 2 if of == "pictures" else 4
    extractor = make_extractor(f"torchvision:{net}", of, weights=tmp_path / "w.safetensors", frames=frames)
    got = clip_features(next((digits / "a").iterdir()), extractor)
    assert got.shape == (2 if of == "pictures" else 1, length)
    assert extractor.name.startswith(f"torchvision:{net}@")
    with pytest.raises(MissingWeights, match="need a safetensors file"):
        make_extractor(f"torchvision:{net}", of)
    save_file({"x": torch.ones(1)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights"):
        make_extractor(f"torchvision:{net}", of, weights=tmp_path / "bad.safetensors")


def test_videomae(tmp_path, monkeypatch, capsys):
    """A classifier's published file, under the names of both major versions of transformers."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    from sparsereel_eval import videomae

    monkeypatch.setitem(videomae.SIZES, "small", (32, 2, 4))
    torch.manual_seed(0)
    config = VideoMAEConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    whole = VideoMAEForVideoClassification(config).eval()
    with torch.no_grad():
        for value in whole.parameters():
            value.normal_(0, 0.2)
    whole.classifier = torch.nn.Identity()
    state = whole.state_dict() | {"classifier.weight": torch.ones(3, 32)}
    old = {"query.bias": "q_bias", "value.bias": "v_bias"}
    for number, names in enumerate((old, {v: k for k, v in old.items()})):
        renamed = {}
        for name, value in state.items():
            part = next((each for each in names if name.endswith("." + each)), None)
            renamed[name if part is None else name.removesuffix(part) + names[part]] = value
        save_file(renamed, tmp_path / f"{number}.safetensors")
        extractor = make_extractor("videomae:small", "clips", weights=tmp_path / f"{number}.safetensors")
        assert extractor.frames == 16
        clip = torch.rand(1, 16, 3, 224, 224)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        with torch.no_grad():
            want = whole((clip - mean) / std).logits
        torch.testing.assert_close(extractor.function(clip), want, atol=1e-5, rtol=1e-4)
    # A file of pretraining has a norm on the patches instead.
    plain = {k: v for k, v in state.items() if not k.startswith(("fc_norm", "classifier"))}
    plain |= {f"videomae.layernorm.{part}": torch.ones(32) for part in ("weight", "bias")}
    save_file(plain | {"decoder.x": torch.ones(1)}, tmp_path / "pre.safetensors")
    found = make_extractor("videomae:small", "clips", weights=tmp_path / "pre.safetensors").function(clip)
    assert found.mean() == pytest.approx(1, abs=1e-3)
    save_file({"x": torch.ones(1)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights of VideoMAE small"):
        make_extractor("videomae:small", "clips", weights=tmp_path / "bad.safetensors")
    folder = str(tmp_path)
    assert run(["eval", "fvd", folder, folder, "--features", "videomae:base"]) == 4
    assert run(["eval", "fid", folder, folder, "--features", "videomae:base"]) == 2
    assert run(["eval", "fvd", folder, folder, "--features", "videomae:base", "--frames", "8"]) == 2
    assert "takes 16 frames of a clip, not 8" in capsys.readouterr().err
