"""minireel for long clips: the same weights, a latent frame at every fourth of a trained position."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sparsereel
from sparsereel import minireel
from sparsereel.cli.generate import _published_size
from sparsereel.generation import load_pipeline

PROMPT = "a red 3 moving right on navy"


@pytest.fixture(scope="module")
def large():
    pipeline = load_pipeline("minireel-large", "fp32", "cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def native():
    return minireel.load()


def tables(pipeline, shape):
    """cos and sin of every token: (F, H, W, D) for latents of that shape."""
    return [table.reshape(*shape, -1) for table in pipeline.transformer.rope(torch.zeros(1, 16, *shape))]


def test_four_frames_stand_where_one_stood(large, native):
    for long, plain in zip(tables(large, (33, 16, 16)), tables(native, (33, 16, 16)), strict=True):
        torch.testing.assert_close(long[::4], plain[:9])
        in_space = long.shape[-1] - large.transformer.rope.t_dim
        assert torch.equal(long[..., -in_space:], plain[..., -in_space:])
        # Between trained positions, not on them.
        assert not torch.isclose(long[1, 0, 0], plain[0, 0, 0]).all()


def test_weights_are_those_of_the_box(large, native):
    own, box = large.transformer.state_dict(), native.transformer.state_dict()
    assert own.keys() == box.keys()
    assert all(torch.equal(own[name], box[name]) for name in box)


def test_defaults_are_large(large):
    seen = {}

    def stop(pipe, step, timestep, values):
        seen.update(latents=values["latents"].shape, steps=len(pipe.scheduler.timesteps), scale=pipe.guidance_scale)
        pipe._interrupt = True
        return values

    # A guidance of 1 is one forward pass of the two that the default takes.
    large(PROMPT, guidance_scale=1.0, output_type="latent", callback_on_step_end=stop)
    assert seen == {"latents": (1, 16, 33, 16, 16), "steps": minireel.LARGE.steps, "scale": 1.0}
    assert isinstance(large, minireel.LargeMiniReelPipeline)


def test_sparsify_and_restore(large):
    small = {"height": 48, "width": 48, "num_frames": 33, "num_inference_steps": 2}

    def run():
        return large(PROMPT, generator=torch.Generator().manual_seed(1), **small).frames

    before = run()
    sparsereel.sparsify(large, sparsereel.AttentionPlan.uniform(sparsereel.patterns.Full()))
    np.testing.assert_allclose(run(), before, atol=1e-4)
    sparsereel.restore(large)
    assert np.array_equal(run(), before)


def test_extend_leaves_squeezed_positions_alone(large):
    with pytest.raises(ValueError, match="rotary tables are not Wan's"):
        sparsereel.extend(large, frames=257, method="riflex")


def test_squeezing_needs_a_positive_step(native):
    from sparsereel.minireel.large import squeeze_time

    with pytest.raises(ValueError, match="got 0"):
        squeeze_time(native.transformer, 0)


def test_the_command_lines_sizes_name_their_models():
    nothing = (None,) * 5
    assert _published_size("native", None, *nothing) == ("minireel", 33, 96, 96, 20, 3.5)
    assert _published_size("large", "minireel", *nothing) == ("minireel-large", 129, 128, 128, 16, 3.5)
    assert _published_size("large", None, 65, None, None, 4, None) == ("minireel-large", 65, 128, 128, 4, 3.5)
