"""`sparsereel extend`: what it writes, what a dry run predicts, and one sentence for every kind of wrong input."""

from __future__ import annotations

import json

import imageio.v3 as iio
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparsereel import AttentionPlan, minireel
from sparsereel.cli.main import run
from sparsereel.extend.forecast import forecast, meta_pipeline
from sparsereel.patterns import Spatial
from sparsereel_kernels import cost

PROMPT = "a red 3 moving right on navy"


def test_a_clip_longer_than_trained(tmp_path, capsys):
    video = tmp_path / "long.mp4"
    size = ["--frames", "41", "--height", "32", "--width", "32", "--steps", "1"]
    assert run(["extend", PROMPT, *size, "--method", "ultravico", "-o", str(video), "--json", "-"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert iio.imread(video, plugin="FFMPEG").shape == (41, 32, 32, 3)
    assert result == json.loads(video.with_suffix(".json").read_text())
    assert result["extension"]["method"] == "ultravico(alpha=0.9)"
    assert result["extension"]["arguments"] == {"num_frames": 41, "height": 32, "width": 32}
    assert result["report"]["replaced"] == 6
    assert f"wrote {video}" in " ".join(printed.err.split())
    assert {p.suffix for p in tmp_path.iterdir()} == {".mp4", ".png", ".json"}


def test_regional_prompts(tmp_path, capsys):
    video = tmp_path / "regions.mp4"
    size = ["--frames", "5", "--height", "128", "--steps", "1", "--method", "cupscale", "-o", str(video), "--json", "-"]
    regions = ["--region", "0,0,0.5,1=a red 3", "--region", "0.5,0,1,1 = a navy 5"]
    assert run(["extend", PROMPT, *size, *regions]) == 0
    method = json.loads(capsys.readouterr().out)["extension"]["method"]
    assert "('a red 3', (0.0, 0.0, 0.5, 1.0)), ('a navy 5', (0.5, 0.0, 1.0, 1.0))" in method


def test_dry_run_says_what_it_would_cost_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["extend", "--frames", "2x", "--dry-run", "--json", "-"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["arguments"] == {"num_frames": 69}
    assert result["tokens"] == 18 * 12 * 12
    assert result["trained_tokens"] == minireel.NATIVE.tokens
    assert result["forwards"] == 2 * minireel.NATIVE.steps
    for text in ("num_frames=69", "2,592", "ultravico", "GiB", "FLOPs"):
        assert text in printed.err
    assert not list(tmp_path.iterdir())


def ask(**options):
    sizes = {"frames": 45, "height": None, "width": None}
    plan = options.pop("plan", None)
    return forecast(minireel.WEIGHTS, minireel.MiniReelPipeline, sizes, "plain", plan, **options)


def test_a_small_clip_below_the_tokens_that_a_plan_asks_for_is_priced_dense():
    sizes = {"frames": None, "height": 192, "width": 192}
    plan = AttentionPlan.uniform(Spatial(0))
    small, large = minireel.NATIVE.tokens, 4 * minireel.NATIVE.tokens

    def flops(least):
        chosen = plan.with_schedule(min_tokens=least)
        found = forecast(minireel.WEIGHTS, minireel.MiniReelPipeline, sizes, "upscale", chosen, steps=16)
        return found.attention_flops

    everywhere, in_large, nowhere = flops(0), flops(small + 1), flops(large + 1)
    # Sixteen steps of the small clip, two of the large one.
    density = everywhere / nowhere
    saved = (1 - density) * 2 * large**2 / (16 * small**2 + 2 * large**2)
    assert density < 0.5
    assert in_large / nowhere == pytest.approx(1 - saved)


def test_flops_are_those_that_torch_counts():
    found = ask(steps=3)
    model = meta_pipeline(minireel.WEIGHTS, minireel.MiniReelPipeline).transformer
    latents = torch.empty(1, model.config.in_channels, 12, 12, 12, device="meta")
    text = torch.empty(1, 16, model.config.text_dim, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, torch.empty(1, device="meta"), text)
    assert found.forwards == 6
    # Not counted: text, timesteps, patches, and the few keys of cross-attention.
    assert (found.attention_flops + found.other_flops) / 6 == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_plans_and_guidance_count():
    dense = ask(steps=2)
    assert ask(steps=2, guidance=1.0).attention_flops == dense.attention_flops / 2
    near = AttentionPlan.uniform(Spatial(frames=1))
    sparse = ask(steps=2, plan=near)
    assert 0.1 < sparse.density < 0.6
    assert sparse.attention_flops == pytest.approx(dense.attention_flops * sparse.density)
    assert sparse.other_flops == dense.other_flops


def test_seconds_come_from_the_cost_table(monkeypatch):
    monkeypatch.setattr(cost, "find", lambda *a, **k: None)
    assert ask(steps=2).attention_seconds is None
    fit = cost.Fit("cpu", "x", 1, "float32", 64, "cpu", False, 1.0, 0.0, 1e-6, 0.0, 0.0)
    monkeypatch.setattr(cost, "find", lambda *a, **k: fit)
    model = meta_pipeline(minireel.WEIGHTS).transformer.config
    calls = 4 * model.num_layers * model.num_attention_heads
    assert ask(steps=2).attention_seconds == pytest.approx(calls * (1.0 + 1e-6 * 1728**2))


def test_memory_grows_with_tokens_and_bytes():
    weights = sum(f.stat().st_size for f in minireel.WEIGHTS.glob("*/*.safetensors"))
    assert ask().memory > ask(dtype=torch.bfloat16).memory
    assert ask().memory > weights / 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([PROMPT], "extend needs --frames, --height or --width"),
        (["--frames", "2x"], "give a PROMPT, or --dry-run"),
        ([PROMPT, "--frames", "twice"], "--frames must be a ratio such as 2x or a whole number, got 'twice'"),
        (["--frames", "66", "--dry-run"], "frames must be 4k + 1, got 66; the nearest is 65"),
        (["--frames", "2x", "--dry-run", "--method", "magic"], "unknown method 'magic'; allowed: auto"),
        (["--frames", "2x", "--dry-run", "--model", "no/where"], "--dry-run looks at a folder on this machine"),
        ([PROMPT, "--frames", "2x", "-o", "clip.avi"], "must be a file that ends in .mp4"),
        (["--frames", "2x", "--dry-run", "--dtype", "int8"], "unknown dtype 'int8'"),
        ([PROMPT, "--height", "2x", "--region", "0,0,1=a 3"], '--region is written "top,left,bottom,right=text"'),
        ([PROMPT, "--height", "2x", "--region", "0,0,1,1= "], '--region is written "top,left,bottom,right=text"'),
        ([PROMPT, "--height", "64", "--region", "0,0,1,2=a 3", "--method", "cupscale"], "shares of the picture"),
        (
            ["--dry-run", "--height", "64", "--region", "0,0,1,1=a 3"],
            "is about windows; give views as well, or a method that",
        ),
        (
            [PROMPT, "--height", "64", "--region", "0,0,1,1=a 3"],
            "is about windows; give views as well, or a method that",
        ),
    ],
)
def test_wrong_input_is_one_sentence(arguments, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["extend", *arguments]) == 2
    assert text in " ".join(capsys.readouterr().err.split())
