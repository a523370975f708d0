"""ministill as it ships: stock format, right pictures at its own side, HiDiffusion on larger ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import sparsereel
from sparsereel import ministill
from sparsereel_eval.stills import StillJudge

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "a red 3 on navy"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = ministill.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: StableDiffusionPipeline, side: int = 64, steps: int = 4, prompt: str = PROMPT, seed: int = 0):
    """(H, W, 3) uint8."""
    call = ministill.CALL | {"num_inference_steps": steps}
    generator = torch.Generator().manual_seed(seed)
    found = pipe(prompt, height=side, width=side, generator=generator, output_type="np", **call).images[0]
    return np.rint(found * 255).astype(np.uint8)


def test_stock_diffusers_makes_the_same_picture(pipe):
    stock = StableDiffusionPipeline.from_pretrained(ministill.WEIGHTS)
    stock.set_progress_bar_config(disable=True)
    assert np.array_equal(picture(stock), picture(pipe))


def test_pictures_are_what_the_prompt_says(pipe):
    judge = StillJudge()
    for seed, prompt in enumerate([PROMPT, "a cyan 7 on black"]):
        made = picture(pipe, steps=int(ministill.CALL["num_inference_steps"]), prompt=prompt, seed=seed)
        assert judge.score(made, prompt, ministill.SIDE).sound, prompt


def test_half_precision_makes_the_same_picture(pipe):
    half = ministill.load(torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    difference = picture(half, steps=2).astype(float) - picture(pipe, steps=2)
    assert np.abs(difference).mean() < 6


def test_hidiffusion_changes_the_larger_side_only(pipe):
    native, plain = picture(pipe), picture(pipe, 128)
    report = sparsereel.extend(pipe, height=2.0, width=2.0, method="hidiffusion")
    assert report.arguments == {"height": 128, "width": 128}
    try:
        assert np.array_equal(picture(pipe), native)
        changed = picture(pipe, 128)
        assert not np.array_equal(changed, plain)
        assert np.array_equal(picture(pipe, 128), changed)
    finally:
        sparsereel.restore(pipe)
    assert np.array_equal(picture(pipe, 128), plain)


def test_the_default_side_is_the_trained_one(pipe):
    assert pipe(PROMPT, num_inference_steps=1).images[0].size == (ministill.SIDE, ministill.SIDE)


def test_wrong_arguments_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of"):
        ministill.load(torch.float64)
    with pytest.raises(ValueError, match="no pipeline folder"):
        ministill.load(weights=tmp_path)


def test_the_weights_are_small_and_hold_no_pickle():
    files = [file for file in ministill.WEIGHTS.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".safetensors"}
    assert sum(file.stat().st_size for file in files) < 7 * 2**20
