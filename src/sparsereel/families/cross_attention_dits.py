"""Older transformers that attend to text only through cross-attention and call torch's attention themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsereel.families.base import Family, by_suffix
from sparsereel.families.layout import Layout, image, video


class PatchedImage(Family):
    """Image tokens of a square patch, from (B, C, H, W)."""

    seam = "sdpa"
    processors = frozenset({"AttnProcessor2_0", "FusedAttnProcessor2_0"})

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return by_suffix(model, [".attn1"])

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        latents = arguments.get("hidden_states")
        if latents is None or latents.ndim != 4:
            return None
        p = model.config.patch_size  # type: ignore[union-attr]
        return image(latents.shape[2] // p, latents.shape[3] // p)


class PixArt(PatchedImage):
    name = "pixart"
    covers = "PixArt Alpha and Sigma"
    classes = ("PixArtTransformer2DModel",)


class DiT(PatchedImage):
    name = "dit"
    covers = "DiT"
    classes = ("DiTTransformer2DModel",)


class HunyuanDiT(PatchedImage):
    name = "hunyuan_dit"
    covers = "Hunyuan-DiT"
    classes = ("HunyuanDiT2DModel",)
    processors = frozenset({"HunyuanAttnProcessor2_0", "FusedHunyuanAttnProcessor2_0"})


class Latte(PatchedImage):
    name = "latte"
    covers = "Latte: attention within frames (over frames, one token a place, it stays as it was)"
    classes = ("LatteTransformer3DModel",)

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return [item for item in by_suffix(model, [".attn1"]) if item[0].startswith("transformer_blocks.")]

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        latents = arguments.get("hidden_states")
        if latents is None or latents.ndim != 5:
            return None
        p = model.config.patch_size  # type: ignore[union-attr]
        return image(latents.shape[3] // p, latents.shape[4] // p)


class Allegro(PatchedImage):
    name = "allegro"
    covers = "Allegro"
    classes = ("AllegroTransformer3DModel",)
    processors = frozenset({"AllegroAttnProcessor2_0"})

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        latents = arguments.get("hidden_states")
        if latents is None or latents.ndim != 5:
            return None
        config = model.config
        p, p_t = config.patch_size, config.patch_size_t  # type: ignore[union-attr]
        return video(latents.shape[2] // p_t, latents.shape[3] // p, latents.shape[4] // p)

    def key_mask(self, mask: torch.Tensor) -> torch.Tensor:
        return mask[:, :1]  # repeated for every head
