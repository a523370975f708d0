"""Qwen-Image and its edit models: text tokens, then packed images whose sizes stand in `img_shapes`.

The first image is what is generated; the images to edit follow it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsereel.families.base import Family
from sparsereel.families.layout import Layout, condition, image, text, video


class QwenImage(Family):
    name = "qwen_image"
    covers = "Qwen-Image, Edit, Edit Plus, Layered (layers after the first count as conditions)"
    classes = ("QwenImageTransformer2DModel",)
    seam = "dispatch"
    processors = frozenset({"QwenDoubleStreamAttnProcessor2_0"})
    parameters = (*("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep", "img_shapes"),)

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return [(n, m) for n, m in model.named_modules() if n.startswith("transformer_blocks.") and n.endswith(".attn")]

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        prompt, samples = arguments.get("encoder_hidden_states"), arguments.get("img_shapes")
        if prompt is None or not samples:
            return None
        shapes = [list(sample) if isinstance(sample[0], (tuple, list)) else [sample] for sample in samples]
        if any(shape != shapes[0] for shape in shapes):
            return "the samples of a batch have images of different sizes"
        (frames, height, width), *others = shapes[0]
        first = image(height, width) if frames == 1 else video(frames, height, width)
        return text(prompt.shape[1]) + first + condition(sum(math.prod(shape) for shape in others))
