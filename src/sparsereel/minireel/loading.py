"""Load a minireel folder (the one in the package, or one that training wrote) quickly and quietly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from sparsereel.minireel.pipeline import MiniReelPipeline

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_folder(folder: Path, dtype: torch.dtype, device: str | torch.device) -> MiniReelPipeline:
    """The pipeline of a folder in `WanPipeline` format; see `sparsereel.minireel.load` for the arguments."""
    check_folder(folder, dtype)
    transformer = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=dtype)
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    pipeline = MiniReelPipeline(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        text_encoder=_load_text_encoder(folder),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler"),
        transformer=transformer,
    )
    return pipeline.to(device)


def _load_text_encoder(folder: Path) -> UMT5EncoderModel:
    with no_progress_bar():
        return UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers draws a progress bar even for a file that loads in milliseconds."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def check_folder(folder: Path, dtype: torch.dtype) -> None:
    """Refuse what is no pipeline folder, and dtypes that the models in the box do not run in."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}.")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no pipeline folder: it has no model_index.json.")
