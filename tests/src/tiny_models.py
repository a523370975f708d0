"""Tiny random diffusers models of every family, with inputs, and dense attention under explicit token masks.

Grids have at least two query blocks of 128 tokens, so that block masks differ from dense ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)

from sparsereel import TokenGrid

BATCH = 2
TEXT = 8


@dataclass(frozen=True)
class Case:
    """One model with inputs for a batch of two.

    Attributes:
        build: makes the model; the same weights each time.
        inputs: keyword arguments of its forward; the same each time.
        grids: token grid of every self-attention length that occurs.
        layers: number of self-attention layers.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    inputs: Callable[[], dict[str, Any]]
    grids: tuple[TokenGrid, ...]
    layers: int

    def model(self) -> torch.nn.Module:
        torch.manual_seed(1)
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Attention is nearly uniform at the usual initialisation, which would hide a wrong mask.
                if parameter.ndim == 2:
                    parameter.mul_(1.5)
        return model


def run(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


# ------------------------------------------------------------------ Wan

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}


def wan_inputs(frames: int = 5, height: int = 16, width: int = 16, channels: int = 4) -> dict[str, Any]:
    g = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(BATCH, channels, frames, height, width, generator=g),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12, generator=g),
    }


def wan_i2v_inputs() -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    text = torch.randn(BATCH, 512, 12, generator=g)
    image = torch.randn(BATCH, 5, 20, generator=g)
    return {
        **wan_inputs(channels=9),
        "encoder_hidden_states": text,
        "encoder_hidden_states_image": image,
    }


def wan_ti2v_inputs() -> dict[str, Any]:
    inputs = wan_inputs()
    per_token = torch.full((BATCH, 320), 700)
    per_token[:, :64] = 0  # the first frame is given
    per_token[:, 64:100] = 300
    return {**inputs, "timestep": per_token}


def wan_vace_inputs(control_frames: int = 5) -> dict[str, Any]:
    g = torch.Generator().manual_seed(4)
    control = torch.randn(BATCH, 6, control_frames, 16, 16, generator=g)
    return {
        **wan_inputs(),
        "control_hidden_states": control,
        "control_hidden_states_scale": torch.tensor([1.0, 0.5]),
    }


# ------------------------------------------------------------------ HunyuanVideo

HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": 12,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}


def hunyuan_inputs() -> dict[str, Any]:
    g = torch.Generator().manual_seed(5)
    mask = torch.ones(BATCH, TEXT, dtype=torch.long)
    mask[0, 5:] = 0
    return {
        "hidden_states": torch.randn(BATCH, 4, 5, 16, 16, generator=g),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12, generator=g),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(BATCH, 8, generator=g),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }


# ------------------------------------------------------------------ CogVideoX

COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 12,
    "num_layers": 2,
    "sample_width": 16,
    "sample_height": 16,
    "sample_frames": 17,
    "patch_size": 2,
    "max_text_seq_length": TEXT,
}


def cogvideox_inputs(frames: int = 5, height: int = 16, width: int = 16) -> dict[str, Any]:
    g = torch.Generator().manual_seed(6)
    return {
        "hidden_states": torch.randn(BATCH, frames, 4, height, width, generator=g),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12, generator=g),
    }


def cogvideox15_inputs() -> dict[str, Any]:
    g = torch.Generator().manual_seed(7)
    inputs = cogvideox_inputs(frames=6, height=18, width=22)
    angles = torch.randn(3 * 9 * 11, 16, generator=g)
    return {**inputs, "image_rotary_emb": (angles.cos(), angles.sin())}


# ------------------------------------------------------------------ Stable Diffusion

UNET = {
    "sample_size": 18,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def unet_inputs(height: int = 18, width: int = 20) -> dict[str, Any]:
    g = torch.Generator().manual_seed(8)
    return {
        "sample": torch.randn(BATCH, 4, height, width, generator=g),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12, generator=g),
    }


# ------------------------------------------------------------------ all of them

_VIDEO = TokenGrid(5, 8, 8)
_UNET_EVEN = (TokenGrid(1, 18, 20), TokenGrid(1, 9, 10), TokenGrid(1, 5, 5))
_UNET_ODD = (TokenGrid(1, 17, 21), TokenGrid(1, 9, 11), TokenGrid(1, 5, 6))

CASES = {
    case.name: case
    for case in (
        Case("wan", lambda: WanTransformer3DModel(**WAN), wan_inputs, (_VIDEO,), 3),
        Case(
            "wan_i2v",
            lambda: WanTransformer3DModel(**{**WAN, "in_channels": 9}, image_dim=20, added_kv_proj_dim=32),
            wan_i2v_inputs,
            (_VIDEO,),
            3,
        ),
        Case("wan_ti2v", lambda: WanTransformer3DModel(**WAN), wan_ti2v_inputs, (_VIDEO,), 3),
        Case(
            "wan_vace",
            lambda: WanVACETransformer3DModel(**WAN, vace_layers=[0, 2], vace_in_channels=6),
            wan_vace_inputs,
            (_VIDEO,),
            5,
        ),
        Case(
            "hunyuan_video",
            lambda: HunyuanVideoTransformer3DModel(**HUNYUAN),
            hunyuan_inputs,
            (TokenGrid(5, 8, 8, text=TEXT),),
            3,
        ),
        Case(
            "hunyuan_i2v",
            lambda: HunyuanVideoTransformer3DModel(**HUNYUAN, image_condition_type="token_replace"),
            hunyuan_inputs,
            (TokenGrid(5, 8, 8, text=TEXT),),
            3,
        ),
        Case(
            "cogvideox",
            lambda: CogVideoXTransformer3DModel(**COGVIDEOX),
            cogvideox_inputs,
            (TokenGrid(5, 8, 8, text=TEXT, text_side="before"),),
            2,
        ),
        Case(
            "cogvideox_odd",
            lambda: CogVideoXTransformer3DModel(**COGVIDEOX),
            lambda: cogvideox_inputs(4, 17, 19),
            (TokenGrid(4, 8, 9, text=TEXT, text_side="before"),),
            2,
        ),
        Case(
            "cogvideox15",
            lambda: CogVideoXTransformer3DModel(
                **COGVIDEOX, patch_size_t=2, use_rotary_positional_embeddings=True, patch_bias=False
            ),
            cogvideox15_inputs,
            (TokenGrid(3, 9, 11, text=TEXT, text_side="before"),),
            2,
        ),
        Case("unet", lambda: UNet2DConditionModel(**UNET), unet_inputs, _UNET_EVEN, 7),
        Case("unet_odd", lambda: UNet2DConditionModel(**UNET), lambda: unet_inputs(17, 21), _UNET_ODD, 7),
    )
}

