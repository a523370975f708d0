"""Clips of real handwritten digits that move over a plain background: minireel's world.

A `Clip` is a description (which handwriting, colour, size, path, background); `render` draws it and `Clip.prompt` says
it in words, so that the same description trains the model and tells the judge what to expect. The handwriting is
scikit-learn's bundled `load_digits` (1797 images of 8 x 8), the only data there is, imported on first use.

    clip = sample_clip(np.random.default_rng(0), frames=33, height=96, width=96)
    video, ink = render(clip)          # (33, 96, 96, 3) uint8, (33, 96, 96) fp32 in [0, 1]
    clip.prompt                        # "a red 3 moving right on navy"
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 255),
    "yellow": (240, 220, 50),
    "white": (245, 245, 245),
    "magenta": (230, 60, 220),
    "cyan": (50, 220, 230),
    "orange": (250, 140, 30),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (6, 6, 8),
    "navy": (12, 18, 62),
    "maroon": (62, 12, 20),
    "grey": (58, 58, 60),
    "forest": (10, 48, 22),
}
# Image axes: x to the right, y down.
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WORDS = ("a", "and", "on", "moving", *map(str, range(10)), *COLOURS, *BACKGROUNDS, *DIRECTIONS)

# Handwritings are split, not their renderings: what tests see was never drawn in training.
TRAINING_IMAGES = 1500
# Starts lie on this grid (pixels), so that a digit sits at few places inside a latent cell: far less to learn.
START_GRID = 4
# A named direction holds for at least this share of the clip before a wall turns the digit round.
STRAIGHT_SHARE = 0.6


@dataclass(frozen=True)
class Digit:
    """One moving digit. `start` and `velocity` are (x, y) of its box's corner, in pixels and pixels a frame."""

    image: int
    value: int
    colour: str
    box: int
    start: tuple[float, float]
    velocity: tuple[float, float]
    direction: str | None = None

    @property
    def words(self) -> str:
        return f"a {self.colour} {self.value}" + (f" moving {self.direction}" if self.direction else "")


@dataclass(frozen=True)
class Clip:
    """A clip's full description; sizes in frames and pixels."""

    digits: tuple[Digit, ...]
    background: str
    frames: int
    height: int
    width: int

    @property
    def prompt(self) -> str:
        return " and ".join(digit.words for digit in self.digits) + f" on {self.background}"

    def track(self, digit: Digit) -> np.ndarray:
        """Top left corner of the digit's box in every frame: (F, 2) as (x, y), bouncing between the walls."""
        time = np.arange(self.frames)
        rooms = (self.width - digit.box, self.height - digit.box)
        return np.stack([_bounce(digit.start[i], digit.velocity[i], time, rooms[i]) for i in (0, 1)], 1)


