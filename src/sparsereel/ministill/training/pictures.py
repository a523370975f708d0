"""Sets of pictures and their cached latents: the U-Net never sees a pixel.

A set is rendered and encoded once into `<name>.safetensors` (latents as fp16, token ids of the prompts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

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


def draw(spec: PictureSet) -> Iterator[tuple[torch.Tensor, str]]:
    """Every picture (3, 64, 64) fp32 in [-1, 1] and its prompt, alike on every machine."""
    rng = np.random.default_rng(spec.seed)
    for _ in range(spec.count):
        side = SIDE * int(rng.choice(spec.sides)) if len(spec.sides) > 1 else SIDE * spec.sides[0]
        still = sample_still(rng, side)
        yield close_up(to_pixels(still), still, rng) if side > SIDE else to_pixels(still), still.prompt


def close_up(pixels: torch.Tensor, still: Clip, rng: np.random.Generator) -> torch.Tensor:
    """A window of native size whose middle is in the digit's box, or as near to it as the picture's edge allows."""
    digit = still.digits[0]
    x, y = (int(np.clip(start + rng.uniform(0, digit.box) - SIDE / 2, 0, still.width - SIDE)) for start in digit.start)
    return pixels[:, y : y + SIDE, x : x + SIDE]


def to_pixels(still: Clip) -> torch.Tensor:
    """A description drawn: (3, H, W) fp32 in [-1, 1]."""
    return torch.from_numpy(render(still)[0][0]).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def encode_set(spec: PictureSet, vae: AutoencoderKL, folder: Path, on_picture: Callable[[int], None]) -> EncodedSet:
    """The set from its cache in `folder`, or rendered and encoded now; `on_picture` is told how many are done."""
    path = folder / f"{spec.name}.safetensors"
    if path.exists():
        tensors, facts = checkpoint.load(path)
        if facts == _facts(spec):
            return EncodedSet(tensors["latents"], tensors["ids"])
    parts, prompts = [], []
    pictures = draw(spec)
    while batch := list(islice(pictures, ENCODE_AT_ONCE)):
        parts.append(vae.encode(torch.stack([pixels for pixels, _ in batch])).latent_dist.mode().half())
        prompts += [prompt for _, prompt in batch]
        on_picture(len(prompts))
    encoded = EncodedSet(torch.cat(parts), tokenise(prompts))
    checkpoint.save(path, {"latents": encoded.latents, "ids": encoded.ids}, _facts(spec))
    return encoded


def _facts(spec: PictureSet) -> dict[str, Any]:
    """The set as JSON gives it back."""
    return asdict(spec) | {"sides": list(spec.sides)}