MaskOf = Callable[[int, TokenGrid], torch.Tensor]


@contextmanager
def dense_under(mask_of: MaskOf, grids: tuple[TokenGrid, ...]) -> Iterator[list[int]]:
    """torch's own attention, in which self-attention calls see only what `mask_of(call, grid)` allows.

    Args:
        mask_of: bool (S, S) or (heads, S, S) of the call-th self-attention call since entering.
        grids: a call is self-attention where queries and keys are as many as the tokens of one of these.

    Yields:
        the lengths of the calls that were masked, as they come.
    """
    by_length = {grid.seq_len: grid for grid in grids}
    original = F.scaled_dot_product_attention
    seen: list[int] = []

    def masked(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        grid = by_length.get(query.shape[2])
        if grid is not None and key.shape[2] == query.shape[2]:
            allowed = mask_of(len(seen), grid)
            seen.append(query.shape[2])
            if attn_mask is None:
                attn_mask = allowed
            elif attn_mask.dtype == torch.bool:
                attn_mask = attn_mask & allowed
            else:
                attn_mask = attn_mask.masked_fill(~allowed, float("-inf"))
        return original(query, key, value, attn_mask, *args, **kwargs)

    F.scaled_dot_product_attention = masked
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention = original


def same_mask(pattern: Any) -> MaskOf:
    """The mask of one pattern, in every layer."""
    return lambda call, grid: pattern.token_mask(grid)


# ------------------------------------------------------------------ pipelines


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_pipe(scheduler: Any, *, dtype: torch.dtype = torch.float32, **components: Any) -> tuple[Any, dict[str, Any]]:
    """A WanPipeline without VAE and text encoder, and arguments for a call on 320 tokens with guidance."""
    from diffusers import WanPipeline

    transformer = CASES["wan"].model().to(dtype)
    options = {"vae": None, "tokenizer": None, "text_encoder": None, **components}
    pipe = WanPipeline(scheduler=scheduler, transformer=transformer, **options)
    g = torch.Generator().manual_seed(9)
    call = {
        "prompt_embeds": torch.randn(1, TEXT, 12, generator=g).to(dtype),
        "negative_prompt_embeds": torch.randn(1, TEXT, 12, generator=g).to(dtype),
        "height": 128,
        "width": 128,
        "num_frames": 17,
        "output_type": "latent",
    }
    return quiet(pipe), call


def cogvideox_pipe(scheduler: Any, *, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """A CogVideoXPipeline without VAE and text encoder, and arguments for a call with guidance."""
    from diffusers import CogVideoXPipeline

    transformer = CASES["cogvideox"].model().to(dtype)
    pipe = CogVideoXPipeline(scheduler=scheduler, transformer=transformer, vae=None, tokenizer=None, text_encoder=None)
    g = torch.Generator().manual_seed(10)
    call = {
        "prompt_embeds": torch.randn(1, TEXT, 12, generator=g).to(dtype),
        "negative_prompt_embeds": torch.randn(1, TEXT, 12, generator=g).to(dtype),
        "height": 128,
        "width": 128,
        "num_frames": 17,
        "max_sequence_length": TEXT,
        "output_type": "latent",
    }
    return quiet(pipe), call


def sd_pipe(
    scheduler: Any, *, dtype: torch.dtype = torch.float32, image_to_image: bool = False
) -> tuple[Any, dict[str, Any]]:
    """A Stable Diffusion pipeline around the tiny U-Net, and arguments for a call with guidance."""
    from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

    torch.manual_seed(11)
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    cls = StableDiffusionImg2ImgPipeline if image_to_image else StableDiffusionPipeline
    pipe = cls(
        scheduler=scheduler,
        unet=CASES["unet"].model().to(dtype),
        vae=vae.to(dtype),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    g = torch.Generator().manual_seed(12)
    call = {
        "prompt_embeds": torch.randn(1, TEXT, 12, generator=g).to(dtype),
        "negative_prompt_embeds": torch.randn(1, TEXT, 12, generator=g).to(dtype),
        "output_type": "latent",
    }
    if image_to_image:
        # Four channels: taken as latents.
        call |= {"image": torch.randn(1, 4, 18, 20, generator=g).to(dtype), "strength": 0.5}
    else:
        call |= {"height": 40, "width": 40}
    return quiet(pipe), call
