"""Wan 2.1 / 2.2 and VACE: video tokens only, text through cross-attention, rotary tables built from the latent shape.

Tile order (`TokenGrid.tile_order`) is applied once per forward: patch embedding, rotary tables, per-token timesteps and
VACE control tokens are permuted together and the projected output is put back before unpatchify.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sparsereel.families.base import Family, OrderSource, by_suffix
from sparsereel.families.layout import Layout, video


class Wan(Family):
    name = "wan"
    covers = "Wan 2.1 text- and image-to-video, Wan 2.2 (two transformers; per-token timesteps), Wan VACE"
    classes = ("WanTransformer3DModel", "WanVACETransformer3DModel")
    seam = "dispatch"
    context_parallel = "sequence"
    processors = frozenset({"WanAttnProcessor"})
    parameters = ("hidden_states", "timestep")

    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        # Forward order: VACE runs its control blocks before the main ones.
        layers = by_suffix(model, [".attn1"])
        return sorted(layers, key=lambda item: not item[0].startswith("vace_blocks."))

    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | None:
        latents = arguments.get("hidden_states")
        if latents is None or latents.ndim != 5:
            return None
        patch: tuple[int, int, int] = model.config.patch_size  # type: ignore[union-attr,assignment]
        return video(latents.shape[2] // patch[0], latents.shape[3] // patch[1], latents.shape[4] // patch[2])

    def install_order(self, model: nn.Module, runtime: OrderSource) -> list[Any]:
        hooks = _TileOrderHooks(runtime)
        handles = [
            model.rope.register_forward_hook(hooks.rotary_tables),  # type: ignore[union-attr]
            model.patch_embedding.register_forward_hook(hooks.embedded_tokens),  # type: ignore[union-attr]
            model.condition_embedder.register_forward_hook(  # type: ignore[union-attr]
                hooks.token_timesteps, with_kwargs=True
            ),
            model.proj_out.register_forward_hook(hooks.projected_tokens),  # type: ignore[union-attr]
        ]
        if hasattr(model, "vace_patch_embedding"):
            handles.append(model.vace_patch_embedding.register_forward_hook(hooks.control_tokens))  # type: ignore[union-attr]
        return handles


class _TileOrderHooks:
    """Forward hooks that permute the token axis; each one leaves its output alone when the call keeps its order."""

    def __init__(self, runtime: OrderSource) -> None:
        self.runtime = runtime

    def embedded_tokens(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        # (B, C, F, H, W), flattened to tokens by the model right after.
        order = self.runtime.call_order(output, inverse=False)
        if order is None:
            return None
        return output.flatten(2).index_select(2, order).view_as(output)

    def control_tokens(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        # The model fills missing frames with zeros at the end of the sequence, which is not their place in tile order.
        order = self.runtime.call_order(output, inverse=False)
        if order is None:
            return None
        missing = order.numel() // (output.shape[3] * output.shape[4]) - output.shape[2]
        return self.embedded_tokens(module, args, F.pad(output, (0, 0, 0, 0, 0, missing)))

    def rotary_tables(
        self, module: nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        order = self.runtime.call_order(output[0], inverse=False)
        if order is None:
            return None
        cos, sin = output  # (1, S, 1, D)
        return cos.index_select(1, order), sin.index_select(1, order)

    def token_timesteps(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        # One timestep a token (Wan 2.2 text-image-to-video): embeddings are (B, S, ...) and follow the tokens.
        if kwargs.get("timestep_seq_len") is None:
            return None
        order = self.runtime.call_order(output[0], inverse=False)
        if order is None:
            return None
        embedding, projection, *rest = output
        return (embedding.index_select(1, order), projection.index_select(1, order), *rest)

    def projected_tokens(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        order = self.runtime.call_order(output, inverse=True)
        return None if order is None else output.index_select(1, order)
