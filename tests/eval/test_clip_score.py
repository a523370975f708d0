"""CLIP score with a model one can compute by hand, and with a tiny open_clip model of random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsereel.cli.main import run
from sparsereel_eval.clip_score import ClipModel, load_clip_model

open_clip = pytest.importorskip("open_clip")
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Name and weights of a tiny model known to open_clip."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-test.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-test.json")
    torch.manual_seed(0)
    save_file(open_clip.create_model("tiny-test").state_dict(), folder / "w.safetensors")
    return "tiny-test", folder / "w.safetensors"


def test_by_hand():
    def image(x):
        return x.mean((2, 3))[:, :2]  # mean red and green

    model = ClipModel("x", image, lambda text: torch.tensor([[1.0, 0.0]]), 8, (0.0,) * 3, (1.0,) * 3)
    frames = torch.zeros(2, 3, 8, 8)
    frames[0, 0] = 0.5  # red: angle 0
    frames[1, :2] = 0.5  # yellow: 45 degrees
    found = model.score(frames, "red")
    assert found.text == pytest.approx((1 + 0.5**0.5) / 2)
    assert found.steadiness == pytest.approx(0.5**0.5)
    assert model.score(frames[:1], "red").steadiness is None


def test_preparation_equals_open_clips_own(tiny):
    from PIL import Image

    model = load_clip_model(*tiny)
    picture = np.random.default_rng(0).random((6, 9, 3)).repeat(10, 0).repeat(10, 1)
    picture = (picture * 255).astype(np.uint8)
    theirs = open_clip.image_transform(32, is_train=False)(Image.fromarray(picture))
    ours = model.prepare(torch.tensor(picture).permute(2, 0, 1)[None] / 255)[0]
    assert ours.shape == theirs.shape == (3, 32, 32)
    assert (ours - theirs).abs().mean() < 0.02, "they round to 8 bits after resizing"


def test_command(tiny, tmp_path, capsys):
    name, weights = tiny
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).random((3, 40, 48, 3)))
    command = ["eval", "clip", str(tmp_path), "--model", name]
    assert run([*command, "--weights", str(weights)]) == 2
    assert "no prompt is known" in capsys.readouterr().err
    for i in range(2):
        (tmp_path / f"{i}.json").write_text(json.dumps({"prompt": f"prompt {i}"}))
    assert run([*command, "--weights", str(weights), "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in result["clips"]] == ["prompt 0", "prompt 1"]
    assert -1 <= result["text"]["mean"] <= 1
    assert result["steadiness"]["n"] == 2
    (tmp_path / "p.txt").write_text("one\n")
    assert run([*command, "--weights", str(weights), "--prompts", str(tmp_path / "p.txt")]) == 2
    assert "1 prompts for 2 clips" in capsys.readouterr().err
    assert run(command) == 4
    assert "needs --weights" in capsys.readouterr().err
    save_file({"x": torch.ones(1)}, tmp_path / "bad.safetensors.part")
    assert run([*command, "--weights", str(tmp_path / "bad.safetensors.part")]) == 2
    assert run(["eval", "clip", str(tmp_path), "--model", "nice", "--weights", str(weights)]) == 2
