"""Self-attention of the training copy on this project's kernels, which beat torch's on a CPU forwards and backwards."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention

from sparsereel_kernels import sparse_attention


class KernelAttention:
    """Stands in for diffusers' `WanAttnProcessor` in self-attention; the same numbers up to rounding."""

    def __call__(
        self,
        attention: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """(B, N, C) to (B, N, C); `rotary_emb` holds cosines and sines, each (1, N, 1, D) with every value twice."""
        if encoder_hidden_states is not None or attention_mask is not None or rotary_emb is None:
            raise ValueError("KernelAttention serves self-attention with rotary tables and without a mask only.")
        q = attention.norm_q(attention.to_q(hidden_states)).unflatten(2, (attention.heads, -1))
        k = attention.norm_k(attention.to_k(hidden_states)).unflatten(2, (attention.heads, -1))
        v = attention.to_v(hidden_states).unflatten(2, (attention.heads, -1))
        q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        seen = sparse_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        output = attention.to_out[0](seen.transpose(1, 2).flatten(2, 3))
        return attention.to_out[1](output)


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring channels of (B, N, H, D) as pairs by their token's angles."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosines[..., 0::2], sines[..., 1::2]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2).type_as(x)


def use_kernels(model: WanTransformer3DModel) -> None:
    """Give every self-attention layer of `model` the kernels; cross-attention, over 16 words, keeps torch's."""
    for block in model.blocks:
        block.attn1.set_processor(KernelAttention())
