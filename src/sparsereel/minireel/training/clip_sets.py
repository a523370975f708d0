"""Sets of rendered clips and their cached latents: the transformer never sees a pixel.

A set is rendered and encoded once into `<name>.safetensors` (normalised latents as fp16, token ids of the prompts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from sparsereel.arithmetic import arithmetic
from sparsereel.minireel.sizes import count_tokens
from sparsereel.minireel.training import checkpoint
from sparsereel.minireel.training.architecture import build_tokenizer
from sparsereel_eval.digits import Clip, render, sample_clip

PROMPT_TOKENS = 16
# Pixels times frames that go through the VAE at once: about 1 GB of activations.
ENCODE_AT_ONCE = 320_000


@dataclass(frozen=True)
class ClipSet:
    """What a set holds: `count` random clips of one size, `two` of them (share) with two digits.

    Attributes:
        starts_of: Start as clips of so many frames do, and go on bouncing to the end; None starts clips by their own
            length, which sets long ones off at the wall they move away from.
    """

    name: str
    count: int
    frames: int
    height: int
    width: int
    two: float
    seed: int
    starts_of: int | None = None

    @property
    def tokens(self) -> int:
        return count_tokens(self.frames, self.height, self.width)

    def clips(self) -> list[Clip]:
        """The descriptions, alike on every machine."""
        rng = np.random.default_rng(self.seed)
        frames = self.starts_of or self.frames
        clips = [
            sample_clip(rng, frames=frames, height=self.height, width=self.width, two=self.two)
            for _ in range(self.count)
        ]
        return [replace(clip, frames=self.frames) for clip in clips]


@dataclass(frozen=True)
class EncodedSet:
    """A set as the transformer sees it: latents (N, 16, F, H, W) fp16, prompt ids and mask (N, 16)."""

    spec: ClipSet
    latents: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor


def to_model_range(video: np.ndarray) -> torch.Tensor:
    """(F, H, W, 3) uint8 to (3, F, H, W) fp32 in [-1, 1]."""
    return torch.from_numpy(video).permute(3, 0, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_set(spec: ClipSet, vae: AutoencoderKLWan, folder: Path, on_clip: Callable[[int], None]) -> EncodedSet:
    """The set from its cache in `folder`, or rendered and encoded now; `on_clip` is told how many clips are done."""
    path = folder / f"{spec.name}.safetensors"
    if path.exists():
        tensors, facts = checkpoint.load(path)
        if facts == asdict(spec):
            return EncodedSet(spec, tensors["latents"], tensors["ids"], tensors["mask"])
    clips = spec.clips()
    at_once = max(1, ENCODE_AT_ONCE // (spec.frames * spec.height * spec.width))
    parts = []
    for start in range(0, len(clips), at_once):
        pixels = torch.stack([to_model_range(render(clip)[0]) for clip in clips[start : start + at_once]])
        parts.append(normalise(encode_mean(vae, pixels), vae).half())
        on_clip(start + len(pixels))
    prompts = tokenise([clip.prompt for clip in clips])
    encoded = EncodedSet(spec, torch.cat(parts), *prompts)
    tensors = {"latents": encoded.latents, "ids": encoded.ids, "mask": encoded.mask}
    checkpoint.save(path, tensors, asdict(spec))
    return encoded


def encode_mean(vae: AutoencoderKLWan, pixels: torch.Tensor) -> torch.Tensor:
    """Mean of the VAE's posterior: (B, 3, F, H, W) to (B, 16, (F - 1) / 4 + 1, H / 8, W / 8) fp32."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=arithmetic() == torch.bfloat16):
        return vae.encode(pixels).latent_dist.mode().float()


def normalise(latents: torch.Tensor, vae: AutoencoderKLWan) -> torch.Tensor:
    """Latents with mean 0 and deviation 1 a channel, by the statistics in the VAE's configuration."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return (latents - mean) / std


def tokenise(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of prompts, (N, 16) int64 each."""
    batch = build_tokenizer()(prompts, padding="max_length", max_length=PROMPT_TOKENS, truncation=True)
    return torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])
