"""minireel, the model in the box: a small trained text-to-video model in diffusers' `WanPipeline` format.

    from sparsereel import minireel
    pipe = minireel.load()
    video = pipe("a red 3 moving right on navy").frames[0]      # (33, 96, 96, 3)

The weights lie beside this file and load offline; `WanPipeline.from_pretrained(minireel.WEIGHTS)` works as well.
`load_large` loads it for clips of 129 frames at 128 x 128, `load_causal` the variant that goes on from a cache of
earlier frames, for streaming. diffusers is imported by these three, not by importing this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsereel.minireel.sizes import LARGE, NATIVE, Size

if TYPE_CHECKING:
    from sparsereel.minireel.causal import CausalMiniReelPipeline
    from sparsereel.minireel.large import LargeMiniReelPipeline
    from sparsereel.minireel.pipeline import MiniReelPipeline

__all__ = [
    "CAUSAL_WEIGHTS",
    "LARGE",
    "NATIVE",
    "WEIGHTS",
    "CausalMiniReelPipeline",
    "LargeMiniReelPipeline",
    "MiniReelPipeline",
    "Size",
    "load",
    "load_causal",
    "load_large",
]

WEIGHTS = Path(__file__).parent / "weights"
CAUSAL_WEIGHTS = WEIGHTS / "causal_transformer"


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


def load_large(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> LargeMiniReelPipeline:
    """Load minireel for clips of the size `LARGE`: call it with a prompt alone.

    The weights are those of `load`; a latent frame counts as a quarter of a rotary position, so that time runs four
    times as slowly and clips of four times the trained length are sound. Not for native clips.

    Args:
        dtype, device: As for `load`.

    Raises:
        ValueError: dtype is not float32, bfloat16 or float16.
    """
    from sparsereel.minireel.large import load_large_folder

    return load_large_folder(WEIGHTS, dtype, device)


def load_causal(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", weights: Path = CAUSAL_WEIGHTS
) -> CausalMiniReelPipeline:
    """Load the causal minireel from the package, without network: text encoder, VAE and prompts are minireel's.

    Its chunks of three latent frames see at most nine, themselves included; `sparsereel.minireel.rollout` shows how it
    is run.

    Args:
        dtype, device: As for `load`.
        weights: Folder of the transformer, to use one that training just wrote.

    Raises:
        ValueError: dtype is not float32, bfloat16 or float16, or `weights` holds no transformer.
    """
    from sparsereel.minireel.causal import load_causal_folder

    return load_causal_folder(WEIGHTS, Path(weights), dtype, device)


def __getattr__(name: str) -> Any:
    # The classes live on diffusers, which takes seconds to import.
    if name == "CausalMiniReelPipeline":
        from sparsereel.minireel.causal import CausalMiniReelPipeline

        return CausalMiniReelPipeline
    if name == "LargeMiniReelPipeline":
        from sparsereel.minireel.large import LargeMiniReelPipeline

        return LargeMiniReelPipeline
    if name == "MiniReelPipeline":
        from sparsereel.minireel.pipeline import MiniReelPipeline

        return MiniReelPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
