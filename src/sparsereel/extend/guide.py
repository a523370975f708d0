"""A picture of the trained size leads the large one: made first, enlarged, and mixed in while the large one is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsereel.extend.views import cosine


@dataclass(frozen=True)
class Guide:
    """How the enlarged small result enters. With z the large latents after a step, g the enlarged small ones, noised to
    the same level, and c = (1 + cos(pi step / steps)) / 2:

        skip      z <- c^p g + (1 - c^p) z                        DemoFusion's skip residual (arXiv 2311.16973)
        lowpass   z <- z + c^p (LP(g) - LP(z))                    after C-Upscale's global structure prior (2505.16976)
        start     the run begins at noise level `strength` from g SDEdit (2108.01073), FreeSwim's 2nd pass (2511.14712)

    LP is the mean over cells of the ratio's size, brought back bilinearly. C-Upscale's own filter and schedule are not
    published.

    Args:
        mode: see above.
        power: p; DemoFusion's 3.
        strength: share of the steps that the large run keeps in mode "start"; FreeSwim's 0.7.
        through: "pixels" enlarges decoded frames and encodes them again, "latents" enlarges latents.
        stages: sizes on the way: 1 goes to the target at once, n goes there in n equal ratios, each led by the one
            before (DemoFusion's progressive upscaling).

    Raises:
        ValueError: an unknown mode, a power or number of stages that is not positive, a strength outside (0, 1].
    """

    mode: Literal["skip", "lowpass", "start"] = "skip"
    power: float = 3.0
    strength: float = 0.7
    through: Literal["pixels", "latents"] = "latents"
    stages: int = 1

    name: ClassVar[str] = "guide"

    def __post_init__(self) -> None:
        if self.mode not in ("skip", "lowpass", "start") or self.through not in ("pixels", "latents"):
            raise ValueError(
                "a guide takes mode 'skip', 'lowpass' or 'start' and goes through 'pixels' or 'latents', "
                f"got {self.mode!r} and {self.through!r}"
            )
        if self.power <= 0 or self.stages < 1 or not 0 < self.strength <= 1:
            raise ValueError(
                "a guide needs a positive power, at least one stage and a strength in (0, 1], "
                f"got {self.power}, {self.stages} and {self.strength}"
            )

    def first_step(self, total: int) -> int:
        """Steps that a run of `total` leaves out."""
        return total - max(1, min(total, round(total * self.strength))) if self.mode == "start" else 0

    def blend(self, latents: Tensor, noised: Tensor, step: int, total: int, cell: tuple[int, int]) -> Tensor:
        """Latents that enter step number `step`, led by the noised guide.

        Args:
            cell: rows and columns that one cell of the small result became.
        """
        if self.mode == "start" or step >= total:
            return latents
        share = cosine(step, total) ** self.power
        noised = noised.to(latents)
        if self.mode == "skip":
            return share * noised + (1 - share) * latents
        return latents + share * (low_pass(noised, cell) - low_pass(latents, cell))


def low_pass(x: Tensor, cell: tuple[int, int]) -> Tensor:
    """(..., H, W): means over cells, brought back bilinearly."""
    flat = x.float().flatten(0, -3).unsqueeze(0)
    small = F.avg_pool2d(flat, cell, ceil_mode=True, count_include_pad=False)
    return F.interpolate(small, size=x.shape[-2:], mode="bilinear", align_corners=False).view(x.shape).to(x.dtype)


def enlarge(latents: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., H, W) to rows and columns of `size`, bicubically, frame by frame."""
    flat = latents.float().flatten(0, -3).unsqueeze(0)
    out = F.interpolate(flat, size=size, mode="bicubic", align_corners=False)
    return out.view(*latents.shape[:-2], *size).to(latents.dtype)


def enlarge_pixels(vae: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """The same by way of decoded frames: decode, enlarge bilinearly, encode; the VAE's scaling undone and put back."""
    mean, scale = statistics_of(vae, latents)
    with torch.no_grad():
        frames = vae.decode((latents / scale + mean).to(vae.dtype), return_dict=False)[0].float()
        factor = frames.shape[-1] // latents.shape[-1]
        flat = frames.flatten(0, -3).unsqueeze(0)
        grown = F.interpolate(flat, size=(size[0] * factor, size[1] * factor), mode="bilinear", align_corners=False)
        grown = grown.view(*frames.shape[:-2], *grown.shape[-2:]).clamp(-1, 1)
        found = vae.encode(grown.to(vae.dtype)).latent_dist.mode()
    return ((found.float() - mean) * scale).to(latents.dtype)


def statistics_of(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, scale) such that latents = (encoded - mean) * scale."""
    config = vae.config
    if getattr(config, "latents_mean", None) is not None and latents.ndim == 5:
        shape = (1, -1, 1, 1, 1)
        mean = torch.tensor(config.latents_mean, device=latents.device).view(shape)
        return mean, 1.0 / torch.tensor(config.latents_std, device=latents.device).view(shape)
    shift = getattr(config, "shift_factor", None) or 0.0
    return torch.tensor(shift, device=latents.device), torch.tensor(config.scaling_factor, device=latents.device)
