"""HunyuanVideo: joint attention over video tokens followed by text tokens, padded text named by a key mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsereel.families.base import Family
from sparsereel.families.layout import Layout, text, video


class HunyuanVideo(Family):
    name = "hunyuan_video"
    covers = "HunyuanVideo"
    classes = ("HunyuanVideoTransformer3DModel",)
    seam = "dispatch"
    processors = frozenset({"HunyuanVideoAttnProcessor2_0"})
    parameters = ("hidden_states", "timestep", "encoder_hidden_states")

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        # The text refiner inside `context_embedder` attends over text alone and is not on the grid.
        blocks = ("transformer_blocks.", "single_transformer_blocks.")
        return [(n, m) for n, m in model.named_modules() if n.startswith(blocks) and n.endswith(".attn")]

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | None:
        latents, prompt = arguments.get("hidden_states"), arguments.get("encoder_hidden_states")
        if latents is None or latents.ndim != 5 or prompt is None:
            return None
        config = model.config
        p, p_t = config.patch_size, config.patch_size_t  # type: ignore[union-attr]
        return video(latents.shape[2] // p_t, latents.shape[3] // p, latents.shape[4] // p) + text(prompt.shape[1])
