"""Tiny random models of the families beyond those in tiny_models.py, with inputs made from the grid they are to have.

Each case states its grid by hand, from the model's own code, so that a test can hold the family's rule against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparsereel import TokenGrid
from sparsereel.grid import Segment

BATCH, WORDS, DIM = 2, 8, 12
Shape = tuple[int, int, int]
VIDEOS: tuple[Shape, Shape] = (3, 8, 12), (3, 9, 11)
IMAGES: tuple[Shape, Shape] = (1, 16, 18), (1, 17, 19)
#: two heads of 16
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


@dataclass(frozen=True)
class Family:
    """One model.

    Attributes:
        build: makes the model.
        inputs: forward arguments from (frames, height, width) in tokens.
        grids: token grids of the sequences that self-attention sees, in the order in which they first appear.
        layers: self-attention layers.
        shapes: an even and an odd size.
        latents: name of the argument that holds the latents.
        patch: latent sizes of a token (frames, height, width); None for packed tokens.
        frames_at: axis of the frames in the latents; None without.
        calls: attention calls of one layer in a forward.
        pixels: whether a token of the first layer depends on its own pixels alone.
        before: packed tokens that stand before the grid's.
    """

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[Shape], dict[str, Any]]
    grids: Callable[[Shape], list[TokenGrid]]
    layers: int
    shapes: tuple[Shape, Shape] = VIDEOS
    latents: str = "hidden_states"
    patch: Shape | None = (1, 2, 2)
    frames_at: int | None = 2
    calls: int = 1
    pixels: bool = True
    before: Callable[[Shape], int] = lambda shape: 0

    def model(self) -> torch.nn.Module:
        torch.manual_seed(1)
        model = self.build().eval()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    # Attention is nearly uniform at the usual initialisation, which would hide a wrong mask.
                    parameter.mul_(1.5)
                if parameter.ndim >= 1 and float(parameter.abs().max()) == 0:
                    # Zero-initialised outputs and gates would hide everything.
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model

    def touched(self, inputs: dict[str, Any], shape: Shape, place: Shape) -> dict[str, Any]:
        """The inputs with other values under one token."""
        t, h, w = place
        given = inputs[self.latents]
        latents = [x.clone() for x in given] if isinstance(given, list) else given.clone()
        if self.patch is None:
            latents[:, self.before(shape) + (t * shape[1] + h) * shape[2] + w] += 1
        else:
            (p_t, p_h, p_w), frames = self.patch, self.frames_at
            for sample in latents:
                where = sample if frames is None else sample.movedim(frames - 1, 0)[t * p_t]
                where[..., h * p_h, w * p_w] += 1
        return {**inputs, self.latents: latents}


HUNYUAN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": DIM,
    "rope_axes_dim": (4, 6, 6),
}


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steps() -> torch.Tensor:
    return torch.tensor([500.0, 500.0])


def prompt(words: int = WORDS, dim: int = DIM, seed: int = 4) -> torch.Tensor:
    return noise(BATCH, words, dim, seed=seed)


def short(words: int = WORDS, *lengths: int) -> torch.Tensor:
    """Prompt mask whose samples keep so many tokens; the first five of the first by default."""
    return (torch.arange(words) < torch.tensor(lengths or (5, words))[:, None]).long()


def patched(shape: Shape, channels: int, patch: int = 2) -> torch.Tensor:
    """Video latents (B, C, F, H, W)."""
    return noise(BATCH, channels, shape[0], patch * shape[1], patch * shape[2])


def flat(shape: Shape, channels: int, patch: int = 2) -> torch.Tensor:
    """Image latents (B, C, H, W)."""
    return noise(BATCH, channels, patch * shape[1], patch * shape[2])


def packed(shape: Shape, channels: int, more: int = 0) -> torch.Tensor:
    return noise(BATCH, shape[0] * shape[1] * shape[2] + more, channels)


def places(shape: Shape, number: int = 0, axes: int = 3) -> torch.Tensor:
    """Position numbers of one image's tokens."""
    ids = torch.zeros(shape[1], shape[2], axes)
    ids[..., 0] = number
    ids[..., 1] += torch.arange(shape[1])[:, None]
    ids[..., 2] += torch.arange(shape[2])
    return ids.flatten(0, 1)


def alone(shape: Shape) -> list[TokenGrid]:
    return [TokenGrid(*shape)]


def text_first(shape: Shape) -> list[TokenGrid]:
    return [TokenGrid(*shape, text=WORDS, text_side="before")]


def text_last(shape: Shape) -> list[TokenGrid]:
    return [TokenGrid(*shape, text=WORDS)]


def of(*parts: tuple[Any, ...]) -> TokenGrid:
    """A grid of ("kind", tokens) and ("kind", frames, height, width)."""
    made = [Segment(p[0], length=p[1]) if len(p) == 2 else Segment(p[0], *p[1:]) for p in parts]
    return TokenGrid.of(made)
