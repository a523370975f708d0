"""Load a ministill folder (the one in the package, or one that training wrote) quickly and quietly."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from sparsereel.minireel.loading import check_folder, no_progress_bar


def load_folder(folder: Path, dtype: torch.dtype, device: str | torch.device) -> StableDiffusionPipeline:
    """The pipeline of a folder in `StableDiffusionPipeline` format; see `sparsereel.ministill.load`."""
    check_folder(folder, dtype)
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype),
        text_encoder=_load_text_encoder(folder, dtype),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype),
        scheduler=DDIMScheduler.from_pretrained(folder, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device)


def _load_text_encoder(folder: Path, dtype: torch.dtype) -> CLIPTextModel:
    with no_progress_bar():
        return CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype).eval()
