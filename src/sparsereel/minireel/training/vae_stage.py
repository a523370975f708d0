"""Train the VAE on small crops around the ink, any handwriting and any motion.

Loss: L1 + squared error, ink counting six times, plus a slight pull of the posterior towards a normal distribution. The
crops grow during the stage from single frames of 32 pixels to 17 frames of 64.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from sparsereel.arithmetic import arithmetic
from sparsereel.minireel.training.clip_sets import encode_mean, to_model_range
from sparsereel.minireel.training.optim import MovingAverage, Muon, warm_up_and_decay
from sparsereel.minireel.training.resumable import Resumable
from sparsereel_eval.digits import render, sample_clip

MUON_RATE = 2e-3
ADAMW_RATE = 4e-4
KL_WEIGHT = 1e-4
INK_WEIGHT = 5.0
CANVAS, FRAMES = 64, 17
# Crops as (pixels, frames, batch), by the share of the stage until which they are drawn.
CROPS = (
    (0.04, ((32, 1, 32),)),
    (0.25, ((32, 5, 16),)),
    (0.75, ((32, 5, 16), (32, 9, 10), (48, 5, 8))),
    (1.01, ((32, 9, 10), (48, 5, 8), (48, 9, 4), (64, 9, 3), (64, 17, 2))),
)


def render_pool(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips (N, 3, 17, 64, 64) uint8 and their ink (N, 17, 64, 64) uint8, to crop from."""
    rng = np.random.default_rng(seed)
    videos, inks = [], []
    for _ in range(count):
        clip = sample_clip(rng, frames=FRAMES, height=CANVAS, width=CANVAS, images="train", two=0.35, any_motion=True)
        video, ink = render(clip)
        videos.append(torch.from_numpy(video).permute(3, 0, 1, 2))
        inks.append(torch.from_numpy((ink * 255).astype(np.uint8)))
    return torch.stack(videos), torch.stack(inks)


class VaeTrainer(Resumable):
    """The stage's training state; `pool` is what `render_pool` returns."""

    def __init__(self, vae: AutoencoderKLWan, pool: tuple[torch.Tensor, torch.Tensor], seed: int = 0):
        self.vae, self.pool = vae.train(), pool
        self.parameters = list(vae.parameters())
        kernels = [p for p in self.parameters if p.ndim >= 4 and p.shape[0] > 1 and p[0].numel() > 1]
        chosen = {id(p) for p in kernels}
        self.muon = Muon(kernels, weight_decay=0.0)
        rest = [p for p in self.parameters if id(p) not in chosen]
        self.adamw = torch.optim.AdamW(rest, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=1e-3)
        self.average = MovingAverage(self.parameters)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0
        self.losses: dict[str, float] = {}

    def step(self, progress: float) -> None:
        """One update; `progress` is the share of the stage that is done."""
        crops = next(crops for until, crops in CROPS if progress < until)
        pixels, frames, batch = crops[self._draw(len(crops))]
        video, ink = self._draw_batch(pixels, frames, batch)
        error, divergence = self._losses(video, ink)
        self.vae.zero_grad(set_to_none=True)
        (error + KL_WEIGHT * divergence).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if torch.isfinite(norm):
            factor = warm_up_and_decay(self.steps, progress, hold=0.5)
            for group in self.adamw.param_groups:
                group["lr"] = ADAMW_RATE * factor
            self.adamw.step()
            self.muon.step(MUON_RATE * factor)
            self.average.update(self.steps + 1)
        self.steps += 1
        self.losses["error"] = 0.98 * self.losses.get("error", error.item()) + 0.02 * error.item()

    def _losses(self, video: torch.Tensor, ink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        noise_seed = self._draw(2**31)
        with torch.autocast(video.device.type, torch.bfloat16, enabled=arithmetic() == torch.bfloat16):
            posterior = self.vae.encode(video).latent_dist
            latents = posterior.sample(torch.Generator().manual_seed(noise_seed))
            decoded = decode_unclamped(self.vae, latents)
        difference = decoded.float() - video
        weight = 1 + INK_WEIGHT * F.max_pool3d(ink[:, None], (1, 3, 3), 1, (0, 1, 1))
        error = (weight * (difference.abs() + difference.square())).mean()
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return error, divergence

    def _draw(self, limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=self.generator))

    def _draw_batch(self, pixels: int, frames: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops (B, 3, F, P, P) in [-1, 1] and their ink (B, F, P, P) in [0, 1], all mirrored or reversed alike."""
        pairs = [self._draw_crop(pixels, frames) for _ in range(batch)]
        video = torch.stack([video for video, _ in pairs]).float() / 127.5 - 1
        ink = torch.stack([ink for _, ink in pairs]).float() / 255
        for axis in (-1, -2, -3):
            if self._draw(2):
                video, ink = video.flip(axis), ink.flip(axis)
        return video, ink

    def _draw_crop(self, pixels: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        videos, inks = self.pool
        index, first = self._draw(len(videos)), self._draw(FRAMES - frames + 1)
        places = inks[index, first + frames // 2].nonzero()
        # One crop in ten may be anywhere: plain background is part of the world too.
        if len(places) and self._draw(10):
            centre = places[self._draw(len(places))]
        else:
            centre = torch.tensor([self._draw(CANVAS), self._draw(CANVAS)])
        spread = pixels // 3
        top, left = (
            min(max(int(c) - pixels // 2 + self._draw(2 * spread + 1) - spread, 0), CANVAS - pixels) for c in centre
        )
        window = (slice(first, first + frames), slice(top, top + pixels), slice(left, left + pixels))
        return videos[(index, slice(None), *window)], inks[(index, *window)]


def decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """`vae.decode` without its clamp to [-1, 1], which has no gradient outside."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    parts = []
    for frame in range(hidden.shape[2]):
        vae._conv_idx = [0]
        parts.append(
            vae.decoder(
                hidden[:, :, frame : frame + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=frame == 0,
            )
        )
    vae.clear_cache()
    return unpatchify(torch.cat(parts, 2), vae.config.patch_size)


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, count: int, seed: int) -> None:
    """Write each latent channel's mean and deviation over rendered clips into the VAE's configuration."""
    rng = np.random.default_rng(seed)
    total, squares, cells = torch.zeros(1), torch.zeros(1), 0
    for _ in range(count):
        clip = sample_clip(rng, frames=FRAMES, height=CANVAS, width=CANVAS)
        latents = encode_mean(vae, to_model_range(render(clip)[0])[None])[0].flatten(1).double()
        total, squares, cells = total + latents.sum(1), squares + latents.square().sum(1), cells + latents.shape[1]
    mean = total / cells
    deviation = (squares / cells - mean.square()).sqrt()
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())


@torch.no_grad()
def held_out_psnr(vae: AutoencoderKLWan, count: int = 16) -> float:
    """PSNR in dB of reconstructions of clips with handwriting never trained on."""
    rng = np.random.default_rng(101)
    values = []
    for _ in range(count):
        clip = sample_clip(rng, frames=FRAMES, height=CANVAS, width=CANVAS, images="test", two=0.35, any_motion=True)
        video = to_model_range(render(clip)[0])[None]
        with torch.autocast("cpu", torch.bfloat16, enabled=arithmetic() == torch.bfloat16):
            decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample
        error = ((decoded.float() - video) / 2).square().mean()
        values.append(-10 * torch.log10(error))
    return float(torch.stack(values).mean())
