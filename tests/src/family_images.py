"""Tiny image models for test_families.py."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch
from sparsereel_family_cases import (
    BATCH,
    DIM,
    HEADS,
    HUNYUAN,
    IMAGES,
    WORDS,
    Family,
    Shape,
    alone,
    flat,
    noise,
    of,
    packed,
    places,
    prompt,
    short,
    steps,
    text_first,
    text_last,
)

from sparsereel import TokenGrid

_IMAGE = {"shapes": IMAGES, "frames_at": None}
_PACKED = {"patch": None}

# ------------------------------------------------------------------ packed images

FLUX = {**HEADS, "in_channels": 4, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": DIM}


def flux(shape: Shape, axes: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": packed(shape, 4),
        "timestep": steps() / 1000,
        "encoder_hidden_states": prompt(),
        "img_ids": places(shape, axes=axes),
        "txt_ids": torch.zeros(WORDS, axes),
    }


def pooled(shape: Shape) -> dict[str, Any]:
    return {**flux(shape), "pooled_projections": noise(BATCH, 8)}


def kontext(shape: Shape) -> dict[str, Any]:
    ids = torch.cat([places(shape), places((1, 6, 7), 1)])
    return {**pooled(shape), "hidden_states": packed(shape, 4, 42), "img_ids": ids}


def kontext_grid(shape: Shape) -> list[TokenGrid]:
    return [of(("text", WORDS), ("image", *shape), ("condition", 42))]


def chroma(shape: Shape) -> dict[str, Any]:
    mask = torch.cat([short(), torch.ones(BATCH, shape[1] * shape[2])], dim=1).bool()
    return {**flux(shape), "attention_mask": mask}


def qwen(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": packed(shape, 4),
        "timestep": steps() / 1000,
        "img_shapes": [[shape]] * BATCH,
        "encoder_hidden_states": prompt(),
        "encoder_hidden_states_mask": short(),
    }


def qwen_edit(shape: Shape) -> dict[str, Any]:
    return {
        **qwen(shape),
        "hidden_states": packed(shape, 4, 42),
        "img_shapes": [[shape, (1, 6, 7)]] * BATCH,
    }


QWEN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "joint_attention_dim": DIM,
    "axes_dims_rope": (4, 6, 6),
    "patch_size": 1,
}

# ------------------------------------------------------------------ images


def still(shape: Shape) -> dict[str, Any]:
    return {"hidden_states": flat(shape, 4), "timestep": steps(), "encoder_hidden_states": prompt()}


def sd3(shape: Shape) -> dict[str, Any]:
    return {**still(shape), "pooled_projections": noise(BATCH, 8)}


def sized(shape: Shape) -> dict[str, Any]:
    sizes = {name: torch.tensor([[64.0, 64.0]] * BATCH) for name in ("original_size", "target_size", "crop_coords")}
    return {**still(shape), **sizes}


def lumina2(shape: Shape) -> dict[str, Any]:
    return {**still(shape), "encoder_attention_mask": short(WORDS, 6, 6).bool()}


LUMINA2 = {
    "in_channels": 4,
    "hidden_size": 48,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 16,
    "axes_dim_rope": (8, 8, 8),
    "axes_lens": (16, 32, 32),
    "cap_feat_dim": DIM,
}


def z_image(shape: Shape) -> dict[str, Any]:
    latents = [noise(4, 1, 2 * shape[1], 2 * shape[2], seed=n) for n in range(BATCH)]
    return {"x": latents, "t": steps() / 1000, "cap_feats": [noise(40, DIM, seed=5), noise(7, DIM, seed=6)]}


Z_IMAGE = {
    "in_channels": 4,
    "dim": 48,
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": DIM,
    "axes_dims": [8, 8, 8],
    "axes_lens": [512, 64, 64],
}


def z_grid(shape: Shape) -> TokenGrid:
    padding = -(shape[1] * shape[2]) % 32
    parts = [("image", *shape), ("condition", padding), ("text", 64)]
    return of(*[part for part in parts if part[1] != 0 or len(part) == 4])


def z_alone(shape: Shape) -> TokenGrid:
    padding = -(shape[1] * shape[2]) % 32
    return of(*[("image", *shape), ("condition", padding)][: 2 if padding else 1])


def dit(shape: Shape) -> dict[str, Any]:
    return {"hidden_states": flat(shape, 4), "timestep": steps(), "class_labels": torch.tensor([1, 2])}


def pixart(shape: Shape) -> dict[str, Any]:
    return {**still(shape), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def hunyuan_dit(shape: Shape) -> dict[str, Any]:
    angles = noise(shape[1] * shape[2], 16)
    return {
        **still(shape),
        "text_embedding_mask": short(),
        "encoder_hidden_states_t5": prompt(6, 16, seed=5),
        "text_embedding_mask_t5": short(6, 6, 2),
        "image_meta_size": torch.ones(BATCH, 6),
        "style": torch.zeros(BATCH, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def hidream(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": flat(shape, 4),
        "timesteps": steps(),
        "encoder_hidden_states_t5": prompt(),
        "encoder_hidden_states_llama3": noise(2, BATCH, WORDS, DIM, seed=5),
        "pooled_embeds": noise(BATCH, 8),
    }


def hidream_grid(shape: Shape) -> list[TokenGrid]:
    return [of(("image", *shape), ("condition", 400 - shape[1] * shape[2]), ("text", 3 * WORDS))]


def hunyuan_image(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": flat(shape, 4, 1),
        "timestep": steps(),
        "encoder_hidden_states": prompt(),
        "encoder_attention_mask": short(),
        "encoder_hidden_states_2": prompt(6, seed=5),
        "encoder_attention_mask_2": short(6, 6, 2),
    }


IMAGE_FAMILIES: dict[str, Family] = {
    "flux": Family(
        lambda: d.FluxTransformer2DModel(**FLUX, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6)),
        pooled,
        text_first,
        3,
        shapes=IMAGES,
        **_PACKED,
    ),
    "flux_kontext": Family(
        lambda: d.FluxTransformer2DModel(**FLUX, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6)),
        kontext,
        kontext_grid,
        3,
        shapes=IMAGES,
        **_PACKED,
    ),
    "flux2": Family(
        lambda: d.Flux2Transformer2DModel(
            **FLUX, timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False
        ),
        lambda s: flux(s, 4),
        text_first,
        3,
        shapes=IMAGES,
        **_PACKED,
    ),
    "chroma": Family(
        lambda: d.ChromaTransformer2DModel(
            **FLUX,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        chroma,
        text_first,
        3,
        shapes=IMAGES,
        **_PACKED,
    ),
    "bria": Family(
        lambda: d.BriaTransformer2DModel(**FLUX, axes_dims_rope=[4, 6, 6]),
        pooled,
        text_first,
        3,
        shapes=IMAGES,
        **_PACKED,
    ),
    "bria_fibo": Family(
        lambda: d.BriaFiboTransformer2DModel(
            **FLUX, pooled_projection_dim=None, axes_dims_rope=[4, 6, 6], text_encoder_dim=DIM
        ),
        lambda s: {
            **flux(s),
            "text_encoder_layers": [prompt(seed=n) for n in (11, 12, 13)],
            "pooled_projections": None,
        },
        text_first,
        3,
        shapes=IMAGES,
        **_PACKED,
    ),
    "longcat_image": Family(
        lambda: d.LongCatImageTransformer2DModel(**FLUX, pooled_projection_dim=DIM, axes_dims_rope=[4, 6, 6]),
        flux,
        text_first,
        3,
        shapes=IMAGES,
        **_PACKED,
    ),
    "ovis_image": Family(
        lambda: d.OvisImageTransformer2DModel(**FLUX, out_channels=4, axes_dims_rope=(4, 6, 6)),
        flux,
        text_first,
        3,
        shapes=IMAGES,
        **_PACKED,
    ),
    "qwen_image": Family(lambda: d.QwenImageTransformer2DModel(**QWEN), qwen, text_first, 2, shapes=IMAGES, **_PACKED),
    "qwen_image_edit": Family(
        lambda: d.QwenImageTransformer2DModel(**QWEN), qwen_edit, kontext_grid, 2, shapes=IMAGES, **_PACKED
    ),
    "stable_diffusion_3": Family(
        lambda: d.SD3Transformer2DModel(
            **HEADS,
            sample_size=32,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            joint_attention_dim=DIM,
            caption_projection_dim=32,
            pooled_projection_dim=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        sd3,
        lambda s: [*text_last(s), *alone(s)],
        3,
        **_IMAGE,
    ),
    "auraflow": Family(
        lambda: d.AuraFlowTransformer2DModel(
            **HEADS,
            sample_size=32,
            num_mmdit_layers=1,
            num_single_dit_layers=2,
            joint_attention_dim=DIM,
            caption_projection_dim=32,
        ),
        lambda s: {**still(s), "timestep": steps() / 1000},
        lambda s: [TokenGrid(*s, text=WORDS + 8, text_side="before")],
        3,
        **_IMAGE,
    ),
    "cogview4": Family(
        lambda: d.CogView4Transformer2DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            text_embed_dim=DIM,
            time_embed_dim=8,
            condition_dim=4,
            sample_size=32,
            rope_axes_dim=(16, 16),
        ),
        sized,
        text_first,
        2,
        **_IMAGE,
    ),
    "cogview3plus": Family(
        lambda: d.CogView3PlusTransformer2DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            text_embed_dim=DIM,
            time_embed_dim=8,
            condition_dim=4,
            sample_size=32,
        ),
        sized,
        text_first,
        2,
        **_IMAGE,
    ),
    "lumina2": Family(
        lambda: d.Lumina2Transformer2DModel(**LUMINA2, num_refiner_layers=1),
        lumina2,
        lambda s: [*alone(s), TokenGrid(*s, text=6, text_side="before")],
        3,
        **_IMAGE,
    ),
    "lumina2_joint": Family(
        lambda: d.Lumina2Transformer2DModel(**LUMINA2, num_refiner_layers=0),
        lumina2,
        lambda s: [TokenGrid(*s, text=6, text_side="before")],
        2,
        **_IMAGE,
    ),
    "z_image": Family(
        lambda: d.ZImageTransformer2DModel(**Z_IMAGE, n_refiner_layers=1),
        z_image,
        lambda s: [z_alone(s), z_grid(s)],
        3,
        latents="x",
        shapes=IMAGES,
        frames_at=2,
    ),
    "z_image_joint": Family(
        lambda: d.ZImageTransformer2DModel(**Z_IMAGE, n_refiner_layers=0),
        z_image,
        lambda s: [z_grid(s)],
        2,
        latents="x",
        shapes=IMAGES,
        frames_at=2,
    ),
    "pixart": Family(
        lambda: d.PixArtTransformer2DModel(
            **HEADS, num_layers=2, cross_attention_dim=32, sample_size=32, caption_channels=DIM, norm_num_groups=4
        ),
        pixart,
        alone,
        2,
        **_IMAGE,
    ),
    "dit": Family(
        lambda: d.DiTTransformer2DModel(**HEADS, num_layers=2, sample_size=32, norm_num_groups=4),
        dit,
        alone,
        2,
        shapes=((1, 16, 16), (1, 13, 13)),
        frames_at=None,
    ),
    "hunyuan_dit": Family(
        lambda: d.HunyuanDiT2DModel(
            **HEADS,
            in_channels=4,
            patch_size=2,
            sample_size=32,
            hidden_size=32,
            num_layers=2,
            cross_attention_dim=DIM,
            cross_attention_dim_t5=16,
            pooled_projection_dim=8,
            text_len=WORDS,
            text_len_t5=6,
        ),
        hunyuan_dit,
        alone,
        2,
        **_IMAGE,
    ),
    "hidream": Family(
        lambda: d.HiDreamImageTransformer2DModel(
            **HEADS,
            patch_size=2,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            caption_channels=[DIM, DIM],
            text_emb_dim=8,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(4, 6, 6),
            max_resolution=(40, 40),
            llama_layers=[0, 1],
        ),
        hidream,
        hidream_grid,
        2,
        **_IMAGE,
    ),
    "hunyuan_image": Family(
        lambda: d.HunyuanImageTransformer2DModel(
            **{**HUNYUAN, "num_layers": 1, "rope_axes_dim": (8, 8)}, num_single_layers=2, text_embed_2_dim=DIM
        ),
        hunyuan_image,
        lambda s: [TokenGrid(*s, text=WORDS + 6)],
        3,
        patch=(1, 1, 1),
        **_IMAGE,
    ),
}
