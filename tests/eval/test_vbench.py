"""VBench: golden totals, refusals of partial totals, file layout, dimensions computed by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sparsereel.cli.main import run
from sparsereel_eval.vbench import dimensions, layout
from sparsereel_eval.vbench.names import DIMENSIONS, SUITES
from sparsereel_eval.vbench.scores import read_results, score

RAW = dict(
    zip(
        DIMENSIONS,
        (0.96, 0.97, 0.99, 0.99, 0.70, 0.60, 0.65, 0.90, 0.70, 0.95, 0.90, 0.70, 0.50, 0.20, 0.24, 0.27),
        strict=True,
    )
)


def test_golden_total():
    found = score(RAW)
    assert found.quality == pytest.approx(0.839973, abs=1e-6)
    assert found.semantic == pytest.approx(0.762089, abs=1e-6)
    assert found.total == pytest.approx(0.824396, abs=1e-6)
    assert found.missing == ()


def test_the_suites_add_up():
    assert (len(DIMENSIONS), sum(SUITES.values())) == (16, 946)
    assert {about.suite for about in DIMENSIONS.values()} == set(SUITES)
    assert sum(about.weight for about in DIMENSIONS.values() if about.group == "quality") == 6.5


def test_no_total_of_a_part():
    found = score({k: v for k, v in RAW.items() if k != "scene"})
    assert found.quality == pytest.approx(0.839973, abs=1e-6)
    assert (found.semantic, found.total, found.missing) == (None, None, ("scene",))
    assert score({"Temporal Flickering": 0.6293}).normalised["temporal_flickering"] == 0
    for bad, text in (({"scene": 50}, r"\[-1, 1\]"), ({"sceen": 0.5}, "unknown"), ({"scene": True}, r"\[-1, 1\]")):
        with pytest.raises(ValueError, match=text):
            score(bad)


def test_score_command(tmp_path, capsys):
    names = list(RAW)
    for part, chosen in (("a", names[:7]), ("b", names[7:])):
        data = {n.replace("_", " "): [RAW[n], [{"video_path": "x", "video_results": 1}]] for n in chosen}
        (tmp_path / f"{part}_eval_results.json").write_text(json.dumps(data))
    files = [str(tmp_path / f"{part}_eval_results.json") for part in "ab"]
    assert run(["eval", "vbench", "score", *files, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == pytest.approx(0.824396, abs=1e-6)
    assert run(["eval", "vbench", "score", files[0]]) == 0
    assert "no Total: 9 of 16 dimensions are missing" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "c.json").write_text('{"scene": 0.4}')
    with pytest.raises(ValueError, match="gives scene as 0.4, another file as 0.5"):
        read_results([tmp_path / "b_eval_results.json", tmp_path / "c.json"])
    (tmp_path / "c.json").write_text("[1]")
    assert run(["eval", "vbench", "score", str(tmp_path / "c.json")]) == 2


def test_names_of_clips(tmp_path):
    assert layout.clip_name("a cat, 'sitting'", 3) == "a cat, 'sitting'-3.mp4"
    assert layout.prompt_of(tmp_path / "a cat-12-3.mp4") == ("a cat-12", 3)
    assert layout.prompt_of(tmp_path / "a cat.mp4") == ("a cat", None)
    for prompt in ("../x", "a/b", "", ".hidden", "x" * 260, "a\nb"):
        with pytest.raises(ValueError, match="file name"):
            layout.clip_name(prompt, 0)


def test_coverage_and_suites(tmp_path):
    for i in (0, 1, 4):
        (tmp_path / f"a dog-{i}.mp4").write_bytes(b"")
    found = layout.coverage(tmp_path, ["a dog", "a dog"])
    assert (found.expected, found.found, found.missing) == (5, 3, ("a dog-2", "a dog-3"))
    assert layout.coverage(tmp_path, ["a dog"], "temporal_flickering").expected == 25
    (tmp_path / "prompts_per_dimension").mkdir()
    path = tmp_path / "prompts_per_dimension" / "scene.txt"
    path.write_bytes("﻿".encode() + b"\r\n".join(b"place %d" % i for i in range(86)) + b"\r\n")
    assert layout.read_suite(tmp_path, "scene")[0] == "place 0"
    path.write_text("one")
    with pytest.raises(ValueError, match="holds 1 prompts, the official suite has 86"):
        layout.read_suite(tmp_path, "scene")


def grey(*levels):
    return [np.full((16, 16, 3), level, np.uint8) for level in levels]


def test_flickering_by_hand():
    assert dimensions.temporal_flickering(grey(10, 20, 50)) == pytest.approx((255 - 20) / 255)
    assert dimensions.temporal_flickering(iter(grey(7, 7))) == 1
    assert dimensions.temporal_flickering([f / 255 for f in grey(10, 20, 50)]) == pytest.approx((255 - 20) / 255)
    with pytest.raises(ValueError, match="at least 2 frames"):
        dimensions.temporal_flickering(grey(1))


def test_consistency_by_hand():
    """Unit vectors at 0, 60 and 180 degrees: cosines with the one before 1/2, -1/2; with the first 1/2, -1."""
    angles = {0: 0.0, 1: np.pi / 3, 2: np.pi}

    def features(frame):
        angle = angles[int(frame[0, 0, 0])]
        return torch.tensor([np.cos(angle), np.sin(angle)])

    assert dimensions.consistency(grey(0, 1, 2), features) == pytest.approx((0.5 + 0) / 2)
    assert dimensions.consistency(grey(0, 0), features) == pytest.approx(1)


def test_smoothness_by_hand():
    def mean(a, b):
        return (a.astype(float) + b) / 2 / 255

    assert dimensions.motion_smoothness(grey(0, 10, 20, 30, 40), mean) == pytest.approx(1)
    assert dimensions.motion_smoothness(grey(0, 30, 20), mean) == pytest.approx((255 - 20) / 255)


@pytest.mark.parametrize(("length", "dynamic"), [(0.3, False), (0.5, True)])
def test_dynamic_degree(length, dynamic):
    # 16 pixels of height: the threshold is 6 * 16 / 256 = 0.375 pixels.
    def flow(a, b):
        return np.full((16, 16, 2), [0.0, length])

    assert dimensions.is_dynamic(grey(*range(8)), 8, flow) is dynamic
    with pytest.raises(ValueError, match="at least 6 frames"):
        dimensions.is_dynamic(grey(*range(8)), 16, flow)


def test_imaging_quality():
    assert dimensions.imaging_quality(grey(20, 60), lambda frame: float(frame.mean())) == pytest.approx(0.4)
    with pytest.raises(ValueError, match=r"\[0, 100\]"):
        dimensions.imaging_quality(grey(200), lambda frame: float(frame.mean()))
