"""The judge: does a generated clip show what its prompt asks for?

    score = Judge().score(video, "a red 3 moving right on navy")
    score.sound, score.digit, score.count

Everything but the digit's class is measured, not learned: background and colours by the nearest named colour, direction
from the track, extra or missing copies by counting blobs, smoothness from accelerations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from statistics import mean

import numpy as np
import torch

from sparsereel_eval.classifier import DigitClassifier, load_classifier
from sparsereel_eval.digits import DIRECTIONS
from sparsereel_eval.ink import COLOUR_NAMES, Blob, Ink, find_ink
from sparsereel_eval.prompts import WantedDigit, parse_prompt

# A blob holds a wanted colour when this share of its pixels is nearest to it: two digits that touch form one blob.
PART_SHARE = 0.2
# Named directions are judged on a clip's first half, or 17 frames: later a wall may turn the digit round.
DIRECTION_SHARE, DIRECTION_FRAMES = 0.5, 17
# Pixels a frame squared. Steady motion has 0; a digit that flickers or wavers jumps by more than this.
JUMP = 1.5
SOUND_COUNT = 0.9


@dataclass(frozen=True)
class JudgeScore:
    """Scores in [0, 1]; with several digits, the mean over them.

    Attributes:
        digit: The class read over all frames is the wanted one.
        colour: The ink has the wanted colour.
        background: The nearest named background is the wanted one.
        direction: Moves as named, at the start; None where the prompt names no direction.
        count: Share of frames with exactly the wanted number of digits: copies and gaps are punished.
        smoothness: Share of frames without a jump of the track; real clips reach about 0.95, as bounces count.
    """

    digit: float
    colour: float
    background: float
    direction: float | None
    count: float
    smoothness: float

    @property
    def sound(self) -> bool:
        """All is as asked, in at least nine frames of ten exactly as many digits as asked."""
        named = 1.0 if self.direction is None else self.direction
        return min(self.digit, self.colour, self.background, named) == 1.0 and self.count >= SOUND_COUNT

    def to_dict(self) -> dict[str, float | bool | None]:
        return {**asdict(self), "sound": self.sound}


class Judge:
    """Scores clips against their prompts; loads its weights (about 100 kB) from the package."""

    def __init__(self, classifier: DigitClassifier | None = None):
        self.classifier = classifier or load_classifier()

    @torch.no_grad()
    def score(self, video: np.ndarray | torch.Tensor, prompt: str) -> JudgeScore:
        """Judge one clip.

        Args:
            video: (F, H, W, 3) uint8, any canvas size; digits about 16 to 24 pixels high.
            prompt: What it was generated from, in minireel's vocabulary.

        Raises:
            ValueError: the prompt or the video has another form.
        """
        wanted = parse_prompt(prompt)
        ink = find_ink(video)
        colours = [COLOUR_NAMES.index(digit.colour) for digit in wanted.digits]
        verdicts = [self._judge_digit(ink, digit, alone=len(colours) == 1) for digit in wanted.digits]
        directions = [v.direction for v in verdicts if v.direction is not None]
        return JudgeScore(
            digit=mean(v.digit for v in verdicts),
            colour=mean(v.colour for v in verdicts),
            background=float(ink.background == wanted.background),
            direction=mean(directions) if directions else None,
            count=mean(float(_count(blobs, colours) == len(colours)) for blobs in ink.blobs),
            smoothness=mean(v.smoothness for v in verdicts),
        )

    def _judge_digit(self, ink: Ink, wanted: WantedDigit, alone: bool) -> _Verdict:
        colour = COLOUR_NAMES.index(wanted.colour)
        found = [_pick(blobs, colour, alone) for blobs in ink.blobs]
        seen = [(frame, blob) for frame, blob in enumerate(found) if blob is not None]
        if len(seen) < 3:
            return _Verdict(0.0, 0.0, None if wanted.direction is None else 0.0, 0.0)
        windows = torch.stack([ink.window(frame, blob) for frame, blob in seen]).unsqueeze(1)
        probabilities = self.classifier(windows).softmax(1).mean(0)
        shares = torch.stack([blob.colour_shares for _, blob in seen]).mean(0)
        in_colour = int(shares.argmax()) == colour and len(seen) >= 0.5 * len(found)
        track = [None if blob is None else blob.centre for blob in found]
        return _Verdict(
            digit=float(int(probabilities.argmax()) == wanted.value),
            colour=float(in_colour),
            direction=None if wanted.direction is None else float(_moves(track, wanted.direction)),
            smoothness=_smoothness(track),
        )


@dataclass(frozen=True)
class _Verdict:
    digit: float
    colour: float
    direction: float | None
    smoothness: float


_Track = Sequence[tuple[float, float] | None]


def average(scores: Sequence[JudgeScore]) -> dict[str, float]:
    """Mean of every score over clips (direction over those that name one), and the share of sound clips."""
    if not scores:
        raise ValueError("There is no score to average.")
    result = {"sound": mean(float(score.sound) for score in scores)}
    for field in fields(JudgeScore):
        values = [getattr(score, field.name) for score in scores]
        known = [value for value in values if value is not None]
        if known:
            result[field.name] = mean(known)
    return result


def _pick(blobs: list[Blob], colour: int, alone: bool) -> Blob | None:
    """The blob to read the digit from: the largest if it is alone, else the most ink of its colour."""
    if alone:
        return blobs[0] if blobs else None
    parts = [blob if _is_whole(blob, colour) else blob.part(colour) for blob in blobs]
    parts = [part for part in parts if part.colour_shares[colour] >= 0.5 and part.area >= SMALLEST_PART]
    return max(parts, key=lambda part: part.area, default=None)


SMALLEST_PART = 12


def _is_whole(blob: Blob, colour: int) -> bool:
    return bool(blob.colour_shares[colour] >= 1 - PART_SHARE)


def _count(blobs: list[Blob], colours: list[int]) -> int:
    """Digits in a frame; a blob with ink of several wanted colours holds one digit of each."""
    return sum(max(1, sum(float(blob.colour_shares[c]) >= PART_SHARE for c in colours)) for blob in blobs)


def _moves(track: _Track, direction: str) -> bool:
    """Goes mainly that way, and more than 2 pixels, in the first frames of the clip."""
    start = min(DIRECTION_FRAMES, max(3, math.ceil(len(track) * DIRECTION_SHARE) + 1))
    early = [place for place in track[:start] if place is not None]
    if len(early) < 2:
        return False
    dx, dy = early[-1][0] - early[0][0], early[-1][1] - early[0][1]
    along = dx * DIRECTIONS[direction][0] + dy * DIRECTIONS[direction][1]
    return along > 2 and along > 0.7 * math.hypot(dx, dy)


def _smoothness(track: _Track) -> float:
    """Share of inner frames whose place is near the mean of its neighbours'; unseen frames count as jumps."""
    steady = 0
    for before, here, after in zip(track, track[1:], track[2:], strict=False):
        if before is not None and here is not None and after is not None:
            ax, ay = before[0] - 2 * here[0] + after[0], before[1] - 2 * here[1] + after[1]
            steady += math.hypot(ax, ay) <= JUMP
    return steady / max(1, len(track) - 2)
