"""Sets of pictures and their cached latents: the U-Net never sees a pixel.

A set is rendered and encoded once into `<name>.safetensors` (latents as fp16, token ids of the prompts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from sparsereel.minireel.training import checkpoint
from sparsereel.ministill import SIDE
from sparsereel.ministill.training.architecture import tokenise
from sparsereel.ministill.training.recipe import PictureSet
from sparsereel_eval.digits import Clip, render
from sparsereel_eval.stills import sample_still

ENCODE_AT_ONCE = 32


@dataclass(frozen=True)
class EncodedSet:
    """A set as the U-Net sees it: latents (N, 4, 16, 16) fp16, prompt ids (N, 12)."""

    latents: torch.Tensor
    ids: torch.Tensor


def describe(spec: PictureSet) -> list[Clip]:
    """The descriptions of a set, alike on every machine."""
    rng = np.random.default_rng(spec.seed)
    return [sample_still(rng, SIDE) for _ in range(spec.count)]


def to_pixels(still: Clip) -> torch.Tensor:
    """A description drawn: (3, H, W) fp32 in [-1, 1]."""
    return torch.from_numpy(render(still)[0][0]).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def encode_set(spec: PictureSet, vae: AutoencoderKL, folder: Path, on_picture: Callable[[int], None]) -> EncodedSet:
    """The set from its cache in `folder`, or rendered and encoded now; `on_picture` is told how many are done."""
    path = folder / f"{spec.name}.safetensors"
    if path.exists():
        tensors, facts = checkpoint.load(path)
        if facts == asdict(spec):
            return EncodedSet(tensors["latents"], tensors["ids"])
    stills = describe(spec)
    parts = []
    for start in range(0, len(stills), ENCODE_AT_ONCE):
        pixels = torch.stack([to_pixels(still) for still in stills[start : start + ENCODE_AT_ONCE]])
        parts.append(vae.encode(pixels).latent_dist.mode().half())
        on_picture(start + len(pixels))
    encoded = EncodedSet(torch.cat(parts), tokenise([still.prompt for still in stills]))
    checkpoint.save(path, {"latents": encoded.latents, "ids": encoded.ids}, asdict(spec))
    return encoded
