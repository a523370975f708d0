"""The model in the box: loads offline as ours and as stock WanPipeline, generates, and refuses sizes it cannot make."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sparsereel import minireel
from sparsereel.minireel.sizes import Size, check_size, count_tokens

TINY = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "pt"}
PROMPT = "a red 3 moving right on navy"


@pytest.fixture(scope="module")
def pipeline():
    pipeline = minireel.load()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_sizes_count_their_tokens():
    assert (minireel.NATIVE.frames, minireel.NATIVE.height, minireel.NATIVE.width) == (33, 96, 96)
    assert minireel.NATIVE.tokens == 1296
    assert minireel.LARGE.tokens >= 8000
    assert minireel.LARGE.tokens == count_tokens(minireel.LARGE.frames, minireel.LARGE.height, minireel.LARGE.width)
    with pytest.raises(ValueError, match="has 1296"):
        Size(frames=33, height=96, width=96, steps=20, guidance=3.5, tokens=1300)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        ((30, 96, 96), r"4k \+ 1 .* got 30; the nearest is 29"),
        ((0, 96, 96), "the nearest is 1"),
        ((33, 100, 96), "height must be a multiple of 8 pixels, got 100; the nearest is 96"),
        ((33, 96, 3), "width .* the nearest is 8"),
    ],
)
def test_sizes_that_cannot_be_made(pipeline, size, text):
    with pytest.raises(ValueError, match=text):
        check_size(*size)
    frames, height, width = size
    with pytest.raises(ValueError, match=text):
        pipeline(PROMPT, num_frames=frames, height=height, width=width)


def test_stock_pipeline_gives_the_same_video(pipeline):
    from diffusers import WanPipeline

    stock = WanPipeline.from_pretrained(minireel.WEIGHTS, torch_dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    expected = stock(PROMPT, guidance_scale=3.5, max_sequence_length=16, generator=seeded(), **TINY).frames
    ours = pipeline(PROMPT, guidance_scale=3.5, generator=seeded(), **TINY).frames
    assert torch.equal(ours, expected)
    assert isinstance(pipeline, WanPipeline)


def test_defaults_are_native(pipeline):
    seen = {}

    def stop(pipe, step, timestep, values):
        seen.update(latents=values["latents"].shape, steps=len(pipe.scheduler.timesteps), scale=pipe.guidance_scale)
        pipe._interrupt = True
        return values

    pipeline(PROMPT, generator=seeded(), output_type="latent", callback_on_step_end=stop)
    assert seen == {
        "latents": (1, 16, 9, 12, 12),
        "steps": minireel.NATIVE.steps,
        "scale": minireel.NATIVE.guidance,
    }


def test_a_short_generation_shows_the_right_world(pipeline):
    frames = pipeline(
        PROMPT, height=48, width=48, num_frames=17, num_inference_steps=4, generator=seeded(), output_type="np"
    ).frames[0]
    assert frames.shape == (17, 48, 48, 3)
    assert np.isfinite(frames).all()
    background = np.median(frames.reshape(-1, 3), axis=0) * 255
    np.testing.assert_allclose(background, (12, 18, 62), atol=12)
    ink = np.abs(frames * 255 - background).max(-1) > 60
    assert 0.01 < ink.mean() < 0.3
    assert frames[ink].mean(0).argmax() == 0


def test_sizes_of_eight_work(pipeline):
    video = pipeline(PROMPT, **{**TINY, "height": 24, "width": 40}).frames
    assert video.shape == (1, 5, 3, 24, 40)


def test_unknown_words_are_named(pipeline):
    with pytest.warns(UserWarning, match="does not know: cat, surfing"):
        pipeline("a cat surfing on navy", **{**TINY, "num_inference_steps": 1})
    an, a = (pipeline.tokenizer(f"{article} orange 3 on navy").input_ids for article in ("an", "a"))
    assert an == a


def test_dtype_and_bad_dtype():
    pipeline = minireel.load(torch.bfloat16)
    assert pipeline.transformer.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    assert pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float32
    with pytest.raises(ValueError, match=r"float32, torch\.bfloat16"):
        minireel.load(torch.int8)


def test_loads_within_seconds(pipeline):
    start = time.process_time()
    minireel.load()
    assert time.process_time() - start < 5


def test_weights_are_safetensors_and_small():
    files = [path for path in minireel.WEIGHTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    # The causal transformer is among them; all weights of the project stay under this.
    assert sum(path.stat().st_size for path in files) < 44e6


def test_importing_minireel_leaves_diffusers_alone():
    code = "import sys; from sparsereel import minireel; minireel.NATIVE; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_class_is_found_lazily():
    from diffusers import WanPipeline

    assert issubclass(minireel.MiniReelPipeline, WanPipeline)
    with pytest.raises(AttributeError, match="MicroReel"):
        _ = minireel.MicroReel
