"""U-Nets of Stable Diffusion and of video models made from it: 2-D self-attention, a grid for each level.

A U-Net halves the latent side rounding up, so a layer with S tokens belongs to the one level whose sides multiply to S.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from sparsereel.families.base import Family, by_suffix
from sparsereel.families.layout import Layout, image


class StableDiffusion(Family):
    name = "stable_diffusion"
    covers = "Stable Diffusion 1.5, 2, XL: 2-D self-attention, a grid a level"
    classes: ClassVar[tuple[str, ...]] = ("UNet2DConditionModel",)
    seam = "sdpa"
    processors = frozenset({"AttnProcessor2_0", "FusedAttnProcessor2_0"})
    component = "unet"
    parameters = ("sample",)

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        # Registration order is down, up, mid; the forward runs down, mid, up.
        rank = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
        layers = [item for item in by_suffix(model, [".attn1"]) if not getattr(item[1], "is_cross_attention", False)]
        return sorted(layers, key=lambda item: rank.get(item[0].split(".")[0], 3))

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | None:
        sample = arguments.get("sample")
        if sample is None or sample.ndim != 4:
            return None
        return image(sample.shape[2], sample.shape[3])

    def layer_layout(self, layout: Layout, length: int) -> Layout | None:
        height, width = layout[2], layout[3]
        for _ in range(8):
            if height * width == length:
                return image(height, width)
            height, width = (height + 1) // 2, (width + 1) // 2
        return None


class VideoUNet(StableDiffusion):
    """Frames go through the 2-D attention one by one; attention over frames, one token a place, stays as it was."""

    name = "video_unet"
    covers = "AnimateDiff, Stable Video Diffusion, ModelScope / Zeroscope, I2VGen-XL: attention within frames"
    classes = ("UNetMotionModel", "UNetSpatioTemporalConditionModel", "UNet3DConditionModel", "I2VGenXLUNet")

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        layers = super().self_attention(model)
        return [item for item in layers if ".attentions." in item[0] and ".transformer_blocks." in item[0]]

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | None:
        sample = arguments.get("sample")
        if sample is None or sample.ndim != 5:
            return None
        return image(sample.shape[3], sample.shape[4])
