"""Decode latents to pixels as they come, in memory that does not depend on how many came before.

`CausalDecoder` walks AutoencoderKLWan's decoder frame by frame with its feature cache, which is what the VAE itself
does inside one call; the result equals decoding everything at once. `OverlapDecoder` serves other VAEs: tiles in time
that overlap, cross-faded where they do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

_REPEAT = "Rep"  # AutoencoderKLWan's own marker: the first frame has passed an upsampler, nothing is cached yet


class Decoder(ABC):
    """Turns a stream of latents into frames."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """float32 frames (F, 3, H, W) in [-1, 1] that the latents (C, T, h, w) complete; F may be 0."""

    def flush(self) -> Tensor | None:
        """What is left at the end; None = nothing."""
        return None

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint needs."""

    @abstractmethod
    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Undo `state`."""


def decoder_for(vae: Any, **options: int) -> Decoder:
    """The decoder that suits a VAE.

    Raises:
        ValueError: not a video VAE.
    """
    if type(vae).__name__ == "AutoencoderKLWan":
        return CausalDecoder(vae)
    if not hasattr(vae, "decode") or (not hasattr(vae.config, "z_dim") and not hasattr(vae.config, "latent_channels")):
        raise ValueError(f"{type(vae).__name__} is no VAE that streaming can decode with")
    return OverlapDecoder(vae, **options)


def unscale(vae: Any, latents: Tensor) -> Tensor:
    """Latents (1, C, T, h, w) as the VAE's decoder wants them: mean and deviation, or the one scaling factor."""
    config = vae.config
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and deviation is not None:
        shape = (1, -1, 1, 1, 1)
        # Written as WanPipeline computes it, so that the bits agree.
        inverse = 1.0 / torch.tensor(deviation).view(shape).to(latents)
        return latents / inverse + torch.tensor(mean).view(shape).to(latents)
    shift = getattr(config, "shift_factor", None) or 0.0
    return latents / config.scaling_factor + shift


class CausalDecoder(Decoder):
    """AutoencoderKLWan, one latent frame after another. The VAE object's own caches are not touched."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        vae.clear_cache()  # also counts the decoder's convolutions
        self.features: list[Any] = [None] * vae._conv_num
        self.started = False

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.vae
        with torch.no_grad():
            z = unscale(vae, latents.unsqueeze(0).to(vae.device, vae.dtype))
            x = vae.post_quant_conv(z)
            frames = [self._frame(x[:, :, i : i + 1]) for i in range(x.shape[2])]
            return torch.cat(frames, dim=2)[0].transpose(0, 1).float()

    def _frame(self, x: Tensor) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        first = {} if self.started else {"first_chunk": True}
        self.started = True
        out = self.vae.decoder(x, feat_cache=self.features, feat_idx=[0], **first)
        if self.vae.config.patch_size is not None:
            out = unpatchify(out, patch_size=self.vae.config.patch_size)
        return out.clamp(-1.0, 1.0)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {str(i): x for i, x in enumerate(self.features) if isinstance(x, Tensor)}
        repeats = [i for i, x in enumerate(self.features) if isinstance(x, str)]
        return tensors, {"started": self.started, "repeats": repeats}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        self.started = numbers["started"]
        self.features = [None] * len(self.features)
        for i in numbers["repeats"]:
            self.features[i] = _REPEAT
        for name, x in tensors.items():
            self.features[int(name)] = x.to(self.vae.device, self.vae.dtype)


class OverlapDecoder(Decoder):
    """Any video VAE with (1, C, T, h, w) latents, by tiles in time.

    A tile is decoded together with the `overlap` latent frames before it. The frames that both tiles made are
    cross-faded linearly; therefore the frames of a tile's last `overlap` latents are held back until the next one.

    Args:
        overlap: latent frames, at least 1. More of them hide a tile's border better and cost more.

    Raises:
        ValueError: overlap < 1.
    """

    def __init__(self, vae: Any, overlap: int = 2) -> None:
        if overlap < 1:
            raise ValueError(f"overlap must be at least 1 latent frame, got {overlap}")
        self.vae = vae
        self.overlap = overlap
        self.context: Tensor | None = None  # the last latents
        self.held: Tensor | None = None  # frames made but not yet shown

    def decode(self, latents: Tensor) -> Tensor:
        joined = latents if self.context is None else torch.cat([self.context.to(latents), latents], dim=1)
        with torch.no_grad():
            z = unscale(self.vae, joined.unsqueeze(0).to(self.vae.device, self.vae.dtype))
            out = self.vae.decode(z, return_dict=False)[0]
        frames = out[0].transpose(0, 1).float().clamp(-1.0, 1.0)
        ratio = self._frames_per_latent()
        if self.held is not None:
            # A causal VAE makes fewer frames of a tile's first latent than of the others; count from the end.
            frames = self._faded(frames, frames.shape[0] - ratio * latents.shape[1])
        self.context = joined[:, -self.overlap :].clone()
        keep = min(ratio * self.context.shape[1], frames.shape[0])
        self.held = frames[frames.shape[0] - keep :].clone()
        return frames[: frames.shape[0] - keep]

    def _faded(self, frames: Tensor, again: int) -> Tensor:
        """Those held back, the last of them blended with the first `again` frames of the new tile, and the rest."""
        assert self.held is not None
        count = min(again, self.held.shape[0])
        weight = torch.linspace(0, 1, count + 2, device=frames.device)[1:-1].view(-1, 1, 1, 1)
        blended = (1 - weight) * self.held[self.held.shape[0] - count :] + weight * frames[again - count : again]
        return torch.cat([self.held[: self.held.shape[0] - count], blended, frames[again:]])

    def _frames_per_latent(self) -> int:
        for owner in (self.vae.config, self.vae):
            for name in ("temporal_compression_ratio", "scale_factor_temporal"):
                if getattr(owner, name, None):
                    return int(getattr(owner, name))
        return 4

    def flush(self) -> Tensor | None:
        held, self.held = self.held, None
        return held

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        found = {"context": self.context, "held": self.held}
        return {name: x for name, x in found.items() if x is not None}, {}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        self.context, self.held = tensors.get("context"), tensors.get("held")
