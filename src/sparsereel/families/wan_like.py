"""Models with Wan's skeleton: video tokens only, patched from (B, C, F, H, W), text through cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import nn

from sparsereel.families.base import Family, by_suffix
from sparsereel.families.layout import Layout, video


class PatchedVideo(Family):
    """Video tokens of a patch size (frames, height, width) in the config."""

    seam: ClassVar[Literal["dispatch", "sdpa"]] = "dispatch"
    #: axis of the frames in the latents
    frame_axis = 2

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return by_suffix(model, [".attn1"])

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        latents = arguments.get("hidden_states")
        if latents is None or latents.ndim != 5:
            return None
        p_t, p_h, p_w = model.config.patch_size  # type: ignore[union-attr,misc]
        return video(latents.shape[self.frame_axis] // p_t, latents.shape[3] // p_h, latents.shape[4] // p_w)


class SkyReelsV2(PatchedVideo):
    name = "skyreels_v2"
    covers = "SkyReels V2 text- and image-to-video, diffusion forcing (its causal blocks stay dense)"
    classes = ("SkyReelsV2Transformer3DModel",)
    processors = frozenset({"SkyReelsV2AttnProcessor"})


class ChronoEdit(PatchedVideo):
    name = "chronoedit"
    covers = "ChronoEdit"
    classes = ("ChronoEditTransformer3DModel",)
    processors = frozenset({"WanAttnProcessor"})


class WanAnimate(PatchedVideo):
    name = "wan_animate"
    covers = "Wan 2.2 Animate"
    classes = ("WanAnimateTransformer3DModel",)
    processors = frozenset({"WanAttnProcessor"})


class AnyFlow(PatchedVideo):
    name = "anyflow"
    covers = "AnyFlow on Wan (all frames at once)"
    classes = ("AnyFlowTransformer3DModel",)
    processors = frozenset({"AnyFlowAttnProcessor"})
    frame_axis = 1


class Cosmos(PatchedVideo):
    name = "cosmos"
    covers = "Cosmos Predict 1, 2, 2.5, Transfer (without its control network)"
    classes = ("CosmosTransformer3DModel",)
    # Its processor calls the dispatcher without naming a backend, which reaches torch's attention.
    seam = "sdpa"
    processors = frozenset({"CosmosAttnProcessor2_0"})
