"""LTX-Video: packed video tokens, whose sizes come as arguments; text through cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsereel.families.base import Family, by_suffix
from sparsereel.families.layout import Layout, video


class LTXVideo(Family):
    name = "ltx"
    covers = "LTX-Video text- and image-to-video"
    classes = ("LTXVideoTransformer3DModel",)
    seam = "dispatch"
    processors = frozenset({"LTXVideoAttnProcessor"})
    parameters = (
        *("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"),
        *("num_frames", "height", "width", "rope_interpolation_scale", "video_coords"),
    )

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return by_suffix(model, [".attn1"])

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        if arguments.get("video_coords") is not None:
            return "the pipeline gives coordinates a token, which conditioning tokens share with the video"
        sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
        if not all(isinstance(size, int) for size in sizes):
            return "the call does not say how many frames, rows and columns its tokens have"
        config: Any = model.config
        p, p_t = config.patch_size, config.patch_size_t
        frames, height, width = (int(size or 0) for size in sizes)
        return video(frames // p_t, height // p, width // p)
