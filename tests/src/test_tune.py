"""`tune` on a folder of three tiny videos with minireel: weights that stock diffusers loads, exact resumption."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

import sparsereel
from sparsereel import minireel
from sparsereel.cli.main import run
from sparsereel.media import write_mp4
from sparsereel.tune.clips import find_clips
from sparsereel.tune.loop import Settings
from sparsereel.tune.state import STATE, WEIGHTS

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = {"frames": 9, "height": 32, "width": 32}
TINY = Settings(steps=4, rank=2, learning_rate=1e-2, held_out=0.34, checkpoint_every=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("clips")
    lines = []
    for number in range(3):
        frames = np.full((11, 40, 36, 3), 40 * number, np.uint8)
        frames[:, 10:20, 5 + number : 15 + number] = 255
        write_mp4(place / f"{number}.mp4", frames)
        lines.append(json.dumps({"file": f"{number}.mp4", "caption": "a red 3 moving right on navy"}))
    (place / "captions.jsonl").write_text("\n".join(lines))
    return place


@pytest.fixture(scope="module")
def pipe():
    return minireel.load()


def weights(path):
    from safetensors.torch import load_file

    return load_file(path / WEIGHTS)


@pytest.fixture(scope="module")
def whole(pipe, folder, tmp_path_factory):
    """A run that nobody interrupted."""
    output = tmp_path_factory.mktemp("whole")
    before = {name: p.clone() for name, p in pipe.transformer.state_dict().items()}
    seen = []
    result = sparsereel.tune(
        pipe, folder, output, **SIZE, plan="radial", settings=TINY, on_step=lambda *a: seen.append(a)
    )
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    return output, result


def test_it_writes_what_stock_diffusers_loads(pipe, whole):
    output, result = whole
    assert result.weights == output / WEIGHTS
    assert result.steps == 4
    assert np.isfinite([result.before, result.after, *result.losses]).all()
    stock = WanPipeline.from_pretrained(minireel.WEIGHTS)
    latents = torch.randn(1, stock.transformer.config.in_channels, 3, 4, 4)
    inputs = {"hidden_states": latents, "timestep": torch.tensor([500.0])}
    inputs["encoder_hidden_states"] = torch.randn(1, 16, stock.transformer.config.text_dim)
    with torch.no_grad():
        plain = stock.transformer(**inputs).sample
        stock.load_lora_weights(output)
        tuned = stock.transformer(**inputs).sample
    assert (tuned - plain).abs().max() > 1e-5
    assert json.loads((output / "tune.json").read_text())["held_out_after"] == result.after


def test_an_interrupted_run_resumes_exactly(pipe, folder, whole, tmp_path):
    def stop(step, loss):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sparsereel.tune(pipe, folder, tmp_path, **SIZE, plan="radial", settings=TINY, on_step=stop)
    assert (tmp_path / STATE).is_file()
    assert not (tmp_path / WEIGHTS).exists()
    result = sparsereel.tune(pipe, folder, tmp_path, **SIZE, plan="radial", settings=TINY)
    expected, found = weights(whole[0]), weights(tmp_path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (result.before, result.after) == (whole[1].before, whole[1].after)
    assert len(result.losses) == 2
    with pytest.raises(ValueError, match="holds a run with another rank"):
        sparsereel.tune(pipe, folder, tmp_path, **SIZE, plan="radial", settings=Settings(steps=4, rank=3))
    with pytest.raises(ValueError, match="holds a run with another size"):
        sparsereel.tune(pipe, folder, tmp_path, frames=5, height=32, width=32, plan="radial", settings=TINY)


def test_gradients_go_through_the_sparse_kernels(pipe, folder, tmp_path):
    """Under a plan whose every call is sparse the loss is that plan's, not the dense one's."""
    from sparsereel import AttentionPlan
    from sparsereel.patterns import Spatial

    settings = Settings(steps=1, rank=2, held_out=0.34)
    losses = {}
    for name, plan in (("dense", None), ("sparse", AttentionPlan.uniform(Spatial(frames=1)))):
        losses[name] = sparsereel.tune(pipe, folder, tmp_path / name, **SIZE, plan=plan, settings=settings).losses[0]
    assert losses["dense"] != losses["sparse"]


def test_the_command(folder, tmp_path, capsys):
    size = ["--frames", "9", "--height", "32", "--width", "32", "--steps", "1", "--rank", "2"]
    assert run(["tune", str(folder), "-o", str(tmp_path / "lora"), *size, "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["steps"] == 1
    assert "load_lora_weights" in " ".join(printed.err.split())
    assert run(["tune", str(tmp_path / "nowhere"), "-o", str(tmp_path), *size]) == 2
    assert "is no folder of videos" in capsys.readouterr().err


def test_folders_that_cannot_be_trained_on(pipe, folder, tmp_path):
    with pytest.raises(ValueError, match="holds no videos"):
        find_clips(tmp_path)
    (tmp_path / "a.mp4").write_bytes((folder / "0.mp4").read_bytes())
    with pytest.raises(ValueError, match="a.mp4 has no caption: write a.txt beside it"):
        find_clips(tmp_path)
    (tmp_path / "a.txt").write_text("a red 3\n")
    assert find_clips(tmp_path) == [(tmp_path / "a.mp4", "a red 3")]
    with pytest.raises(ValueError, match="a.mp4 has 11 frames; 33 are needed"):
        sparsereel.tune(pipe, tmp_path, tmp_path / "out", frames=33, height=32, width=32, settings=TINY)
    (tmp_path / "captions.jsonl").write_text('{"file": "b.mp4", "caption": "x"}')
    with pytest.raises(ValueError, match="line 1: there is no file b.mp4"):
        find_clips(tmp_path)
    (tmp_path / "captions.jsonl").write_text("nonsense")
    with pytest.raises(ValueError, match='expected {"file": ..., "caption": ...}'):
        find_clips(tmp_path)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        Settings(rank=0)


def test_other_families_are_refused(tiny, folder, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    cog, _ = tiny.cogvideox_pipe(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="tune trains pipelines with one Wan transformer"):
        sparsereel.tune(cog, folder, tmp_path, frames=9)
