"""Load a ministill folder (the one in the package, or one that training wrote) quickly and quietly."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_folder(folder: Path, dtype: torch.dtype, device: str | torch.device) -> StableDiffusionPipeline:
    """The pipeline of a folder in `StableDiffusionPipeline` format; see `sparsereel.ministill.load`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}.")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no pipeline folder: it has no model_index.json.")
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
    # transformers draws a progress bar even for a file that loads in milliseconds.
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype).eval()
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
