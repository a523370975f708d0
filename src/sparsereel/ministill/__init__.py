"""ministill: a small trained text-to-image U-Net in diffusers' `StableDiffusionPipeline` format.

    from sparsereel import ministill
    pipe = ministill.load()
    picture = pipe("a red 3 on navy", **ministill.CALL).images[0]      # 64 x 64

It exists so that methods for U-Nets (HiDiffusion at 128 and 256 pixels) can be tried, and judged, without a download.
The weights lie beside this file; `StableDiffusionPipeline.from_pretrained(ministill.WEIGHTS)` works as well. diffusers
is imported by `load`, not by importing this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

__all__ = ["CALL", "SIDE", "WEIGHTS", "load"]

WEIGHTS = Path(__file__).parent / "weights"
#: Side of the pictures it was trained on, in pixels.
SIDE = 64
#: Arguments of the call that the model card's figures were made with.
CALL: dict[str, float] = {"num_inference_steps": 30, "guidance_scale": 3.0}


def load(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", weights: Path = WEIGHTS
) -> StableDiffusionPipeline:
    """Load ministill from the package, without network.

    Args:
        dtype: Arithmetic of all three models; the stock pipeline wants one for all.
        device: Where the pipeline goes.
        weights: Another pipeline folder, to use one that training just wrote.

    Raises:
        ValueError: dtype is not float32, bfloat16 or float16, or `weights` is no pipeline folder.
    """
    from sparsereel.ministill.loading import load_folder

    return load_folder(Path(weights), dtype, device)
