"""The parts of ministill before training: U-Net, VAE, text encoder, tokenizer, scheduler.

All are stock diffusers and transformers classes, in the block layout of Stable Diffusion 1.5 with one layer a block.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from sparsereel.minireel.training.architecture import build_tokenizer as word_tokenizer
from sparsereel.minireel.training.architecture import cast, write_pipeline
from sparsereel_eval.digits import BACKGROUNDS, COLOURS

LATENT_CHANNELS = 4
LATENT_SIDE = 16
TEXT_WIDTH = 64
PROMPT_TOKENS = 12
WORDS = ("a", "on", *map(str, range(10)), *COLOURS, *BACKGROUNDS)


def build_unet(channels: tuple[int, int, int, int] = (40, 64, 80, 80)) -> UNet2DConditionModel:
    """Four levels of 16, 8, 4 and 2 cells a side; attention in all but the last, and in the middle."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        # By a historical slip of diffusers this is the number of heads.
        attention_head_dim=2,
        norm_num_groups=8,
    )


def build_vae(channels: tuple[int, int, int] = (16, 32, 32)) -> AutoencoderKL:
    """Four channels for 4 x 4 pixels; no attention, so that it works alike at every size."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=4 * LATENT_SIDE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def build_text_encoder(layers: int = 2) -> CLIPTextModel:
    """A small CLIP text model, trained together with the U-Net."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=32,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=PROMPT_TOKENS,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, padded to 12."""
    return word_tokenizer(WORDS, PROMPT_TOKENS)


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, brought down to no signal at all at its end.

    A background is one flat colour: with some signal left at the last step, as SD 1.5 has, sampling from pure noise
    would start from a mean colour that training never showed.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def tokenise(prompts: list[str]) -> torch.Tensor:
    """Token ids of prompts, (N, 12) int64."""
    batch = build_tokenizer()(prompts, padding="max_length", max_length=PROMPT_TOKENS, truncation=True)
    return torch.tensor(batch["input_ids"])


def export(
    folder: Path,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    vae: AutoencoderKL,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a folder that stock `StableDiffusionPipeline` loads: safetensors, U-Net and VAE stored in `dtype`.

    The text encoder stays in fp32: transformers loads what is stored, diffusers fp32, and the two must agree.
    """
    pipeline = StableDiffusionPipeline(
        vae=cast(vae, AutoencoderKL.from_config(_without_path(vae)), dtype),
        text_encoder=cast(text_encoder, CLIPTextModel(text_encoder.config), torch.float32),
        tokenizer=build_tokenizer(),
        unet=cast(unet, UNet2DConditionModel.from_config(_without_path(unet)), dtype),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    write_pipeline(pipeline, folder)


def _without_path(model: AutoencoderKL | UNet2DConditionModel) -> dict:
    """A configuration that does not say where the weights once lay."""
    return {key: value for key, value in model.config.items() if key != "_name_or_path"}
