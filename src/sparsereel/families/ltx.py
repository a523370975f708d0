"""LTX-Video and LTX-2: packed video tokens, whose sizes or coordinates come as arguments; text by cross-attention.

Tokens of images and clips that condition the video (LTX 0.9.5 and later) stand before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from sparsereel.families.base import Family, by_suffix
from sparsereel.families.layout import Layout, condition, video
from sparsereel.families.reading import COMPILED, last_video, read_once


class LTXVideo(Family):
    name = "ltx"
    covers = "LTX-Video text- and image-to-video, conditions"
    classes: ClassVar[tuple[str, ...]] = ("LTXVideoTransformer3DModel",)
    seam = "dispatch"
    context_parallel = "sequence"
    processors = frozenset({"LTXVideoAttnProcessor"})
    parameters: ClassVar[tuple[str, ...]] = (
        *("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"),
        *("num_frames", "height", "width", "rope_interpolation_scale", "video_coords"),
    )

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return by_suffix(model, [".attn1"])

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        latents = arguments.get("hidden_states")
        if latents is None or latents.ndim != 3:
            return None
        config: Any = model.config
        sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
        if all(isinstance(size, int) for size in sizes):
            patch = (config.patch_size_t, config.patch_size, config.patch_size)
            frames, height, width = (int(size or 0) // p for size, p in zip(sizes, patch, strict=True))
            if math.prod((frames, height, width)) == latents.shape[1]:
                return video(frames, height, width)
        coordinates = arguments.get("video_coords")
        if coordinates is None:
            return "the call does not say how many frames, rows and columns its tokens have"
        if torch.compiler.is_compiling():
            return COMPILED
        found = read_once(coordinates, last_video)
        if found is None:
            return "the coordinates of tokens are not those of conditions, then one video"
        before, *shape = found
        return condition(before) + video(*shape)


class LTX2Video(LTXVideo):
    name = "ltx2"
    covers = "LTX-2: the video's self-attention (sound, and attention between the two, stay as they were)"
    classes = ("LTX2VideoTransformer3DModel",)
    processors = frozenset({"LTX2AudioVideoAttnProcessor"})
    parameters = (
        *("hidden_states", "audio_hidden_states", "encoder_hidden_states", "audio_encoder_hidden_states", "timestep"),
        *("audio_timestep", "sigma", "audio_sigma", "encoder_attention_mask", "audio_encoder_attention_mask"),
        *("num_frames", "height", "width", "fps", "audio_num_frames", "video_coords"),
    )

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        layers = by_suffix(model, [".attn1"])
        return [item for item in layers if item[0].startswith("transformer_blocks.")]
