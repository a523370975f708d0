"""`eval vbench measure`: what runs without weights, with them (random networks of the right shapes), and officially."""

from __future__ import annotations

import json
import stat
import sys

import numpy as np
import pytest
import torch

from sparsereel.cli.main import run
from sparsereel.evaluate.vbench import Sources, measure
from sparsereel_eval.lpips import MissingWeights
from sparsereel_eval.vbench import backbones, dimensions, layout, official, weights
from sparsereel_eval.vbench.names import DIMENSIONS
from sparsereel_eval.vbench.scores import read_results


@pytest.fixture
def clips(tmp_path):
    """Two clips of 12 frames with a moving square, named like the official suite's."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for index in range(2):
        video = np.full((12, 48, 64, 3), 40, np.uint8)
        for frame in range(12):
            video[frame, 8:24, 3 * frame : 3 * frame + 16] = 90 + 100 * index
        np.save(folder / f"a square, cubist style-{index}.npy", video)
    return folder


def test_every_dimension_has_files_or_an_official_reason():
    assert set(weights.FILES) | set(weights.OFFICIAL_ONLY) == set(DIMENSIONS)
    assert not set(weights.FILES) & set(weights.OFFICIAL_ONLY)


def test_without_weights_each_says_what_it_needs(clips, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("something was fetched"))
    empty = tmp_path / "empty"
    assert run(["eval", "vbench", "measure", str(clips), "--weights", str(empty), "--json", "-"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert set(result["vbench_like"]) == {"temporal_flickering"}
    assert set(result["left_out"]) == set(DIMENSIONS) - {"temporal_flickering"}
    line = result["left_out"]["dynamic_degree"]
    for part in ("raft_large_C_T_V1-22a6c225.pth", "20 MB", "https://download.pytorch.org", str(empty), "--download"):
        assert part in line
    assert "--official" in result["left_out"]["object_class"]
    for key in result["left_out"]:
        assert sum(line.startswith(f"{key} left out:") for line in said.err.splitlines()) == 1
    asked = ["eval", "vbench", "measure", str(clips), "--weights", str(empty), "--dimension", "subject consistency"]
    assert run(asked) == 4


def test_official_layout_can_be_scored(clips, tmp_path):
    out = tmp_path / "out"
    result = measure(clips, ["temporal_flickering"], lambda text: None, output=out)
    data = json.loads((out / "vbench_like_eval_results.json").read_text())
    score, rows = data["temporal_flickering"]
    assert score == pytest.approx(result["vbench_like"]["temporal_flickering"]["mean"])
    assert {"video_path", "video_results"} == set(rows[0])
    assert read_results([out / "vbench_like_eval_results.json"]) == {"temporal_flickering": score}
    assert len(json.loads((out / "vbench_like_full_info.json").read_text())) == 2


def save(path, state):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def test_dynamic_degree_runs_with_its_file(clips, tmp_path, monkeypatch):
    from torchvision.models.optical_flow import raft_large

    torch.manual_seed(0)
    path = tmp_path / "w" / weights.RAFT.path
    save(path, raft_large(weights=None).state_dict())
    with pytest.raises(ValueError, match="is damaged: its SHA-256 begins with"):
        weights.find("dynamic_degree", tmp_path / "w")
    monkeypatch.setattr(weights.WeightFile, "digits", property(lambda self: None))
    monkeypatch.setattr(backbones, "RAFT_UPDATES", 1)
    found = measure(clips, ["dynamic_degree"], print, sources=Sources(tmp_path / "w", fps=8))["vbench_like"]
    assert set(found["dynamic_degree"]["clips"].values()) <= {0.0, 1.0}
    save(path, {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="does not hold the weights of RAFT"):
        measure(clips, ["dynamic_degree"], print, sources=Sources(tmp_path / "w", fps=8))


def test_weights_that_are_programs_are_refused(tmp_path):
    save(tmp_path / "a.pth", {"a": print})
    with pytest.raises(ValueError, match="cannot be read as weights"):
        weights.read_tensors(tmp_path / "a.pth")
    save(tmp_path / "b.pth", [torch.zeros(1)])
    with pytest.raises(ValueError, match="named tensors only"):
        weights.read_tensors(tmp_path / "b.pth")


@pytest.mark.slow
def test_subject_consistency_takes_the_published_file(clips, tmp_path):
    import timm

    torch.manual_seed(0)
    state = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0).state_dict()
    save(tmp_path / weights.DINO.path, state)
    found = measure(clips, ["subject_consistency"], print, sources=Sources(tmp_path))["vbench_like"]
    assert 0 < found["subject_consistency"]["score"] <= 1


def test_frames_are_resized_as_the_official_program_does():
    """Shorter side 224 without antialiasing, checked against torchvision's own resize."""
    from torchvision.transforms.functional import InterpolationMode, center_crop, resize

    pictures = torch.rand(1, 3, 300, 451) * 255
    for mode, named in (("bilinear", InterpolationMode.BILINEAR), ("bicubic", InterpolationMode.BICUBIC)):
        expected = resize(pictures, 224, named, antialias=False)
        assert torch.equal(backbones.shorter_side(pictures, 224, mode), expected)
        assert not torch.allclose(resize(pictures, 224, named, antialias=True), expected, atol=0.5)
        assert torch.equal(backbones.centre(expected, 224), center_crop(expected, [224, 224]))
    upright = backbones.shorter_side(pictures.transpose(2, 3), 224, "bilinear")
    assert upright.shape[-2:] == (336, 224)


