"""minireel for long clips: the same weights, with rotary positions that count a frame of time as a quarter.

129 frames then span the positions that 33 spanned in training, so a digit travels its path four times as slowly instead
of wavering about its place; positions in space, which hardly grow, stay. Squeezing positions into the trained range is
position interpolation (Chen et al., arXiv 2306.15595), here along time alone.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel

from sparsereel.extend.rope import axis_table, plain_frequencies
from sparsereel.extend.tables import WAN_BASE
from sparsereel.minireel.loading import load_folder
from sparsereel.minireel.pipeline import MiniReelPipeline
from sparsereel.minireel.sizes import LARGE, NATIVE, TEMPORAL_COMPRESSION

#: trained positions a latent frame of a long clip
TIME_STEP = (NATIVE.frames // TEMPORAL_COMPRESSION) / (LARGE.frames // TEMPORAL_COMPRESSION)


class LargeMiniReelPipeline(MiniReelPipeline):
    """`MiniReelPipeline` whose call defaults are `LARGE`'s; made by `sparsereel.minireel.load_large`.

    What is particular lies in the transformer's rotary tables, which are no weights: `save_pretrained` loses it.
    """

    # Spelled out: stock calls pass these by position too, and the trained size is read from the signature.
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = LARGE.height,
        width: int = LARGE.width,
        num_frames: int = LARGE.frames,
        num_inference_steps: int = LARGE.steps,
        guidance_scale: float = LARGE.guidance,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        size = (height, width, num_frames)
        return super().__call__(prompt, negative_prompt, *size, num_inference_steps, guidance_scale, *args, **kwargs)


def load_large_folder(folder: Any, dtype: torch.dtype, device: str | torch.device) -> LargeMiniReelPipeline:
    """The pipeline of a minireel folder with time squeezed; see `sparsereel.minireel.load_large`."""
    parts = load_folder(folder, dtype, "cpu").components
    squeeze_time(parts["transformer"], TIME_STEP)
    return LargeMiniReelPipeline(**parts).to(device)


def squeeze_time(transformer: WanTransformer3DModel, step: float) -> None:
    """Let latent frame f stand at rotary position `step` * f; the tables of rows and columns stay as they are.

    Raises:
        ValueError: step is not positive.
    """
    if not step > 0:
        raise ValueError(f"step must be positive, got {step}.")
    rope = transformer.rope
    tables = axis_table(step * plain_frequencies(rope.t_dim, WAN_BASE), rope.max_seq_len)
    for name, table in zip(("freqs_cos", "freqs_sin"), tables, strict=True):
        changed = getattr(rope, name).clone()
        changed[:, : rope.t_dim] = table.to(changed)
        setattr(rope, name, changed)
