"""Find the ink in a clip: blobs a frame, their places, colours and shapes. Any canvas size.

Ink is what differs from the background, the clip's median colour. Touching strokes form a blob. A pixel's colour is
read from the direction in which it differs from the background, which stays right where ink is thin or blurred.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from sparsereel_eval.digits import BACKGROUNDS, COLOURS

# A pixel is ink where some channel differs from the background by this share of full scale.
INK_THRESHOLD = 0.17
# Smaller specks are no copy of a digit; the thinnest digit, a 1, has about 60 pixels.
SMALLEST_BLOB = 12
# Strokes up to this many pixels apart belong together.
STROKE_GAP = 3
WINDOW = 32

COLOUR_NAMES = tuple(COLOURS)
_PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255
_BACKGROUNDS = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255


@dataclass(frozen=True)
class Blob:
    """Connected ink in one frame.

    Attributes:
        area: Ink pixels.
        colour_shares: Share of its pixels nearest to each colour of `COLOUR_NAMES`.
        pixels: (N, 2) int64 (y, x) of its ink.
        colours: (N,) index into `COLOUR_NAMES` of each pixel.
    """

    area: int
    colour_shares: torch.Tensor
    pixels: torch.Tensor
    colours: torch.Tensor

    def part(self, colour: int) -> Blob:
        """Only the pixels of one colour."""
        mine = self.colours == colour
        shares = torch.zeros_like(self.colour_shares)
        shares[colour] = 1.0
        return Blob(int(mine.sum()), shares, self.pixels[mine], self.colours[mine])

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in pixels: middle of its bounding box, which unlike the mean does not depend on the shape's weight."""
        low, high = self.pixels.amin(0), self.pixels.amax(0)
        y, x = ((low + high) / 2).tolist()
        return x, y


@dataclass(frozen=True)
class Ink:
    """All ink of a clip: strength (F, H, W) in [0, 1], blobs of each frame (largest first), background's name."""

    strength: torch.Tensor
    blobs: list[list[Blob]]
    background: str

    def window(self, frame: int, blob: Blob) -> torch.Tensor:
        """The blob alone, (32, 32), centred; 1 where it is darkest."""
        x, y = blob.centre
        canvas = torch.zeros(WINDOW, WINDOW)
        at = blob.pixels - torch.tensor([round(y), round(x)]) + WINDOW // 2
        inside = ((at >= 0) & (at < WINDOW)).all(1)
        at, source = at[inside], blob.pixels[inside]
        canvas[at[:, 0], at[:, 1]] = self.strength[frame, source[:, 0], source[:, 1]]
        return canvas / canvas.max().clamp_min(1e-6)


def find_ink(video: np.ndarray | torch.Tensor) -> Ink:
    """Separate ink from background in (F, H, W, 3) uint8.

    Raises:
        ValueError: the video has another shape or type.
    """
    frames = torch.as_tensor(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(f"A video must be (frames, height, width, 3) uint8, got {tuple(frames.shape)} {frames.dtype}.")
    frames = frames.float() / 255
    background = frames.flatten(0, 2).median(0).values
    difference = frames - background
    strength = difference.abs().amax(-1)
    mask = strength > INK_THRESHOLD
    labels = _connected(mask)
    blobs = [_blobs(mask[t], labels[t], difference[t], background) for t in range(len(frames))]
    nearest = int((_BACKGROUNDS - background).square().sum(1).argmin())
    return Ink(strength, blobs, list(BACKGROUNDS)[nearest])


def _connected(mask: torch.Tensor) -> torch.Tensor:
    """Labels (F, H, W) of connected regions, frame by frame; equal label, same region; 0 off the mask.

    Every pixel starts with its own number and takes the largest of its neighbours' until nothing changes.
    """
    joined = F.max_pool2d(mask[:, None].float(), STROKE_GAP, 1, STROKE_GAP // 2)
    height, width = mask.shape[1:]
    labels = joined * torch.arange(1, height * width + 1, dtype=torch.float32).view(1, 1, height, width)
    while True:
        grown = F.max_pool2d(labels, 3, 1, 1) * joined
        if torch.equal(grown, labels):
            return labels[:, 0].long()
        labels = grown


def _blobs(mask: torch.Tensor, labels: torch.Tensor, difference: torch.Tensor, background: torch.Tensor) -> list[Blob]:
    pixels = mask.nonzero()
    found = []
    own_label = labels[pixels[:, 0], pixels[:, 1]]
    colours = _nearest_colour(difference[pixels[:, 0], pixels[:, 1]], background)
    for label in own_label.unique():
        mine = own_label == label
        area = int(mine.sum())
        if area >= SMALLEST_BLOB:
            shares = torch.bincount(colours[mine], minlength=len(COLOUR_NAMES)) / area
            found.append(Blob(area, shares, pixels[mine], colours[mine]))
    return sorted(found, key=lambda blob: -blob.area)


def _nearest_colour(difference: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Index into `COLOUR_NAMES` of each ink pixel's difference (N, 3), by angle."""
    towards = F.normalize(_PALETTE - background, dim=1)
    return (F.normalize(difference, dim=1) @ towards.T).argmax(1)
