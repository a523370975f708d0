"""Models built like HunyuanVideo: grid tokens, then text, which may consist of several encoders' tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsereel.families.base import Family, by_key, grid_alone, layout_length, with_text_of
from sparsereel.families.layout import Layout, condition, image, text, video


class _DoubleThenSingle(Family):
    seam = "dispatch"

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        blocks = ("transformer_blocks.", "single_transformer_blocks.")
        return [(n, m) for n, m in model.named_modules() if n.startswith(blocks) and n.endswith(".attn")]

    def layer_layout(self, layout: Layout, length: int) -> Layout | None:
        # A single sample's prompt comes without its padding.
        return with_text_of(layout, length)


class HunyuanVideo15(_DoubleThenSingle):
    name = "hunyuan_video15"
    covers = "HunyuanVideo 1.5"
    classes = ("HunyuanVideo15Transformer3DModel",)
    processors = frozenset({"HunyuanVideo15AttnProcessor2_0"})
    parameters = (
        *("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "timestep_r"),
        *("encoder_hidden_states_2", "encoder_attention_mask_2", "image_embeds"),
    )

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        latents = arguments.get("hidden_states")
        prompts = [arguments.get(n) for n in ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")]
        if latents is None or latents.ndim != 5 or any(prompt is None for prompt in prompts):
            return None
        config = model.config
        p, p_t = config.patch_size, config.patch_size_t  # type: ignore[union-attr]
        words = sum(prompt.shape[1] for prompt in prompts if prompt is not None)
        return video(latents.shape[2] // p_t, latents.shape[3] // p, latents.shape[4] // p) + text(words)

    def key_mask(self, mask: torch.Tensor) -> torch.Tensor:
        # The processor hands mask[query] & mask[key]; a query that is masked itself is text that nobody sees.
        return by_key(mask)


class HunyuanVideoFramepack(_DoubleThenSingle):
    """History frames, patched more coarsely the older they are, stand before the video."""

    name = "hunyuan_video_framepack"
    covers = "FramePack on HunyuanVideo"
    classes = ("HunyuanVideoFramepackTransformer3DModel",)
    processors = frozenset({"HunyuanVideoAttnProcessor2_0"})
    parameters = (
        *("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"),
        *("image_embeds", "indices_latents", "guidance", "latents_clean", "indices_latents_clean"),
        *("latents_history_2x", "indices_latents_history_2x", "latents_history_4x", "indices_latents_history_4x"),
    )

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        latents, prompt, images = (arguments.get(n) for n in ("hidden_states", "encoder_hidden_states", "image_embeds"))
        if latents is None or latents.ndim != 5 or prompt is None or images is None:
            return None
        config = model.config
        p, p_t = config.patch_size, config.patch_size_t  # type: ignore[union-attr]
        history = 0
        for name, patch in (("history_4x", (4, 8, 8)), ("history_2x", (2, 4, 4)), ("clean", (1, 2, 2))):
            past = arguments.get(f"latents_{name}")
            if past is not None and arguments.get(f"indices_latents_{name}") is not None:
                # Short of a whole patch, coarse history is padded; clean frames are cut.
                sizes = [n // q if name == "clean" else -(-n // q) for n, q in zip(past.shape[2:], patch, strict=True)]
                history += sizes[0] * sizes[1] * sizes[2]
        grid = video(latents.shape[2] // p_t, latents.shape[3] // p, latents.shape[4] // p)
        return condition(history) + grid + text(images.shape[1] + prompt.shape[1])


class HunyuanImage(_DoubleThenSingle):
    name = "hunyuan_image"
    covers = "HunyuanImage 2.1 and its refiner"
    classes = ("HunyuanImageTransformer2DModel",)
    processors = frozenset({"HunyuanImageAttnProcessor"})
    parameters = (
        *("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "timestep_r"),
        *("encoder_hidden_states_2", "encoder_attention_mask_2"),
    )

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        latents, prompt = arguments.get("hidden_states"), arguments.get("encoder_hidden_states")
        if latents is None or prompt is None:
            return None
        patch: tuple[int, ...] = tuple(model.config.patch_size)  # type: ignore[union-attr,arg-type]
        if latents.ndim != 2 + len(patch):
            return None
        sizes = [size // p for size, p in zip(latents.shape[2:], patch, strict=True)]
        second = arguments.get("encoder_hidden_states_2")
        used = second is not None and model.context_embedder_2 is not None
        words = prompt.shape[1] + (second.shape[1] if used and second is not None else 0)
        grid = image(*sizes) if len(sizes) == 2 else video(*sizes)
        return grid + text(words)


class MotifVideo(_DoubleThenSingle):
    name = "motif_video"
    covers = "Motif-Video"
    classes = ("MotifVideoTransformer3DModel",)
    processors = frozenset({"MotifVideoAttnProcessor2_0"})
    parameters = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "image_embeds")

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        latents, prompt = arguments.get("hidden_states"), arguments.get("encoder_hidden_states")
        if latents is None or latents.ndim != 5 or prompt is None:
            return None
        images = arguments.get("image_embeds")
        config = model.config
        p, p_t = config.patch_size, config.patch_size_t  # type: ignore[union-attr]
        grid = video(latents.shape[2] // p_t, latents.shape[3] // p, latents.shape[4] // p)
        return grid + text(prompt.shape[1] + (0 if images is None else images.shape[1]))

    def layer_layout(self, layout: Layout, length: int) -> Layout | None:
        # Decoder blocks see the encoder's output in place of the prompt.
        grid = grid_alone(layout)
        tokens = layout_length(grid)
        return grid + condition(tokens) if length == 2 * tokens else Family.layer_layout(self, layout, length)
