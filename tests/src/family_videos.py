"""Tiny video models for test_families.py."""

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
    noise,
    of,
    packed,
    patched,
    prompt,
    short,
    steps,
    text_first,
)

from sparsereel import TokenGrid

_IMAGE = {"shapes": IMAGES, "frames_at": None}
_PACKED = {"patch": None}

# ------------------------------------------------------------------ video

WAN = {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": DIM, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}


def wan(shape: Shape) -> dict[str, Any]:
    return {"hidden_states": patched(shape, 4), "timestep": steps(), "encoder_hidden_states": prompt()}


def wan_animate() -> torch.nn.Module:
    return d.WanAnimateTransformer3DModel(
        **{**WAN, "in_channels": 12},
        latent_channels=4,
        image_dim=16,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


def wan_animate_inputs(shape: Shape) -> dict[str, Any]:
    return {
        **wan(shape),
        "hidden_states": patched(shape, 12),
        "encoder_hidden_states_image": noise(BATCH, 5, 16),
        "pose_hidden_states": patched((shape[0] - 1, *shape[1:]), 4),
        "face_pixel_values": noise(BATCH, 3, 4 * (shape[0] - 2) + 1, 16, 16),
    }


def ltx(shape: Shape) -> dict[str, Any]:
    sizes = dict(zip(("num_frames", "height", "width"), shape, strict=True))
    return {
        "hidden_states": packed(shape, 4),
        "timestep": steps(),
        **sizes,
        "encoder_hidden_states": prompt(),
        "encoder_attention_mask": short(),
    }


def ltx_conditions(shape: Shape) -> dict[str, Any]:
    """A still of the video's size at time 0, then the video: only coordinates say so."""
    axes = [8.0 * torch.arange(size) for size in shape]
    still = torch.cartesian_prod(*(axis[: 1 if n == 0 else None] for n, axis in enumerate(axes)))
    where = torch.cat([still, torch.cartesian_prod(*axes)]).T.expand(BATCH, -1, -1)
    inputs = {**ltx(shape), "num_frames": None, "height": None, "width": None}
    return {**inputs, "hidden_states": packed(shape, 4, shape[1] * shape[2]), "video_coords": where}


def ltx2(shape: Shape) -> dict[str, Any]:
    sound = {
        "audio_hidden_states": noise(BATCH, 5, 4, seed=8),
        "audio_encoder_hidden_states": prompt(seed=9),
        "audio_encoder_attention_mask": short(),
        "audio_num_frames": 5,
    }
    return {**ltx(shape), **sound, "fps": 24.0}


def hunyuan15(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": patched(shape, 4, 1),
        "timestep": steps(),
        "encoder_hidden_states": prompt(),
        "encoder_attention_mask": short(),
        "encoder_hidden_states_2": prompt(6, seed=5),
        "encoder_attention_mask_2": short(6, 6, 2),
        "image_embeds": noise(BATCH, 4, 10, seed=6),
    }


def framepack(shape: Shape) -> dict[str, Any]:
    past = {f"latents_{n}": patched((f, *shape[1:]), 4) for n, f in FRAMES_BEFORE.items()}
    numbers = {f"indices_latents_{n}": torch.arange(f) for n, f in FRAMES_BEFORE.items()}
    return {
        "hidden_states": patched(shape, 4),
        "timestep": steps(),
        **past,
        **numbers,
        "encoder_hidden_states": prompt(),
        "encoder_attention_mask": short(),
        "pooled_projections": noise(BATCH, 8),
        "image_embeds": noise(BATCH, 4, 10, seed=6),
        "guidance": torch.tensor([6000.0, 6000.0]),
        "indices_latents": torch.arange(shape[0]),
    }


FRAMES_BEFORE = {"clean": 2, "history_2x": 2, "history_4x": 4}


def framepack_grid(shape: Shape) -> list[TokenGrid]:
    half = -(-shape[1] // 2) * -(-shape[2] // 2)
    quarter = -(-shape[1] // 4) * -(-shape[2] // 4)
    history = quarter + half + 2 * shape[1] * shape[2]
    return [of(("condition", history), ("video", *shape), ("text", WORDS + 4))]


def cosmos(shape: Shape) -> dict[str, Any]:
    return {**wan(shape), "padding_mask": torch.zeros(1, 1, 2 * shape[1], 2 * shape[2]), "fps": 16}


def mochi(shape: Shape) -> dict[str, Any]:
    return {**wan(shape), "encoder_attention_mask": short().bool(), "encoder_hidden_states": prompt(dim=16)}


def allegro(shape: Shape) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    sizes = {"crops_coords": ((0, 0), shape[1:]), "grid_size": shape[1:], "temporal_size": shape[0]}
    made = get_3d_rotary_pos_embed_allegro(24, **sizes)
    turns, axes = made[:3], [torch.arange(size) for size in shape]
    tokens = torch.cartesian_prod(*axes).T.reshape(3, 1, -1)
    return {**wan(shape), "image_rotary_emb": (turns, tuple(tokens))}


def kandinsky5(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": patched(shape, 4).movedim(1, -1),
        "encoder_hidden_states": prompt(),
        "timestep": steps(),
        "pooled_projections": noise(BATCH, 8),
        "text_rope_pos": torch.arange(WORDS),
        "visual_rope_pos": tuple(torch.arange(size) for size in shape),
    }


COGVIDEOX = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": DIM,
    "num_layers": 2,
    "sample_width": 24,
    "sample_height": 16,
    "sample_frames": 9,
    "max_text_seq_length": WORDS,
}


def frames_second(shape: Shape) -> dict[str, Any]:
    return {**wan(shape), "hidden_states": patched(shape, 4).transpose(1, 2)}


UNET = {
    "sample_size": 18,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": DIM,
    "norm_num_groups": 4,
}


def unet(shape: Shape) -> dict[str, Any]:
    words = prompt().repeat_interleave(shape[0], 0)
    return {"sample": patched(shape, 4, 1), "timestep": steps()[0], "encoder_hidden_states": words}


def svd(shape: Shape) -> dict[str, Any]:
    sample = patched(shape, 4, 1).transpose(1, 2)
    return {"sample": sample, "timestep": 0.3, "encoder_hidden_states": prompt(1), "added_time_ids": noise(BATCH, 3)}


def two_levels(shape: Shape) -> list[TokenGrid]:
    return [TokenGrid(1, *shape[1:]), TokenGrid(1, (shape[1] + 1) // 2, (shape[2] + 1) // 2)]


VIDEO_FAMILIES: dict[str, Family] = {
    "skyreels_v2": Family(lambda: d.SkyReelsV2Transformer3DModel(**WAN, rope_max_seq_len=32), wan, alone, 2),
    "chronoedit": Family(lambda: d.ChronoEditTransformer3DModel(**WAN, rope_max_seq_len=32), wan, alone, 2),
    "wan_animate": Family(wan_animate, wan_animate_inputs, alone, 2),
    "anyflow": Family(
        lambda: d.AnyFlowTransformer3DModel(**WAN, rope_max_seq_len=32),
        lambda s: {
            **frames_second(s),
            "timestep": steps()[:, None].expand(2, s[0]),
            "r_timestep": steps()[:, None].expand(2, s[0]),
        },
        alone,
        2,
        frames_at=1,
    ),
    "cosmos": Family(
        lambda: d.CosmosTransformer3DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            text_embed_dim=DIM,
            adaln_lora_dim=4,
            max_size=(8, 32, 32),
        ),
        cosmos,
        alone,
        2,
    ),
    "ltx": Family(
        lambda: d.LTXVideoTransformer3DModel(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=32, caption_channels=DIM
        ),
        ltx,
        alone,
        2,
        **_PACKED,
    ),
    "ltx_conditions": Family(
        lambda: d.LTXVideoTransformer3DModel(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=32, caption_channels=DIM
        ),
        ltx_conditions,
        lambda s: [of(("condition", s[1] * s[2]), ("video", *s))],
        2,
        before=lambda s: s[1] * s[2],
        **_PACKED,
    ),
    "ltx2": Family(
        lambda: d.LTX2VideoTransformer3DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=32,
            caption_channels=DIM,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
        ),
        ltx2,
        alone,
        2,
        **_PACKED,
    ),
    "hunyuan_video15": Family(
        lambda: d.HunyuanVideo15Transformer3DModel(**HUNYUAN, text_embed_2_dim=DIM, image_embed_dim=10),
        hunyuan15,
        lambda s: [TokenGrid(*s, text=WORDS + 6 + 4)],
        2,
        patch=(1, 1, 1),
    ),
    "hunyuan_video_framepack": Family(
        lambda: d.HunyuanVideoFramepackTransformer3DModel(
            **{**HUNYUAN, "num_layers": 1},
            num_single_layers=1,
            pooled_projection_dim=8,
            has_image_proj=True,
            image_proj_dim=10,
            has_clean_x_embedder=True,
        ),
        framepack,
        framepack_grid,
        2,
    ),
    "motif_video": Family(
        lambda: d.MotifVideoTransformer3DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=2,
            num_decoder_layers=1,
            text_embed_dim=DIM,
            image_embed_dim=10,
            rope_axes_dim=(4, 6, 6),
        ),
        lambda s: {**wan(s), "encoder_attention_mask": short(), "image_embeds": noise(BATCH, 4, 10, seed=6)},
        lambda s: [TokenGrid(*s, text=WORDS + 4), of(("video", *s), ("condition", s[0] * s[1] * s[2]))],
        3,
    ),
    "mochi": Family(
        lambda: d.MochiTransformer3DModel(
            **HEADS, num_layers=2, pooled_projection_dim=32, in_channels=4, text_embed_dim=16, time_embed_dim=8
        ),
        mochi,
        lambda s: [TokenGrid(*s, text=5), TokenGrid(*s, text=WORDS)],
        2,
        calls=BATCH,
    ),
    "allegro": Family(
        lambda: d.AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=2,
            cross_attention_dim=48,
            sample_height=24,
            sample_width=24,
            sample_frames=3,
            caption_channels=DIM,
        ),
        allegro,
        alone,
        2,
    ),
    "easyanimate": Family(
        lambda: d.EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            sample_width=24,
            sample_height=16,
            num_layers=2,
            mmdit_layers=1,
            time_embed_dim=8,
            text_embed_dim=DIM,
        ),
        wan,
        text_first,
        2,
    ),
    "consisid": Family(lambda: d.ConsisIDTransformer3DModel(**COGVIDEOX), frames_second, text_first, 2, frames_at=1),
    "kandinsky5": Family(
        lambda: d.Kandinsky5Transformer3DModel(
            model_dim=32,
            in_text_dim=DIM,
            in_text_dim2=8,
            time_dim=16,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
        ),
        kandinsky5,
        alone,
        2,
        pixels=False,
    ),
    "latte": Family(
        lambda: d.LatteTransformer3DModel(
            **HEADS,
            in_channels=4,
            num_layers=2,
            cross_attention_dim=32,
            sample_size=32,
            patch_size=2,
            caption_channels=DIM,
            video_length=2,
            norm_type="ada_norm_single",
            num_embeds_ada_norm=10,
            norm_elementwise_affine=False,
            attention_bias=True,
        ),
        lambda s: {**wan(s), "hidden_states": patched((2, *s[1:]), 4)},
        alone,
        2,
        shapes=((1, 16, 16), (1, 16, 16)),
    ),
    "animatediff": Family(
        lambda: d.UNetMotionModel(
            **UNET,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            num_attention_heads=2,
            motion_num_attention_heads=2,
            use_motion_mid_block=True,
        ),
        unet,
        two_levels,
        4,
        shapes=((2, 16, 18), (2, 17, 19)),
        latents="sample",
        pixels=False,
    ),
    "svd": Family(
        lambda: d.UNetSpatioTemporalConditionModel(
            **{**{k: v for k, v in UNET.items() if k != "norm_num_groups"}, "block_out_channels": (32, 64)},
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            num_attention_heads=(2, 2),
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            num_frames=2,
        ),
        svd,
        two_levels,
        4,
        shapes=((2, 16, 18), (2, 17, 19)),
        latents="sample",
        pixels=False,
    ),
}