@cache
def handwriting() -> tuple[torch.Tensor, np.ndarray]:
    """All images (1797, 8, 8) fp32 in [0, 1] and their labels (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32) / 16, np.asarray(data.target)


@cache
def split(name: str, per_digit: int = 3) -> np.ndarray:
    """Indices of handwritings: "train" (1500), "test" (the other 297), or "typical".

    "typical" holds the `per_digit` training images nearest to each digit's mean: so little variety that a model of
    seven million parameters learns it in hours on two cores.
    """
    images, labels = handwriting()
    order = np.random.default_rng(0).permutation(len(labels))
    if name == "train":
        return order[:TRAINING_IMAGES]
    if name == "test":
        return order[TRAINING_IMAGES:]
    if name != "typical":
        raise ValueError(f"The split must be train, test or typical, got {name!r}.")
    chosen: list[int] = []
    for value in range(10):
        own = order[:TRAINING_IMAGES][labels[order[:TRAINING_IMAGES]] == value]
        flat = images[own].flatten(1)
        nearest = (flat - flat.mean(0)).square().sum(1).argsort()[:per_digit]
        chosen += own[nearest.numpy()].tolist()
    return np.array(chosen)


def sample_clip(
    rng: np.random.Generator,
    *,
    frames: int,
    height: int,
    width: int,
    images: str = "typical",
    two: float = 0.15,
    named: float = 0.85,
    any_motion: bool = False,
) -> Clip:
    """Draw a random description.

    Args:
        frames, height, width: Size of the clip; a side must hold a digit (26 pixels).
        images: Which handwritings, see `split`. "typical" are all drawn in boxes of 24 pixels, others in 20 to 25.
        two: Share of clips with two digits, of different colours.
        named: Share of clips whose prompt names the direction of motion; others go any of eight ways.
        any_motion: Starts and speeds are continuous instead of on a grid; the VAE is trained so, to hold any motion.
    """
    if min(height, width) < 26:
        raise ValueError(f"A clip must be at least 26 x 26 pixels to hold a digit, got {height} x {width}.")
    count = 2 if rng.random() < two else 1
    colours = rng.choice(list(COLOURS), count, replace=False)
    is_named = rng.random() < named
    digits: list[Digit] = []
    for colour in colours:
        # Digits that start on top of each other cannot be told apart; a few tries are enough on any canvas.
        for _ in range(8):
            digit = _sample_digit(rng, str(colour), (width, height), frames, images, is_named, any_motion)
            if all(math.dist(digit.start, other.start) > digit.box for other in digits):
                break
        digits.append(digit)
    return Clip(tuple(digits), str(rng.choice(list(BACKGROUNDS))), frames, height, width)


def render(clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """Draw a clip: video (F, H, W, 3) uint8 and how much ink covers each pixel, (F, H, W) fp32 in [0, 1]."""
    video = np.empty((clip.frames, clip.height, clip.width, 3), np.float32)
    video[:] = BACKGROUNDS[clip.background]
    ink = np.zeros(video.shape[:3], np.float32)
    for digit in clip.digits:
        glyph = _glyph(digit.image, digit.box)
        colour = np.array(COLOURS[digit.colour], np.float32)
        for frame, (x, y) in enumerate(clip.track(digit)):
            shape, left, top = _shifted(glyph, x, y)
            # A shifted glyph is one pixel larger than its box; at the far walls that pixel is empty and falls off.
            shape = shape[: clip.height - top, : clip.width - left]
            place = (frame, slice(top, top + shape.shape[0]), slice(left, left + shape.shape[1]))
            video[place] += shape[..., None] * (colour - video[place])
            ink[place] = np.maximum(ink[place], shape)
    return np.rint(video).astype(np.uint8), ink


def _sample_digit(
    rng: np.random.Generator,
    colour: str,
    canvas: tuple[int, int],
    frames: int,
    images: str,
    is_named: bool,
    any_motion: bool,
) -> Digit:
    image = int(rng.choice(split(images)))
    box = 24 if images == "typical" else int(rng.integers(20, 26))
    room = np.array(canvas, float) - box
    speed = rng.uniform(0.5, 1.6) if any_motion else float(rng.integers(1, 3))
    start = rng.uniform(0, 1, 2) * room
    direction = None
    if is_named:
        direction = str(rng.choice(list(DIRECTIONS)))
        velocity = np.array(DIRECTIONS[direction], float) * speed
        axis = 0 if velocity[0] else 1
        run = min(speed * (frames - 1) * STRAIGHT_SHARE, room[axis])
        start[axis] = rng.uniform(run, room[axis]) if velocity[axis] < 0 else rng.uniform(0, room[axis] - run)
    else:
        angle = rng.uniform(0, 2 * np.pi)
        velocity = np.array([np.cos(angle), np.sin(angle)])
        velocity = velocity * speed if any_motion else np.round(velocity * 1.3) * speed
    if not any_motion:
        start = np.round(start / START_GRID) * START_GRID
    value = int(handwriting()[1][image])
    return Digit(image, value, colour, box, (start[0], start[1]), (velocity[0], velocity[1]), direction)


def _bounce(start: float, velocity: float, time: np.ndarray, room: float) -> np.ndarray:
    """Position at each time between walls at 0 and room: a triangle wave."""
    phase = np.mod(start + velocity * time, 2 * room)
    return np.where(phase > room, 2 * room - phase, phase)


@cache
def _glyph(image: int, box: int) -> np.ndarray:
    """A handwriting scaled to (box, box) with its margin of one source pixel, plus one empty pixel all round."""
    padded = F.pad(handwriting()[0][image], (1, 1, 1, 1))[None, None]
    scaled = F.interpolate(padded, size=(box, box), mode="bicubic", align_corners=False).clamp(0, 1)
    return F.pad(scaled[0, 0], (1, 1, 1, 1)).numpy()


def _shifted(glyph: np.ndarray, x: float, y: float) -> tuple[np.ndarray, int, int]:
    """The glyph moved by the fractions of x and y (bilinear), and the whole pixel (left, top) where it goes."""
    left, top = math.floor(x), math.floor(y)
    fx, fy = x - left, y - top
    rows = (1 - fy) * glyph[1:] + fy * glyph[:-1]
    return (1 - fx) * rows[:, 1:] + fx * rows[:, :-1], left, top
