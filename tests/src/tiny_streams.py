"""A tiny random text-to-video pipeline for tests of streaming, and block-causal generation without any cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from sparsereel import minireel
from sparsereel.minireel.loading import _load_text_encoder
from sparsereel.minireel.training.architecture import build_tokenizer, build_vae
from sparsereel.stream.methods import CausalModel

PROMPT, OTHER = "a red 3 moving right on navy", "a green 7 moving left on black"
SIZE = {"height": 16, "width": 24}
CAUSAL = CausalModel(chunk=2, window=6)


@functools.cache
def pipe() -> Any:
    """Shared: streams leave their pipeline as it was."""
    torch.manual_seed(1)
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=3,
        attention_head_dim=24,
        in_channels=16,
        out_channels=16,
        text_dim=128,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            # Attention is nearly uniform at the usual initialisation, which would hide a wrong mask or position.
            if parameter.ndim == 2:
                parameter.mul_(2.0)
    found = minireel.MiniReelPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=_load_text_encoder(minireel.WEIGHTS),
        vae=build_vae(width=4).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
        transformer=transformer,
    )
    found.set_progress_bar_config(disable=True)
    return found


class MaskedProcessor(WanAttnProcessor):
    """diffusers' own processor under a given token mask."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask

    def __call__(self, attn: Any, hidden: Any, text: Any = None, mask: Any = None, rotary: Any = None) -> Any:
        return super().__call__(attn, hidden, text, self.mask, rotary)


def masked_forward(model: Any, latents: torch.Tensor, times: list[float], text: Any, sees: Any) -> torch.Tensor:
    """The model's own forward over all frames at once: frame i at times[i], attending to frame j if sees(i, j)."""
    frames, tokens = latents.shape[1], latents.shape[2] * latents.shape[3]
    by_frame = torch.tensor([[sees(i, j) for j in range(frames)] for i in range(frames)])
    mask = by_frame.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    before = [block.attn1.processor for block in model.blocks]
    for block in model.blocks:
        block.attn1.processor = MaskedProcessor(mask)
    try:
        timestep = torch.tensor(times).repeat_interleave(tokens).unsqueeze(0)
        with torch.no_grad():
            return model(latents.unsqueeze(0), timestep, text, return_dict=False)[0][0]
    finally:
        for block, processor in zip(model.blocks, before, strict=True):
            block.attn1.processor = processor


def uncached(stream: Any, frames: int, chunk: int, sees: Callable[[int, int], bool]) -> torch.Tensor:
    """What a stream's cached rollout must equal: every step of every chunk recomputes the whole past at timestep 0.

    Args:
        sees: (chunk, earlier chunk) -> whether it is in reach.
    """
    denoiser, levels = stream.engine.denoiser, stream.engine.levels
    denoiser.set_prompt(PROMPT)
    latents = stream.engine.latents.noise.frames(0, frames)
    for start in range(0, frames, chunk):
        stop = min(start + chunk, frames)
        for step in range(levels.steps):
            times = [0.0] * start + [float(levels.timesteps[step])] * (stop - start)
            branches = [
                masked_forward(
                    denoiser.model,
                    latents[:, :stop],
                    times,
                    text,
                    lambda i, j: i // chunk == j // chunk or (i > j and sees(i // chunk, j // chunk)),
                )[:, start:]
                for text in denoiser.texts
            ]
            velocity = branches[0]
            if len(branches) == 2:
                velocity = branches[1] + denoiser.guidance * (branches[0] - branches[1])
            step_size = levels.sigmas[step + 1] - levels.sigmas[step]
            latents[:, start:stop] += step_size * velocity
    return latents
