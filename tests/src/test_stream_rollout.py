"""Whole streams on a tiny model against generation without any cache, and what must hold for every method."""

from __future__ import annotations

import pytest
import torch

import sparsereel
from sparsereel.stream.methods import METHODS, CausalModel

CHUNKWISE = ["self-forcing", "streaming-llm", "longlive", "longlive-infinite", "deep-forcing"]
CACHED = [name for name, method in METHODS.items() if method.cached]
pytestmark = pytest.mark.usefixtures("one_thread")


def start(streams, **arguments):
    arguments = {"steps": 2, "guidance": 2.0, "causal": streams.CAUSAL, **streams.SIZE, **arguments}
    return sparsereel.stream(streams.pipe(), arguments.pop("prompt", streams.PROMPT), **arguments)


def latents_of(stream):
    return torch.cat(list(stream), dim=1)


@pytest.mark.parametrize("method", CHUNKWISE)
def test_unlimited_window_equals_the_uncached_block_causal_forward(streams, method):
    """The same for every position policy, since nothing is evicted; the last chunk is short."""
    stream = start(streams, method=method, frames=29, window=12, sink=2, output="latents")
    expected = streams.uncached(stream, frames=8, chunk=2, sees=lambda now, before: True)
    torch.testing.assert_close(latents_of(stream), expected, atol=1e-4, rtol=0)


def test_evicting_equals_masked_attention_over_everything(streams):
    """A window of three chunks after a sink of one, at absolute positions: what was evicted might as well be masked."""
    stream = start(streams, method="longlive", frames=45, window=6, sink=2, output="latents")
    expected = streams.uncached(
        stream, frames=12, chunk=2, sees=lambda now, before: before == 0 or now - before <= (1 if now > 2 else 2)
    )
    torch.testing.assert_close(latents_of(stream), expected, atol=1e-4, rtol=0)


def test_a_clip_within_the_window_is_the_pipelines_own(streams):
    """Bit for bit, without guidance and with it."""
    for guidance in (1.0, 3.0):
        stream = start(streams, method="windows", frames=21, window=6, guidance=guidance, output="latents")
        noise = stream.engine.latents.noise.frames(0, 6).unsqueeze(0)
        clip = streams.pipe()(
            streams.PROMPT,
            num_frames=21,
            num_inference_steps=2,
            guidance_scale=guidance,
            latents=noise,
            output_type="latent",
            **streams.SIZE,
        ).frames
        assert torch.equal(latents_of(stream), clip[0])


def test_frames_are_those_of_the_pipeline(streams):
    stream = start(streams, method="windows", frames=21, window=6)
    noise = stream.engine.latents.noise.frames(0, 6).unsqueeze(0)
    clip = streams.pipe()(
        streams.PROMPT, num_frames=21, num_inference_steps=2, guidance_scale=2.0, latents=noise, **streams.SIZE
    ).frames[0]
    (frames,) = stream
    assert frames.dtype.name == "uint8"
    assert abs(frames.astype(int) - (clip * 255).round().astype(int)).max() <= 1


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_gives_exactly_the_frames_asked_for_and_leaves_the_pipeline_alone(streams, method):
    model = streams.pipe().transformer
    before = [block.attn1.processor for block in model.blocks]
    steps = 6 if method == "fifo" else 2
    chunks = list(start(streams, method=method, frames=34, window=6, steps=steps))
    assert sum(len(chunk) for chunk in chunks) == 34
    assert chunks[0].shape[1:] == (16, 24, 3)
    assert [block.attn1.processor for block in model.blocks] == before
    assert "forward" not in vars(model.rope)


@pytest.mark.parametrize("method", CACHED)
def test_the_sinks_values_never_change(streams, method):
    stream = start(streams, method=method, window=6, output="latents")
    seen = []
    for _ in range(9):
        next(stream)
        groups = [group for cache in stream.engine.denoiser.caches for group in cache]
        count = stream.engine.plan.sink * groups[0].frame_tokens
        seen.append([group.values.read(0, min(count, group.filled)).clone() for group in groups])
    for values in seen:
        for first, now in zip(seen[-1], values, strict=True):
            assert torch.equal(first[:, :, : now.shape[2]], now)


@pytest.mark.parametrize("method", CACHED)
def test_resident_tokens_stay_within_the_window(streams, method):
    stream = start(streams, method=method, window=6, output="latents")
    memory = None
    for _ in range(8):
        next(stream)
        groups = [group for cache in stream.engine.denoiser.caches for group in cache]
        assert all(group.filled <= 6 * group.frame_tokens for group in groups)
        assert memory in (None, stream.engine.cache_bytes)
        memory = stream.engine.cache_bytes


def test_past_the_rotary_table_nothing_changes(streams):
    """The model's table ends at 32 frames: chunk 40 must still see angles, not an index error or clamped positions."""
    stream = start(streams, method="self-forcing", output="latents", steps=1, guidance=1.0)
    for _ in range(40):
        chunk = next(stream)
    assert chunk.shape[1] == 2
    assert chunk.isfinite().all()


def test_heads_that_choose_for_themselves(streams):
    arguments = {"window": 8, "frames": 61, "guidance": 1.0, "output": "latents"}
    layer, heads = (
        latents_of(start(streams, method="deep-forcing", per_head=own, **arguments)) for own in (False, True)
    )
    assert torch.equal(layer[:, :8], heads[:, :8])  # nothing evicted yet
    assert not torch.equal(layer, heads)
    with pytest.raises(ValueError, match="evicts by age.*allowed: deep-forcing"):
        start(streams, method="longlive", per_head=True)


def test_guidance_of_one_keeps_one_cache(streams):
    assert len(start(streams, method="longlive", guidance=1.0).engine.denoiser.caches) == 1


def test_distilled_models_renoise(streams):
    causal = CausalModel(2, 6, timesteps=(1000, 500), shift=5.0, guidance=1.0)
    stream = sparsereel.stream(
        streams.pipe(), streams.PROMPT, causal=causal, method="self-forcing", frames=5, output="latents", **streams.SIZE
    )
    levels, noise = stream.engine.levels, stream.engine.latents.noise
    (found,) = stream
    model, text = streams.pipe().transformer, stream.engine.denoiser.texts[0]
    x = noise.frames(0, 2)
    with torch.no_grad():
        for step in range(2):
            v = model(x[None], levels.timesteps[step : step + 1], text, return_dict=False)[0][0]
            clean = x - levels.sigmas[step] * v
            fresh = noise.frames(0, 2, step + 1)
            x = clean if step == 1 else (1 - levels.sigmas[1]) * clean + levels.sigmas[1] * fresh
    assert float(levels.sigmas[1]) == pytest.approx(5 * 0.5 / (1 + 4 * 0.5))
    torch.testing.assert_close(found, x, atol=1e-5, rtol=0)