def test_features_see_what_the_networks_expect():
    seen = []

    def encode(pictures):
        seen.append(pictures)
        return pictures.mean((2, 3))

    frame = np.full((100, 300, 3), 128, np.uint8)
    for make, mean, std in (
        (backbones.subject_features, backbones._IMAGENET[0], backbones._IMAGENET[1]),
        (backbones.clip_features, *backbones._CLIP),
        (backbones.pil_clip_features, *backbones._CLIP),
    ):
        value = make(encode)(frame)
        expected = (128 / 255 - torch.tensor(mean)) / torch.tensor(std)
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)
    assert [tuple(p.shape[-2:]) for p in seen] == [(224, 672), (224, 224), (224, 224)]


def test_ratings_by_hand():
    head = torch.nn.Linear(3, 1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[6.0, 0, 0]]))
        head.bias.fill_(1)
    rate = backbones.aesthetic_rating(lambda pictures: torch.tensor([[3.0, 4.0, 0.0]]), head)
    frames = [np.zeros((32, 32, 3), np.uint8)] * 2
    assert dimensions.aesthetic_quality(frames, rate) == pytest.approx((6 * 0.6 + 1) / 10)
    sizes = []
    quality = backbones.imaging_rating(lambda picture: sizes.append(tuple(picture.shape[-2:])) or torch.tensor(40.0))
    assert dimensions.imaging_quality([np.zeros((300, 1024, 3), np.uint8)], quality) == pytest.approx(0.4)
    assert sizes == [(150, 512)]
    cosine = dimensions.appearance_style(frames, lambda f: torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0]))
    assert cosine == pytest.approx(0.6)


def test_flow_is_padded_to_what_raft_takes():
    class Network(torch.nn.Module):
        def forward(self, a, b, num_flow_updates):
            assert num_flow_updates == 20
            assert float(a.min()) >= -1
            self.shape = tuple(a.shape[-2:])
            return [torch.zeros(1, 2, *a.shape[-2:])]

    network = Network()
    flow = backbones.optical_flow(network)(*[np.zeros((130, 201, 3), np.uint8)] * 2)
    assert network.shape == (136, 208)
    assert flow.shape == (136, 208, 2)


def test_official_prompts_choose_the_clips(clips, tmp_path):
    info = tmp_path / "VBench_full_info.json"
    style = {"appearance_style": {"appearance_style": "cubist style"}}
    entries = [
        {
            "prompt_en": "a square, cubist style",
            "dimension": ["appearance_style", "temporal_flickering"],
        },
        {"prompt_en": "a dog", "dimension": ["temporal_flickering"]},
    ]
    entries[0]["auxiliary_info"] = style
    info.write_text(json.dumps(entries))
    prompts = layout.read_info(info)
    assert prompts[0].style == "cubist style"
    np.save(clips / "stray-0.npy", np.zeros((3, 8, 8, 3), np.uint8))
    said = []
    found = measure(clips, ["temporal_flickering"], said.append, info=info)
    assert len(found["vbench_like"]["temporal_flickering"]["clips"]) == 2, "the stray clip is not of the suite"
    assert found["coverage"]["temporal_flickering"] == {"expected": 50, "found": 2}
    assert "2 of 50 clips are there" in said[0]
    info.write_text("[1]")
    with pytest.raises(ValueError, match=r"no VBench_full_info\.json"):
        layout.read_info(info)


STUB = """
import json, pathlib
class VBench:
    def __init__(self, device, info, output):
        self.output = pathlib.Path(output)
        assert not isinstance(device, str)
    def evaluate(self, videos_path, name, dimension_list, mode):
        assert mode == "custom_input"
        if dimension_list == ["imaging_quality"]:
            raise RuntimeError("no weights")
        row = [0.5, [{"video_path": videos_path, "video_results": 0.5}]]
        (self.output / f"{name}_eval_results.json").write_text(json.dumps({dimension_list[0]: row}))
"""


def test_the_official_program_runs_in_its_own_environment(clips, tmp_path, capsys):
    missing = ["eval", "vbench", "measure", str(clips), "--official", "--env", str(tmp_path / "env"), "-o"]
    assert run([*missing, str(tmp_path / "out")]) == 4
    assert "sparsereel eval vbench setup" in " ".join(capsys.readouterr().err.split())
    assert run(["eval", "vbench", "setup", "--env", str(tmp_path / "env")]) == 4
    assert "say --download" in " ".join(capsys.readouterr().err.split())
    # An environment whose Python finds a stand-in for the official package.
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "vbench.py").write_text(STUB)
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "stub"} exec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    command = [*missing, str(tmp_path / "out"), "--dimension", "subject_consistency", "--dimension", "imaging_quality"]
    assert run(command) == 4
    assert "imaging_quality failed: RuntimeError: no weights" in capsys.readouterr().err
    merged = tmp_path / "out" / "official_eval_results.json"
    assert read_results([merged]) == {"subject_consistency": 0.5}


def test_the_official_program_is_named_when_it_fails(tmp_path):
    with pytest.raises(MissingWeights, match="no environment at"):
        official.interpreter(tmp_path)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(ValueError, match="ended with code 3: broken"):
        official.run(tmp_path, tmp_path, ["scene"], tmp_path / "out")
