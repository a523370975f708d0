"""CogVideoX and CogVideoX 1.5: text tokens, then video tokens, in one joint self-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsereel.families.base import Family, by_suffix
from sparsereel.families.layout import Layout, text, video


class CogVideoX(Family):
    name = "cogvideox"
    covers = "CogVideoX, CogVideoX 1.5"
    classes = ("CogVideoXTransformer3DModel",)
    seam = "sdpa"
    processors = frozenset({"CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"})
    parameters = ("hidden_states", "encoder_hidden_states")

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return by_suffix(model, [".attn1"])

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | None:
        latents, prompt = arguments.get("hidden_states"), arguments.get("encoder_hidden_states")
        if latents is None or latents.ndim != 5 or prompt is None:
            return None
        config = model.config
        p, p_t = config.patch_size, config.patch_size_t or 1  # type: ignore[union-attr]
        return text(prompt.shape[1]) + video(latents.shape[1] // p_t, latents.shape[3] // p, latents.shape[4] // p)
