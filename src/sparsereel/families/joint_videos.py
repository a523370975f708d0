"""Video models of joint attention over text and video tokens, besides HunyuanVideo and CogVideoX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsereel.families.base import Family, by_suffix, with_text_of
from sparsereel.families.cogvideox import CogVideoX
from sparsereel.families.layout import Layout, text, video


class ConsisID(CogVideoX):
    name = "consisid"
    covers = "ConsisID"
    classes = ("ConsisIDTransformer3DModel",)

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | None:
        latents, prompt = arguments.get("hidden_states"), arguments.get("encoder_hidden_states")
        if latents is None or latents.ndim != 5 or prompt is None:
            return None
        p = model.config.patch_size  # type: ignore[union-attr]
        return text(prompt.shape[1]) + video(latents.shape[1], latents.shape[3] // p, latents.shape[4] // p)


class Mochi(Family):
    """Samples attend one by one, each to its own prompt without padding."""

    name = "mochi"
    covers = "Mochi 1"
    classes = ("MochiTransformer3DModel",)
    seam = "sdpa"
    processors = frozenset({"MochiAttnProcessor2_0"})
    parameters = ("hidden_states", "encoder_hidden_states")

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return by_suffix(model, [".attn1"])

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        latents, prompt = arguments.get("hidden_states"), arguments.get("encoder_hidden_states")
        if latents is None or latents.ndim != 5 or prompt is None:
            return None
        p = model.config.patch_size  # type: ignore[union-attr]
        return video(latents.shape[2], latents.shape[3] // p, latents.shape[4] // p) + text(prompt.shape[1])

    def layer_layout(self, layout: Layout, length: int) -> Layout | None:
        return with_text_of(layout, length)


class EasyAnimate(Family):
    name = "easyanimate"
    covers = "EasyAnimate 5.1"
    classes = ("EasyAnimateTransformer3DModel",)
    seam = "sdpa"
    processors = frozenset({"EasyAnimateAttnProcessor2_0"})
    parameters = ("hidden_states", "timestep", "timestep_cond", "encoder_hidden_states", "encoder_hidden_states_t5")

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return by_suffix(model, [".attn1"])

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        latents, prompt = arguments.get("hidden_states"), arguments.get("encoder_hidden_states")
        if latents is None or latents.ndim != 5 or prompt is None:
            return None
        second = arguments.get("encoder_hidden_states_t5")
        words = prompt.shape[1] + (0 if second is None else second.shape[1])
        p = model.config.patch_size  # type: ignore[union-attr]
        return text(words) + video(latents.shape[2], latents.shape[3] // p, latents.shape[4] // p)


class Kandinsky5(Family):
    name = "kandinsky5"
    covers = "Kandinsky 5 (calls with masks of its own, `sparse_params`, stay dense)"
    classes = ("Kandinsky5Transformer3DModel",)
    seam = "dispatch"
    processors = frozenset({"Kandinsky5AttnProcessor"})
    parameters = (
        *("hidden_states", "encoder_hidden_states", "timestep", "pooled_projections"),
        *("visual_rope_pos", "text_rope_pos", "scale_factor", "sparse_params"),
    )

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        layers = by_suffix(model, [".self_attention"])
        return [item for item in layers if item[0].startswith("visual_transformer_blocks.")]

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        latents = arguments.get("hidden_states")
        if latents is None or latents.ndim != 5:
            return None
        if arguments.get("sparse_params") is not None:
            return "the model follows a sparse mask of its own, over tokens in another order"
        p_t, p_h, p_w = model.config.patch_size  # type: ignore[union-attr,misc]
        return video(latents.shape[1] // p_t, latents.shape[2] // p_h, latents.shape[3] // p_w)

    def heads(self, module: nn.Module) -> int:
        return int(module.num_heads)  # type: ignore[arg-type]
