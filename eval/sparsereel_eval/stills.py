"""Still pictures of one handwritten digit, at any size, and their judge.

    still = sample_still(np.random.default_rng(0), 64)      # a `Clip` of one frame; `still.prompt` is "a red 7 on navy"
    score = StillJudge().score(picture, "a red 7 on navy", side=64)

A picture larger than the side that its model was trained on is first brought down to that side, by means over areas,
so that one digit twice as large and two digits as large as ever are told apart by their number alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F

from sparsereel_eval.classifier import DigitClassifier, load_classifier
from sparsereel_eval.digits import BACKGROUNDS, COLOURS, Clip, Digit, handwriting, split
from sparsereel_eval.ink import COLOUR_NAMES, WINDOW, Blob, Ink, find_ink
from sparsereel_eval.prompts import parse_prompt

# Shares of the picture's side that a digit's box has, and the grid (as a share) that it lies on.
BOXES, GRID = (1 / 2, 5 / 8, 3 / 4), 1 / 16
# Pixels high that the classifier knows digits: boxes of 24 with a margin.
GLYPH = 19


def sample_still(rng: np.random.Generator, side: int, *, images: str = "typical", anywhere: bool = False) -> Clip:
    """Draw a random description of a picture with one digit: a clip of one frame.

    Args:
        side: Height and width in pixels, at least 32.
        images: Which handwritings, see `digits.split`; of the typical ones, two a digit.
        anywhere: Any place and any size from 3/8 to 7/8 of the side, instead of on a grid; the VAE is trained so.
    """
    if side < 32:
        raise ValueError(f"A picture must be at least 32 pixels high to hold a digit, got {side}.")
    image = int(rng.choice(split(images, 2) if images == "typical" else split(images)))
    share = rng.uniform(3 / 8, 7 / 8) if anywhere else float(rng.choice(BOXES))
    box = round(side * share)
    start = rng.uniform(0, 1, 2) * (side - box)
    if not anywhere:
        grid = max(1, round(side * GRID))
        start = np.round(start / grid) * grid
    colour, background = str(rng.choice(list(COLOURS))), str(rng.choice(list(BACKGROUNDS)))
    digit = Digit(image, int(handwriting()[1][image]), colour, box, (start[0], start[1]), (0.0, 0.0))
    return Clip((digit,), background, 1, side, side)


@dataclass(frozen=True)
class StillScore:
    """Scores in {0, 1}, and the number of digits seen.

    Attributes:
        digit: The largest blob of ink reads as the wanted class.
        colour: The largest blob has the wanted colour.
        background: The nearest named background is the wanted one.
        count: There is exactly one blob.
        blobs: How many there are.
    """

    digit: float
    colour: float
    background: float
    count: float
    blobs: int

    @property
    def sound(self) -> bool:
        return min(self.digit, self.colour, self.background, self.count) == 1.0

    def to_dict(self) -> dict[str, float | int | bool]:
        return {**asdict(self), "sound": self.sound}


class StillJudge:
    """Scores pictures against their prompts; loads the judge's classifier from the package."""

    def __init__(self, classifier: DigitClassifier | None = None):
        self.classifier = classifier or load_classifier()

    @torch.no_grad()
    def score(self, picture: np.ndarray | torch.Tensor, prompt: str, side: int) -> StillScore:
        """Judge one picture.

        Args:
            picture: (H, W, 3) uint8; H a multiple of `side`.
            prompt: "a COLOUR DIGIT on BACKGROUND".
            side: Height of the pictures its model was trained on; larger ones are brought down to it.

        Raises:
            ValueError: the prompt asks for another thing than one digit, or the picture has another form.
        """
        wanted = parse_prompt(prompt)
        if len(wanted.digits) != 1:
            raise ValueError(f"Still pictures are judged for one digit, and {prompt!r} asks for {len(wanted.digits)}.")
        ink = find_ink(reduce_to(picture, side)[None])
        blobs = ink.blobs[0]
        background = float(ink.background == wanted.background)
        if not blobs:
            return StillScore(0.0, 0.0, background, 0.0, 0)
        colour = COLOUR_NAMES[int(blobs[0].colour_shares.argmax())]
        return StillScore(
            digit=float(self._read(ink, blobs[0]) == wanted.digits[0].value),
            colour=float(colour == wanted.digits[0].colour),
            background=background,
            count=float(len(blobs) == 1),
            blobs=len(blobs),
        )

    def _read(self, ink: Ink, blob: Blob) -> int:
        """The class of a blob of any size."""
        return int(self.classifier(glyph_window(ink, blob)[None, None]).argmax())


def reduce_to(picture: np.ndarray | torch.Tensor, side: int) -> torch.Tensor:
    """(H, W, 3) uint8 to (side, side * W / H, 3) uint8, means over areas.

    Raises:
        ValueError: the picture has another shape or type, or its height is no multiple of `side`.
    """
    pixels = torch.as_tensor(picture)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != torch.uint8:
        raise ValueError(f"A picture must be (height, width, 3) uint8, got {tuple(pixels.shape)} {pixels.dtype}.")
    factor, rest = divmod(pixels.shape[0], side)
    if rest or not factor:
        raise ValueError(f"A picture {pixels.shape[0]} pixels high is no multiple of {side}.")
    means = F.avg_pool2d(pixels.permute(2, 0, 1).float()[None], factor)[0]
    return means.round().to(torch.uint8).permute(1, 2, 0)


def glyph_window(ink: Ink, blob: Blob) -> torch.Tensor:
    """A blob of the first frame alone, scaled to the size the classifier knows, centred in (32, 32)."""
    top, left = blob.pixels.amin(0).tolist()
    bottom, right = (blob.pixels.amax(0) + 1).tolist()
    alone = torch.zeros_like(ink.strength[0])
    alone[blob.pixels[:, 0], blob.pixels[:, 1]] = ink.strength[0, blob.pixels[:, 0], blob.pixels[:, 1]]
    scale = GLYPH / max(bottom - top, right - left)
    size = max(1, round((bottom - top) * scale)), max(1, round((right - left) * scale))
    scaled = F.interpolate(alone[None, None, top:bottom, left:right], size, mode="bilinear", antialias=True)
    canvas = torch.zeros(WINDOW, WINDOW)
    y, x = ((WINDOW - length) // 2 for length in size)
    canvas[y : y + size[0], x : x + size[1]] = scaled[0, 0]
    return canvas / canvas.max().clamp_min(1e-6)


def average(scores: list[StillScore]) -> dict[str, float]:
    """Mean of every score over pictures, and the share of sound ones.

    Raises:
        ValueError: there is no score.
    """
    if not scores:
        raise ValueError("There is no score to average.")
    found = {field.name: mean(float(getattr(score, field.name)) for score in scores) for field in fields(StillScore)}
    return {"sound": mean(float(score.sound) for score in scores), **found}
