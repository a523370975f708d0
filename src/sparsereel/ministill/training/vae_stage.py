"""Train the VAE on pictures with any handwriting, first on crops, then whole.

Loss: L1 + squared error, ink counting six times, plus a slight pull of the posterior towards a normal distribution.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from sparsereel.ministill import SIDE
from sparsereel.ministill.training.pictures import to_pixels
from sparsereel.ministill.training.trainer import MuonTrainer
from sparsereel_eval.digits import render
from sparsereel_eval.stills import sample_still

MUON_RATE = 2e-3
ADAMW_RATE = 4e-4
KL_WEIGHT = 1e-4
INK_WEIGHT = 5.0
# Kernels from or to pixels and latents have too few rows to be orthogonal in any useful sense.
NARROW = 8
# (pixels, batch) until this share of the stage. Group norms see a whole picture's statistics only in the second part.
CROPS = ((0.5, (32, 24)), (1.01, (SIDE, 8)))


def render_pool(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (N, 3, 64, 64) uint8 and their ink (N, 1, 64, 64) uint8."""
    rng = np.random.default_rng(seed)
    pictures, inks = [], []
    for _ in range(count):
        picture, ink = render(sample_still(rng, SIDE, images="train", anywhere=True))
        pictures.append(torch.from_numpy(picture[0]).permute(2, 0, 1))
        inks.append(torch.from_numpy((ink * 255).astype(np.uint8)))
    return torch.stack(pictures), torch.stack(inks)


class VaeTrainer(MuonTrainer):
    """The stage's training state; `pool` is what `render_pool` returns."""

    def __init__(self, vae: AutoencoderKL, pool: tuple[torch.Tensor, torch.Tensor], seed: int = 0):
        self.vae, self.pool = vae.train(), pool
        super().__init__(
            vae.parameters(),
            [p for p in vae.parameters() if p.ndim == 4 and min(p.shape[:2]) > NARROW],
            (MUON_RATE, ADAMW_RATE),
            hold=0.5,
            decay=0.995,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            seed=seed,
        )

    def step(self, progress: float) -> None:
        """One update; `progress` is the share of the stage that is done."""
        pixels, batch = next(crop for until, crop in CROPS if progress < until)
        pictures, ink = self._draw_batch(pixels, batch)
        error, divergence = self._losses(pictures, ink)
        self.update(error + KL_WEIGHT * divergence, progress)
        self.note("error", error.item())

    def _losses(self, pictures: torch.Tensor, ink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = self.vae.encode(pictures).latent_dist
        decoded = self.vae.decode(posterior.sample(self.generator)).sample
        difference = decoded - pictures
        weight = 1 + INK_WEIGHT * F.max_pool2d(ink, 3, 1, 1)
        error = (weight * (difference.abs() + difference.square())).mean()
        mean, log_variance = posterior.mean, posterior.logvar
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return error, divergence

    def _draw_batch(self, pixels: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops (B, 3, P, P) in [-1, 1] and their ink (B, 1, P, P) in [0, 1]."""
        pairs = [self._draw_crop(pixels) for _ in range(batch)]
        pictures = torch.stack([picture for picture, _ in pairs]).float() / 127.5 - 1
        return pictures, torch.stack([ink for _, ink in pairs]).float() / 255

    def _draw_crop(self, pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
        pictures, inks = self.pool
        index, top, left = (self._draw(limit) for limit in (len(pictures), *[SIDE - pixels + 1] * 2))
        window = (slice(None), slice(top, top + pixels), slice(left, left + pixels))
        return pictures[(index, *window)], inks[(index, *window)]

    def _draw(self, limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=self.generator))


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, count: int, seed: int) -> None:
    """Give latents mean 0 and deviation 1 a channel, over rendered pictures, by changing the 1x1 convolutions.

    `StableDiffusionPipeline` knows one factor for all channels and no mean; folded into the weights, both are exact.
    """
    rng = np.random.default_rng(seed)
    pictures = torch.stack([to_pixels(sample_still(rng, SIDE)) for _ in range(count)])
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(32)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    into, out = vae.quant_conv, vae.post_quant_conv
    # The convolution back comes first: it must see what it saw before.
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= deviation.view(1, -1, 1, 1)
    into.bias[:channels] = (into.bias[:channels] - mean) / deviation
    into.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    into.bias[channels:] -= 2 * deviation.log()


@torch.no_grad()
def held_out_psnr(vae: AutoencoderKL, count: int = 64) -> float:
    """PSNR in dB of reconstructions of pictures with handwriting never trained on."""
    rng = np.random.default_rng(101)
    values = []
    for _ in range(count):
        picture = to_pixels(sample_still(rng, SIDE, images="test"))[None]
        decoded = vae.decode(vae.encode(picture).latent_dist.mode()).sample
        values.append(-10 * torch.log10(((decoded - picture) / 2).square().mean()))
    return float(torch.stack(values).mean())
