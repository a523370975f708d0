"""Flow matching for causal chunks: every frame its own noise level, every group of frames its own view of the past."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention

from sparsereel.minireel.training.attention import rotate
from sparsereel.minireel.training.layouts import CHUNK_FRAMES, WINDOW_FRAMES, Layout
from sparsereel_kernels import sparse_attention


class ChunkAttention:
    """Stands in for diffusers' `WanAttnProcessor`: each group of frames attends to what its layout lets it see.

    `rotary_emb` carries three things: cosines and sines of a whole window, each (1, W, 1, D), and the layout's views in
    tokens. Positions of a group's keys count from the first one it sees.
    """

    def __call__(
        self,
        attention: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor, Any] | None = None,
    ) -> torch.Tensor:
        """(B, N, C) to (B, N, C), the sequence of one layout."""
        if encoder_hidden_states is not None or attention_mask is not None or rotary_emb is None:
            raise ValueError("ChunkAttention serves self-attention with a layout's views and without a mask only.")
        cosines, sines, views = rotary_emb
        q = attention.norm_q(attention.to_q(hidden_states)).unflatten(2, (attention.heads, -1))
        k = attention.norm_k(attention.to_k(hidden_states)).unflatten(2, (attention.heads, -1))
        v = attention.to_v(hidden_states).unflatten(2, (attention.heads, -1))
        seen = []
        for spans in views:
            start, stop = spans[-1]
            length = sum(b - a for a, b in spans)
            own = slice(length - (stop - start), length)
            queries = rotate(q[:, start:stop], cosines[:, own], sines[:, own])
            keys = rotate(torch.cat([k[:, a:b] for a, b in spans], 1), cosines[:, :length], sines[:, :length])
            values = torch.cat([v[:, a:b] for a, b in spans], 1)
            seen.append(sparse_attention(queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)))
        output = attention.to_out[0](torch.cat(seen, 2).transpose(1, 2).flatten(2, 3))
        return attention.to_out[1](output)


def use_chunks(model: WanTransformer3DModel) -> None:
    """Make every self-attention layer of `model` causal over the chunks of a layout."""
    for block in model.blocks:
        block.attn1.set_processor(ChunkAttention())


def predict_chunks(
    model: WanTransformer3DModel, latents: torch.Tensor, levels: torch.Tensor, text: torch.Tensor, layout: Layout
) -> torch.Tensor:
    """The model's velocity for the noisy frames of a sequence.

    Args:
        model: Prepared by `use_chunks`.
        latents: (B, C, F, H, W), the layout's frames, clean ones first.
        levels: (B, F) noise levels in [0, 1]; 0 for clean frames.
        text: (B, L, D) prompt embeddings.
        layout: Who sees whom.

    Returns:
        (B, N, C) in the model's dtype, the tokens of the noisy frames.
    """
    cells = latents.shape[3] * latents.shape[4]
    tokens = model.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
    rotary = model.rope(latents.new_empty(1, 1, WINDOW_FRAMES, *latents.shape[3:]))
    views = tuple(tuple((a * cells, b * cells) for a, b in spans) for spans in layout.views)
    time, modulation, text, _ = model.condition_embedder(
        1000 * levels.flatten(), text, None, timestep_seq_len=levels.shape[1]
    )
    modulation = modulation.unflatten(2, (6, -1)).repeat_interleave(cells, 1)
    for block in model.blocks:
        tokens = block(tokens, text, modulation, (*rotary, views))
    noisy, first = tokens[:, layout.clean * cells :], layout.clean
    shift, scale = (model.scale_shift_table + time[:, first:, None]).repeat_interleave(cells, 1).unbind(2)
    noisy = (model.norm_out(noisy.float()) * (1 + scale) + shift).type_as(noisy)
    return model.proj_out(noisy)


def chunk_loss(
    model: WanTransformer3DModel,
    clean: torch.Tensor,
    noise: torch.Tensor,
    levels: torch.Tensor,
    text: torch.Tensor,
    layout: Layout,
    context_levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared velocity error of each noisy chunk: (B, noisy chunks).

    Args:
        model, text, layout: As in `predict_chunks`.
        clean, noise: (B, C, F, H, W) fp32.
        levels: (B, noisy chunks) noise levels in (0, 1).
        context_levels: (B, clean chunks) a little noise for clean chunks, which the model is not told of: its own
            chunks, which it will see when sampling, are not perfect either. None leaves them clean.
    """
    told = torch.nn.functional.pad(levels.repeat_interleave(CHUNK_FRAMES, 1), (layout.clean, 0))
    real = told.clone()
    if context_levels is not None:
        real[:, : layout.clean] = context_levels.repeat_interleave(CHUNK_FRAMES, 1)
    s = real[:, None, :, None, None]
    dtype = model.patch_embedding.weight.dtype
    noisy = (1 - s) * clean + s * noise
    velocity = predict_chunks(model, noisy.to(dtype), told, text.to(dtype), layout)
    target = (noise - clean)[:, :, layout.clean :].flatten(2).transpose(1, 2)
    return (velocity.float() - target).square().mean(2).unflatten(1, (levels.shape[1], -1)).mean(2)
