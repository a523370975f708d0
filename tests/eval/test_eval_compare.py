"""`sparsereel eval compare`: tables, thresholds, exit codes, damaged files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sparsereel.cli.main import run


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch home"))


@pytest.fixture
def sets(tmp_path):
    """Seven small clips, and two tested copies: a little noise and much."""
    rng = np.random.default_rng(0)
    for name, noise in (("dense", 0.0), ("near", 0.01), ("far", 0.1)):
        (tmp_path / name).mkdir()
        for i in range(7):
            base = np.random.default_rng(i).random((1, 4, 4, 3)).repeat(6, 1).repeat(6, 2).repeat(3, 0) * 0.6 + 0.2
            np.save(tmp_path / name / f"clip {i}.npy", np.clip(base + rng.normal(0, noise, base.shape), 0, 1))
    return tmp_path


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_folders(sets, capsys):
    command = ["eval", "compare", str(sets / "dense"), str(sets / "near"), "--versus", str(sets / "far")]
    assert run([*command, "--json", str(sets / "r.json"), "--threshold", "psnr=35,ssim=0.5"]) == 0
    text = said(capsys)
    assert "alexnet-owt-7be5be79.pth" in text
    result = json.loads((sets / "r.json").read_text())
    psnr = result["table"]["psnr"]
    assert psnr["n"] == 7
    assert psnr["mean"] == pytest.approx(40, abs=0.3)
    assert psnr["interval"][0] <= psnr["mean"] <= psnr["interval"][1]
    assert len(result["pairs"][0]["per_frame"]["psnr"]) == 3
    # All seven near clips are better than the far ones: the smallest p of seven pairs.
    assert result["versus"]["psnr"]["mean"] == pytest.approx(20, abs=0.6)
    assert result["versus"]["psnr"]["p"] == pytest.approx(2 / 2**7)
    assert result["table"]["flicker"]["p"] == pytest.approx(2 / 2**7)


def test_missed_threshold_is_exit_code_1(sets, capsys):
    pair = [str(sets / "dense" / "clip 0.npy"), str(sets / "far" / "clip 0.npy")]
    assert run(["eval", "compare", *pair, "--threshold", "psnr=25", "--json", "-"]) == 1
    out = capsys.readouterr()
    assert json.loads(out.out)["missed"]
    assert "below the threshold of 25" in out.err
    assert run(["eval", "compare", *pair, "--threshold", "psnr=10"]) == 0
    assert run(["eval", "compare", *pair, "--threshold", "lpips_alex=0.1"]) == 2
    assert "was not measured" in said(capsys)


def test_damaged_clips_are_refused_or_left_out(sets, capsys):
    (sets / "near" / "clip 3.npy").write_bytes(b"")
    command = ["eval", "compare", str(sets / "dense"), str(sets / "near")]
    assert run(command) == 2
    assert "clip 3.npy is empty" in said(capsys)
    assert run([*command, "--skip-bad", "--json", str(sets / "r.json")]) == 0
    assert "left out" in said(capsys)
    assert json.loads((sets / "r.json").read_text())["table"]["psnr"]["n"] == 6


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["no.mp4", "dense"], "no.mp4 does not exist"),
        (["dense", "near", "--threshold", "psnr"], "NAME=NUMBER"),
        (["dense", "near", "--lpips", "squeeze"], "unknown LPIPS network"),
        (["dense", "near", "--lpips-weights", "no.safetensors"], "no.safetensors"),
    ],
)
def test_wrong_use(sets, capsys, monkeypatch, arguments, text):
    monkeypatch.chdir(sets)
    assert run(["eval", "compare", *arguments]) == 2
    assert text in said(capsys)


def test_a_clip_with_itself(sets, capsys):
    clip = str(sets / "dense" / "clip 0.npy")
    assert run(["eval", "compare", clip, clip, "--json", str(sets / "r.json")]) == 0
    text = said(capsys)
    assert "psnr 1 inf" in text
    assert "every frame is identical: PSNR is infinite" in text
    result = json.loads((sets / "r.json").read_text())
    assert result["identical"] is True
    assert result["table"]["ssim"]["mean"] == 1
    assert run(["eval", "compare", clip, str(sets / "near" / "clip 0.npy")]) == 0
    assert "inf" not in said(capsys)
