"""Lumina 2 and Z-Image: single-stream blocks over text and image, after blocks over the image alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsereel.families.base import Family, grid_alone, layout_length, with_text_of
from sparsereel.families.layout import Layout, condition, image, text, video
from sparsereel.families.reading import COMPILED, one_length, read_once

#: Z-Image fills image and text up to multiples of this many tokens
_Z_MULTIPLE = 32


class _RefinedImage(Family):
    """Blocks over the image alone (`noise_refiner`), then over everything (`layers`)."""

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        names = [(n, m) for n, m in model.named_modules() if n.endswith((".attn", ".attention"))]
        return [item for part in ("noise_refiner.", "layers.") for item in names if item[0].startswith(part)]


class Lumina2(_RefinedImage):
    name = "lumina2"
    covers = "Lumina Image 2 (prompts of one length in a batch)"
    classes = ("Lumina2Transformer2DModel",)
    seam = "sdpa"
    processors = frozenset({"Lumina2AttnProcessor2_0"})
    parameters = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        latents, mask = arguments.get("hidden_states"), arguments.get("encoder_attention_mask")
        if latents is None or latents.ndim != 4 or mask is None:
            return None
        if torch.compiler.is_compiling():
            return COMPILED
        words = read_once(mask, one_length)
        if words is None or words < 0:
            return "the image begins after prompts of different lengths, so each sample has its own grid"
        p = model.config.patch_size  # type: ignore[union-attr]
        return text(words) + image(latents.shape[2] // p, latents.shape[3] // p)

    def layer_layout(self, layout: Layout, length: int) -> Layout | None:
        alone = grid_alone(layout)
        return alone if layout_length(alone) == length else super().layer_layout(layout, length)


class ZImage(_RefinedImage):
    name = "z_image"
    covers = "Z-Image (not its omni mode with reference images)"
    classes = ("ZImageTransformer2DModel",)
    seam = "dispatch"
    processors = frozenset({"ZSingleStreamAttnProcessor"})
    parameters = ("x", "t", "cap_feats")

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        latents, prompts = arguments.get("x"), arguments.get("cap_feats")
        if not latents or not prompts:
            return None
        if isinstance(latents[0], (list, tuple)):
            return "omni mode strings images together"
        if any(latent.shape != latents[0].shape for latent in latents):
            return "the samples of a batch have images of different sizes"
        p, p_t = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
        frames, height, width = latents[0].shape[1] // p_t, latents[0].shape[2] // p, latents[0].shape[3] // p
        grid = image(height, width) if frames == 1 else video(frames, height, width)
        padding = -(frames * height * width) % _Z_MULTIPLE
        longest = max(prompt.shape[0] for prompt in prompts)
        return grid + condition(padding) + text(longest + -longest % _Z_MULTIPLE)

    def layer_layout(self, layout: Layout, length: int) -> Layout | None:
        picture = layout[:-4]
        return picture if layout_length(picture) == length else with_text_of(layout, length)
