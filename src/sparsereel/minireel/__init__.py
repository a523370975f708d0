"""minireel, the model in the box: a small trained text-to-video model in diffusers' `WanPipeline` format.

    from sparsereel import minireel
    pipe = minireel.load()
    video = pipe("a red 3 moving right on navy").frames[0]      # (33, 96, 96, 3)

The weights lie beside this file and load offline; `WanPipeline.from_pretrained(minireel.WEIGHTS)` works as well.
diffusers is imported by `load`, not by importing this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsereel.minireel.sizes import LARGE, NATIVE, Size

if TYPE_CHECKING:
    from sparsereel.minireel.pipeline import MiniReelPipeline

__all__ = ["LARGE", "NATIVE", "WEIGHTS", "MiniReelPipeline", "Size", "load"]

WEIGHTS = Path(__file__).parent / "weights"


def load(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> MiniReelPipeline:
    """Load minireel from the package, without network.

    Args:
        dtype: Arithmetic of the transformer; the VAE and the text encoder, cheap beside it, stay in fp32.
        device: Where the pipeline goes.

    Raises:
        ValueError: dtype is not float32, bfloat16 or float16.
    """
    from sparsereel.minireel.loading import load_folder

    return load_folder(WEIGHTS, dtype, device)


def __getattr__(name: str) -> Any:
    # The class lives on diffusers, which takes seconds to import.
    if name == "MiniReelPipeline":
        from sparsereel.minireel.pipeline import MiniReelPipeline

        return MiniReelPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
