"""The pipeline classes: loaded, taken over and loaded by path, against the library's own verbs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import sparsereel
import sparsereel_pipelines
from sparsereel import minireel, patterns
from sparsereel_pipelines import HighResolutionPipeline, SparseVideoPipeline, StreamingVideoPipeline

PROMPT = "a red 3 moving right on navy"
SMALL = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 16}
CLASSES = [HighResolutionPipeline, SparseVideoPipeline, StreamingVideoPipeline]
FILES = {"HighResolutionPipeline": "high_resolution", "SparseVideoPipeline": "sparse_video"}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe():
    found = minireel.load()
    found.set_progress_bar_config(disable=True)
    return found


def quiet(found):
    found.set_progress_bar_config(disable=True)
    return found


def call(pipe, **arguments):
    seed = torch.Generator().manual_seed(4)
    return pipe(PROMPT, generator=seed, output_type="latent", **{**SMALL, **arguments}).frames


@pytest.mark.parametrize("cls", CLASSES)
def test_from_pipe_shares_the_parts_and_keeps_the_defaults(pipe, cls):
    taken = quiet(cls.from_pipe(pipe))
    assert isinstance(taken, cls)
    assert isinstance(taken, minireel.MiniReelPipeline)
    assert taken.transformer is pipe.transformer
    assert type(cls.from_pipe(taken)) is type(taken)


@pytest.mark.parametrize("cls", CLASSES)
def test_from_pretrained_and_by_path(cls):
    loaded = cls.from_pretrained(minireel.WEIGHTS)
    assert type(loaded) is cls
    file = Path(sparsereel_pipelines.__file__).parent / f"{FILES.get(cls.__name__, 'streaming_video')}.py"
    custom = DiffusionPipeline.from_pretrained(minireel.WEIGHTS, custom_pipeline=str(file), trust_remote_code=True)
    assert type(custom).__name__ == cls.__name__
    assert torch.equal(custom.transformer.proj_out.weight, loaded.transformer.proj_out.weight)


def test_sparse_equals_sparsify(pipe):
    plan = sparsereel.AttentionPlan.uniform(patterns.Neighborhood(window=(3, 3, 3)))
    taken = quiet(SparseVideoPipeline.from_pipe(pipe))
    with sparsereel.sparsified(pipe, plan):
        expected = call(pipe)
    assert torch.equal(call(taken, plan=plan), expected)
    assert taken.report.token_density < 1
    assert torch.equal(call(taken, plan=None), call(pipe))
    assert taken.report is None


def test_sparse_leaves_the_model_alone_when_a_call_fails(pipe):
    taken = quiet(SparseVideoPipeline.from_pipe(pipe))
    with pytest.raises(ValueError, match="num_frames must be 4k"):
        call(taken, num_frames=8)
    assert not hasattr(pipe.transformer, "_sparsereel_injection")


def test_high_resolution_equals_extend(pipe):
    taken = quiet(HighResolutionPipeline.from_pipe(pipe))
    size = {"height": 112, "width": 96, "num_frames": 9, "num_inference_steps": 1}
    sparsereel.extend(pipe, height=112, width=96, frames=9, method="yarn")
    expected = call(pipe, **size)
    sparsereel.restore(pipe)
    plain = call(pipe, **size)
    assert torch.equal(call(taken, **size, method="yarn"), expected)
    assert not torch.equal(plain, expected)
    assert taken.report.recipe.time.name == "yarn" or taken.report.recipe.space.name == "yarn"
    assert not hasattr(pipe.transformer, "_sparsereel_injection")


def test_high_resolution_at_the_trained_size_is_the_plain_pipeline(pipe):
    taken = quiet(HighResolutionPipeline.from_pipe(pipe))
    size = {"height": 96, "width": 96, "num_frames": 33, "num_inference_steps": 1, "guidance_scale": 1.0}
    assert torch.equal(call(taken, **size), call(pipe, **size))
    assert taken.report is None


def test_streaming_equals_stream(pipe):
    taken = quiet(StreamingVideoPipeline.from_pipe(pipe))
    options = {"method": "windows", "window": 3}
    made = sparsereel.stream(pipe, PROMPT, frames=20, steps=2, seed=4, height=32, width=48, **options)
    expected = np.concatenate(list(made))
    seed = torch.Generator().manual_seed(4)
    size = {**SMALL, "num_frames": 20}
    clip = taken(PROMPT, generator=seed, **size, **options).frames
    assert clip.shape == (1, 20, 32, 48, 3)
    assert np.array_equal((clip[0] * 255).round().astype(np.uint8), expected)
    chunk = next(taken.stream(PROMPT, height=32, width=48, steps=2, seed=4, **options))
    assert np.array_equal(chunk, expected[: len(chunk)])
    with pytest.raises(ValueError, match="np, pt, pil or latent"):
        taken(PROMPT, output_type="gif")


@pytest.mark.parametrize("cls", CLASSES)
def test_other_pipelines_are_refused(cls):
    with pytest.raises(ValueError, match="takes the parts of a WanPipeline"):
        cls.from_pipe(object())
