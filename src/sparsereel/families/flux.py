"""Flux and models built like it: text tokens, then packed image tokens, whose rows and columns stand in `img_ids`.

Images to edit (Kontext, Flux 2) follow the generated one with another number in the ids' first column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from sparsereel.families.base import Family, by_key
from sparsereel.families.layout import Layout, condition, image, text
from sparsereel.families.reading import COMPILED, read_once, row_major


class PackedImage(Family):
    """Joint attention over text, image and further images, placed by `img_ids`."""

    seam = "dispatch"
    parameters: ClassVar[tuple[str, ...]] = (
        *("hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids"),
    )

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        blocks = ("transformer_blocks.", "single_transformer_blocks.")
        return [(n, m) for n, m in model.named_modules() if n.startswith(blocks) and n.endswith(".attn")]

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        latents, prompt, ids = (arguments.get(n) for n in ("hidden_states", "encoder_hidden_states", "img_ids"))
        if latents is None or latents.ndim != 3 or prompt is None or ids is None:
            return None
        if torch.compiler.is_compiling():
            return COMPILED
        found = read_once(ids, row_major)
        if found is None:
            return "img_ids are not the rows and columns of one image, row by row"
        height, width, rest = found
        return text(prompt.shape[1]) + image(height, width) + condition(rest)


class Flux(PackedImage):
    name = "flux"
    covers = "Flux 1 dev, schnell, Kontext, Fill, control"
    classes = ("FluxTransformer2DModel",)
    context_parallel = "segments"
    processors = frozenset({"FluxAttnProcessor"})
    parameters: ClassVar[tuple[str, ...]] = (
        *("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids"),
    )


class Chroma(PackedImage):
    name = "chroma"
    covers = "Chroma, given boolean masks (its pipeline hands numbers, added for each query and key: dense)"
    classes = ("ChromaTransformer2DModel",)
    processors = frozenset({"FluxAttnProcessor"})

    def key_mask(self, mask: torch.Tensor) -> torch.Tensor:
        # Blocks hand mask[query] * mask[key]; a query that is masked itself is text that nobody sees.
        return by_key(mask)


class Flux2(PackedImage):
    name = "flux2"
    covers = "Flux 2 (without its cache of reference images)"
    classes = ("Flux2Transformer2DModel",)
    context_parallel = "segments"
    processors = frozenset({"Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"})


class Bria(PackedImage):
    name = "bria"
    covers = "Bria 3.2"
    classes = ("BriaTransformer2DModel",)
    processors = frozenset({"BriaAttnProcessor"})
    parameters: ClassVar[tuple[str, ...]] = (
        *("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids"),
    )


class BriaFibo(PackedImage):
    name = "bria_fibo"
    covers = "Bria FIBO"
    classes = ("BriaFiboTransformer2DModel",)
    processors = frozenset({"BriaFiboAttnProcessor", "BriaAttnProcessor"})
    parameters: ClassVar[tuple[str, ...]] = (
        *("hidden_states", "encoder_hidden_states", "text_encoder_layers", "pooled_projections", "timestep"),
        *("img_ids", "txt_ids"),
    )


class LongCatImage(PackedImage):
    name = "longcat_image"
    covers = "LongCat-Image"
    classes = ("LongCatImageTransformer2DModel",)
    processors = frozenset({"LongCatImageAttnProcessor"})


class OvisImage(PackedImage):
    name = "ovis_image"
    covers = "Ovis-Image"
    classes = ("OvisImageTransformer2DModel",)
    processors = frozenset({"OvisImageAttnProcessor"})
