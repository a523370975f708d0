"""Models that are not Wan: SkyReels-V2's diffusion forcing, and those that are refused by name."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline, SkyReelsV2Transformer3DModel, UniPCMultistepScheduler

import sparsereel

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 128,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
CHUNK, STEPS, LAG = 3, 3, 2


def skyreels(streams, **config):
    torch.manual_seed(2)
    parts = {name: getattr(streams.pipe(), name) for name in ("tokenizer", "text_encoder", "vae")}
    transformer = SkyReelsV2Transformer3DModel(**TINY, patch_size=(1, 1, 1), rope_max_seq_len=32, **config).eval()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, solver_order=1
    )
    return SkyReelsV2DiffusionForcingPipeline(**parts, transformer=transformer, scheduler=scheduler)


def released_counters(pipe, frames):
    """Steps that each frame has done after each pass, by diffusers' own matrix of whole chunks."""
    index = pipe.generate_timestep_matrix(
        frames, torch.arange(STEPS, 0, -1), frames, ar_step=LAG, causal_block_size=CHUNK
    )[1]
    return index.clamp(max=STEPS).tolist()


@pytest.mark.parametrize(("frames", "rates"), [(6, False), (8, False), (8, True)])
def test_skyreels_follows_its_matrices_and_keeps_the_tail(streams, frames, rates):
    """Every pass computed by hand: the frames begun so far, each told its own timestep, step by Euler's rule."""
    pipe = skyreels(streams, inject_sample_info=rates)
    stream = sparsereel.stream(
        pipe,
        streams.PROMPT,
        frames=4 * frames - 3,
        method="diffusion-forcing",
        chunk=CHUNK,
        lag=LAG,
        window=9,
        steps=STEPS,
        guidance=1.0,
        output="latents",
        **streams.SIZE,
    )
    found = torch.cat(list(stream), 1)
    assert found.shape[1] == frames

    levels, text = stream.engine.levels, stream.engine.denoiser.texts[0]
    x = stream.engine.latents.noise.frames(0, frames)
    whole = -(-frames // CHUNK) * CHUNK
    before = [0] * frames
    rate = {"fps": [0]} if rates else {}
    for row in released_counters(pipe, whole):
        after = row[:frames]
        begun = sum(count > 0 for count in after)
        told = levels.timesteps[before[:begun]]
        same = len(set(before[:begun])) == 1
        times = {"timestep": told[:1]} if same else {"timestep": told[None], "enable_diffusion_forcing": True}
        with torch.no_grad():
            v = pipe.transformer(x[None, :, :begun], encoder_hidden_states=text, return_dict=False, **times, **rate)[0][
                0
            ]
        step = (levels.sigmas[after[:begun]] - levels.sigmas[before[:begun]]).view(1, -1, 1, 1)
        x[:, :begun] += step * v
        before = after
    assert before == [STEPS] * frames
    torch.testing.assert_close(found, x, atol=1e-4, rtol=0)


def test_diffusers_own_matrix_drops_the_tail(streams):
    """Why ours is not simply theirs: of eight frames in chunks of three it has columns for six."""
    assert len(released_counters(skyreels(streams), 8)[0]) == 6


def test_blocks_of_frames_inside_the_model_are_refused(streams):
    with pytest.raises(ValueError, match="num_frame_per_block=3.*diffusion-forcing masks"):
        sparsereel.stream(skyreels(streams, num_frame_per_block=3), streams.PROMPT, frames=9, **streams.SIZE)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("AnyFlowFAR", "AnyFlowFARPipeline cannot be streamed: .*a cache of its own"),
        ("Helios", "HeliosPipeline cannot be streamed: .*instead of keeping a cache"),
    ],
)
@pytest.mark.parametrize("method", ["auto", "longlive", "windows"])
def test_models_with_a_memory_of_their_own_are_refused_by_name(streams, name, sentence, method):
    transformer = getattr(diffusers, f"{name}Transformer3DModel")(**TINY)
    kind = getattr(diffusers, f"{name}Pipeline")
    pipe = kind(tokenizer=None, text_encoder=None, transformer=transformer, vae=streams.pipe().vae, scheduler=None)
    causal = streams.CAUSAL if method == "longlive" else None
    with pytest.raises(ValueError, match=sentence):
        sparsereel.stream(pipe, streams.PROMPT, frames=9, method=method, causal=causal, **streams.SIZE)
