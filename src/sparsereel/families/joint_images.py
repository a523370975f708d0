"""Image models of joint attention over text and image tokens that call torch's attention themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsereel.families.base import Family, by_suffix, grid_alone, layout_length, with_text_of
from sparsereel.families.layout import Layout, condition, image, text


class TextThenImage(Family):
    """Text tokens, then image tokens of a square patch, from (B, C, H, W)."""

    seam = "sdpa"
    parameters = ("hidden_states", "encoder_hidden_states")
    #: ends of the names of self-attention layers
    layers: tuple[str, ...] = (".attn",)

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return by_suffix(model, self.layers)

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        latents, prompt = arguments.get("hidden_states"), arguments.get("encoder_hidden_states")
        if latents is None or latents.ndim != 4 or prompt is None:
            return None
        p = model.config.patch_size  # type: ignore[union-attr]
        return self.join(model, image(latents.shape[2] // p, latents.shape[3] // p), prompt.shape[1])

    def join(self, model: nn.Module, grid: Layout, words: int) -> Layout:
        """Segments in sequence order."""
        return text(words) + grid


class CogView4(TextThenImage):
    name = "cogview4"
    covers = "CogView 4"
    classes = ("CogView4Transformer2DModel",)
    processors = frozenset({"CogView4AttnProcessor"})
    layers = (".attn1",)


class CogView3Plus(TextThenImage):
    name = "cogview3plus"
    covers = "CogView 3 Plus"
    classes = ("CogView3PlusTransformer2DModel",)
    processors = frozenset({"CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"})
    layers = (".attn1",)


class AuraFlow(TextThenImage):
    name = "auraflow"
    covers = "AuraFlow"
    classes = ("AuraFlowTransformer2DModel",)
    processors = frozenset({"AuraFlowAttnProcessor2_0", "FusedAuraFlowAttnProcessor2_0"})

    def join(self, model: nn.Module, grid: Layout, words: int) -> Layout:
        # Learned registers stand before the prompt.
        registers: Any = model.register_tokens
        return text(registers.shape[1] + words) + grid


class StableDiffusion3(TextThenImage):
    name = "stable_diffusion_3"
    covers = "Stable Diffusion 3 and 3.5 (medium's second attention, over the image alone, too)"
    classes = ("SD3Transformer2DModel",)
    processors = frozenset({"JointAttnProcessor2_0", "FusedJointAttnProcessor2_0"})
    layers = (".attn", ".attn2")

    def join(self, model: nn.Module, grid: Layout, words: int) -> Layout:
        return grid + text(words)

    def layer_layout(self, layout: Layout, length: int) -> Layout | None:
        alone = grid_alone(layout)
        return alone if layout_length(alone) == length else super().layer_layout(layout, length)


class HiDream(Family):
    """Image, filled up to the largest size where it is not square, then text of another length in every block."""

    name = "hidream"
    covers = "HiDream-I1"
    classes = ("HiDreamImageTransformer2DModel",)
    seam = "sdpa"
    processors = frozenset({"HiDreamAttnProcessor"})
    parameters = ("hidden_states", "timesteps", "encoder_hidden_states_t5", "encoder_hidden_states_llama3")

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return by_suffix(model, [".attn1"])

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        latents = arguments.get("hidden_states")
        first, second = (arguments.get(f"encoder_hidden_states_{name}") for name in ("t5", "llama3"))
        if latents is None or latents.ndim != 4 or first is None or second is None:
            return "latents packed by the pipeline do not show their rows and columns"
        p = model.config.patch_size  # type: ignore[union-attr]
        height, width = latents.shape[2] // p, latents.shape[3] // p
        largest: Any = model.max_seq
        padding = 0 if latents.shape[2] == latents.shape[3] else largest - height * width
        # Blocks see both prompts, and the second once more as one of its encoder's layers has it.
        words = first.shape[1] + 2 * second[0].shape[1]
        return image(height, width) + condition(padding) + text(words)

    def layer_layout(self, layout: Layout, length: int) -> Layout | None:
        return with_text_of(layout, length)
