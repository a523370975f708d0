"""Rectified flow for latent clips (Lipman et al., 2023; Esser et al., 2024).

x_s = (1 - s) x_0 + s noise, and the model predicts the velocity noise - x_0 at noise level s in (0, 1), told as 1000 s.
"""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from transformers import UMT5EncoderModel


def sample_noise_levels(count: int, generator: torch.Generator, shift: float) -> torch.Tensor:
    """Noise levels (count,): stratified logit-normal(0, 1.1), one in five uniform, then shifted towards 1.

    A larger `shift` visits high noise more often. Many tokens drown less in the same noise, so larger clips need more.
    """
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    levels = torch.sigmoid(1.1 * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
    levels = torch.where(torch.rand(count, generator=generator) < 0.2, u, levels)
    return shift * levels / (1 + (shift - 1) * levels)


def embed_text(encoder: UMT5EncoderModel, ids: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
    """Prompt embeddings (B, length, width), zero after each prompt's end: what `WanPipeline` makes of them."""
    hidden = encoder(ids, mask).last_hidden_state * mask[..., None]
    return torch.nn.functional.pad(hidden, (0, 0, 0, max(0, length - hidden.shape[1])))[:, :length]


def predict_tokens(
    model: WanTransformer3DModel,
    latents: torch.Tensor,
    levels: torch.Tensor,
    text: torch.Tensor,
) -> torch.Tensor:
    """The model's velocity, token by token: `WanTransformer3DModel.forward` without the reshaping at its end.

    Args:
        latents: (B, C, F, H, W), noisy.
        levels: (B,) noise levels in (0, 1).
        text: (B, L, D) prompt embeddings.

    Returns:
        (B, N, C) in the model's dtype.
    """
    tokens = model.patch_embedding(latents).flatten(2).transpose(1, 2)
    rotary = model.rope(latents)
    time, modulation, text, _ = model.condition_embedder(1000 * levels, text, None)
    modulation = modulation.unflatten(1, (6, -1))
    tokens = tokens.contiguous()
    for block in model.blocks:
        tokens = block(tokens, text, modulation, rotary)
    shift, scale = (model.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
    tokens = (model.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens)
    return model.proj_out(tokens)


def flow_loss(
    model: WanTransformer3DModel,
    clean: torch.Tensor,
    noise: torch.Tensor,
    levels: torch.Tensor,
    text: torch.Tensor,
) -> torch.Tensor:
    """Mean squared velocity error of each clip: (B,). Shapes as `predict_tokens`; clean and noise are fp32."""
    s = levels.view(-1, 1, 1, 1, 1)
    dtype = model.patch_embedding.weight.dtype
    noisy = (1 - s) * clean + s * noise
    velocity = predict_tokens(model, noisy.to(dtype), levels, text.to(dtype))
    target = (noise - clean).flatten(2).transpose(1, 2)
    return (velocity.float() - target).square().mean((1, 2))
