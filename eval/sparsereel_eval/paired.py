"""Two runs of one request against each other: the reference (dense) clip and the tested one, frame by frame.

| figure | unit | better | of each |
|---|---|---|---|
| psnr, ssim, ms_ssim | dB, 1, 1 | higher | frame |
| lpips_alex or lpips_vgg | 1 | lower | frame |
| temporal_psnr | dB | higher | pair of neighbours: PSNR of their differences, values in [-1, 1] |
| flicker | 8-bit levels | near 0 | pair: mean absolute change of the tested clip, less that of the reference |
| warping | squared | lower | pair: warping error (warping.py) of the tested clip, less that of the reference |

A clip's figure is the mean over its frames or pairs. A figure that cannot be had (pictures too small, weights missing,
one frame) is left out with its reason. Both clips are read once, side by side, in memory that does not grow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsereel_eval import fidelity, warping
from sparsereel_eval.intervals import summarise, wilcoxon
from sparsereel_eval.lpips import Lpips
from sparsereel_eval.readers import ClipFile, FrameStream, open_clip

HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "ms_ssim": True, "temporal_psnr": True}
HIGHER_IS_BETTER |= {"lpips_alex": False, "lpips_vgg": False, "flicker": False, "warping": False}
# Five scales of an 11-pixel window (Wang et al., 2003): the coarsest picture, a sixteenth, must hold one.
MS_SSIM_SMALLEST = 176
# Headers give frame rates in two decimals.
_FPS_TOLERANCE = 0.002


@dataclass
class PairResult:
    """Figures of one pair.

    Attributes:
        values: Name to the clip's figure.
        per_frame: Name to the figure of every frame, or every pair of neighbours (one fewer).
        missing: Name to why there is no figure.
        reference, test: Paths.
        frames: Number of frames compared.
        identical: Frames that are equal to the last bit; PSNR counts them as 100 dB.
        lossy: A clip came from a format that loses detail.
        own: Flicker and warping error of each clip by itself: {"flicker": (reference, test), ...}.
    """

    reference: Path
    test: Path
    values: dict[str, float] = field(default_factory=dict)
    per_frame: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    own: dict[str, tuple[float, float]] = field(default_factory=dict)
    frames: int = 0
    identical: int = 0
    lossy: bool = False

    def to_dict(self, *, per_frame: bool = True) -> dict[str, Any]:
        data = {
            "reference": str(self.reference),
            "test": str(self.test),
            "frames": self.frames,
            "identical_frames": self.identical,
            "lossy": self.lossy,
            "values": self.values,
            "missing": self.missing,
            "own": {name: {"reference": a, "test": b} for name, (a, b) in self.own.items()},
        }
        return {**data, "per_frame": self.per_frame} if per_frame else data


def compare_clips(reference: str | Path, test: str | Path, *, lpips: Lpips | None = None) -> PairResult:
    """All figures of one pair.

    Raises:
        ValueError: a clip cannot be read, or they differ in size, frame rate or number of frames.
    """
    left, right = open_clip(reference), open_clip(test)
    _check_alike(left, right)
    running = _Running(left, right, lpips)
    with closing(iter(left)) as a, closing(iter(right)) as b:
        counts = [0, 0]
        for x, y in zip_longest(a, b):
            counts[0] += x is not None
            counts[1] += y is not None
            if x is not None and y is not None:
                running.add(x, y)
    if counts[0] != counts[1]:
        raise ValueError(f"{left.path} has {counts[0]} frames, {right.path} has {counts[1]}; they must be equally many")
    return running.finish()


def compare_arrays(reference: np.ndarray, test: np.ndarray, *, lpips: Lpips | None = None) -> PairResult:
    """As `compare_clips`, for clips in memory: (F, H, W, 3) uint8 or float in [0, 1]."""
    if reference.shape != test.shape:
        raise ValueError(f"the clips differ in shape: {reference.shape} and {test.shape}")
    left, right = (
        ClipFile(Path(name), clip.shape[1], clip.shape[2], len(clip), None, False, partial(_each, clip))
        for name, clip in (("reference", reference), ("test", test))
    )
    running = _Running(left, right, lpips)
    for x, y in zip(left, right, strict=True):
        running.add(x, y)
    return running.finish()


def _each(clip: np.ndarray) -> FrameStream:
    yield from clip


def _check_alike(left: ClipFile, right: ClipFile) -> None:
    if (left.height, left.width) != (right.height, right.width):
        sizes = [f"{clip.path} is {clip.width} x {clip.height}" for clip in (left, right)]
        raise ValueError(f"{sizes[0]}, {sizes[1]}; they must have the same size")
    if left.frames is not None and right.frames is not None and left.frames != right.frames:
        counts = [f"{clip.path} has {clip.frames} frames" for clip in (left, right)]
        raise ValueError(f"{counts[0]}, {counts[1]}; they must be equally many")
    if left.fps and right.fps and abs(left.fps - right.fps) > _FPS_TOLERANCE * left.fps:
        rates = [f"{clip.path} runs at {clip.fps:g} frames a second" for clip in (left, right)]
        raise ValueError(f"{rates[0]}, {rates[1]}; they must run at the same rate")


class _Running:
    """Figures so far; holds one frame of each clip."""

    def __init__(self, left: ClipFile, right: ClipFile, lpips: Lpips | None):
        self.result = PairResult(left.path, right.path, lossy=left.lossy or right.lossy)
        self.lpips = lpips
        self.before: tuple[np.ndarray, np.ndarray] | None = None
        self.own: dict[str, list[tuple[float, float]]] = {"flicker": [], "warping": []}
        smaller = min(left.height, left.width)
        missing = self.result.missing
        if smaller < fidelity.WINDOW:
            missing["ssim"] = f"the pictures are smaller than the window of {fidelity.WINDOW} pixels"
        if smaller < MS_SSIM_SMALLEST:
            missing["ms_ssim"] = f"needs pictures of at least {MS_SSIM_SMALLEST} pixels a side, these have {smaller}"
        if smaller < warping.BLOCK:
            missing["warping"] = f"the pictures are smaller than a block of {warping.BLOCK} pixels"

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        x, y = _unit(x), _unit(y)
        missing, result = self.result.missing, self.result
        result.frames += 1
        result.identical += bool(np.array_equal(x, y))
        self._note("psnr", fidelity.psnr(x[None], y[None]))
        if "ssim" not in missing:
            self._note("ssim", fidelity.ssim(x[None], y[None]))
        if "ms_ssim" not in missing:
            self._note("ms_ssim", _ms_ssim(_channels_first(x), _channels_first(y)))
        if self.lpips is not None:
            distance = self.lpips(_channels_first(x), _channels_first(y))
            self._note(f"lpips_{self.lpips.net}", float(distance))
        if self.before is not None:
            self._add_change(*self.before, x, y)
        self.before = x, y

    def _add_change(self, x0: np.ndarray, y0: np.ndarray, x1: np.ndarray, y1: np.ndarray) -> None:
        change_x, change_y = x1 - x0, y1 - y0
        mse = float(np.square(change_x - change_y).mean())
        self._note("temporal_psnr", min(fidelity.PSNR_CAP, -10 * math.log10(mse)) if mse else fidelity.PSNR_CAP)
        flicker = float(np.abs(change_x).mean()) * 255, float(np.abs(change_y).mean()) * 255
        self.own["flicker"].append(flicker)
        self._note("flicker", flicker[1] - flicker[0])
        if "warping" in self.result.missing:
            return
        motion = warping.find_motion(x0, x1)
        errors = warping.warping_error(x0, x1, motion), warping.warping_error(y0, y1, motion)
        if errors[0] is not None and errors[1] is not None:
            self.own["warping"].append((errors[0], errors[1]))
            self._note("warping", errors[1] - errors[0])

    def _note(self, name: str, value: float) -> None:
        self.result.per_frame.setdefault(name, []).append(value)

    def finish(self) -> PairResult:
        result = self.result
        result.values = {name: float(np.mean(values)) for name, values in result.per_frame.items()}
        result.own = {
            name: (float(np.mean([a for a, _ in pairs])), float(np.mean([b for _, b in pairs])))
            for name, pairs in self.own.items()
            if pairs
        }
        for name in ("temporal_psnr", "flicker", "warping"):
            if name not in result.values and name not in result.missing:
                result.missing[name] = "the clip has one frame" if result.frames < 2 else "no motion could be matched"
        return result


def _unit(frame: np.ndarray) -> np.ndarray:
    """(H, W, 3) fp64 in [0, 1]."""
    return frame / 255.0 if frame.dtype == np.uint8 else frame.astype(np.float64)


def _channels_first(frame: np.ndarray) -> torch.Tensor:
    return torch.tensor(frame, dtype=torch.float32).permute(2, 0, 1)[None]


def _ms_ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as measure

    return float(measure(b, a, data_range=1.0, sigma=1.5, kernel_size=11))


def aggregate(results: Sequence[PairResult], groups: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Per figure: number of clips, mean, median, extremes, bootstrap interval; for flicker and warping error also each
    side's mean and the p of Wilcoxon's test between the sides. A figure that a clip lacks is named in `without`.
    """
    if not results:
        raise ValueError("there is nothing to summarise")
    names = [name for name in HIGHER_IS_BETTER if any(name in result.values for result in results)]
    table: dict[str, dict[str, Any]] = {}
    for name in names:
        have = [i for i, result in enumerate(results) if name in result.values]
        chosen = None if groups is None else [groups[i] for i in have]
        row = summarise([results[i].values[name] for i in have], chosen)
        row["higher_is_better"] = HIGHER_IS_BETTER[name]
        row["without"] = [str(r.test) for r in results if name not in r.values]
        own = [results[i].own[name] for i in have if name in results[i].own]
        if own:
            left, right = ([pair[side] for pair in own] for side in (0, 1))
            row |= {"reference": float(np.mean(left)), "test": float(np.mean(right)), "p": wilcoxon(left, right)}
        table[name] = row
    return table


def parse_thresholds(texts: Sequence[str], names: Iterable[str] = HIGHER_IS_BETTER) -> dict[str, float]:
    """`psnr=25` to {"psnr": 25.0}; several may be joined by commas. `names` are the allowed figures.

    Raises:
        ValueError: an unknown figure or no number.
    """
    wanted = {}
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, _, number = part.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if name not in names or value != value:
            raise ValueError(f"a threshold is NAME=NUMBER with a name of {', '.join(names)}; got {part!r}")
        wanted[name] = value
    return wanted


def missed(table: dict[str, dict[str, Any]], thresholds: dict[str, float]) -> list[str]:
    """A sentence for every threshold the means do not reach.

    Higher-is-better figures must be at least the threshold, the others at most; flicker and warping error count with
    their sign, so a clip calmer than its reference passes.

    Raises:
        ValueError: a threshold's figure was not measured.
    """
    sentences = []
    for name, wanted in thresholds.items():
        if name not in table:
            raise ValueError(f"the threshold on {name} cannot be checked: it was not measured")
        mean, higher = table[name]["mean"], table[name]["higher_is_better"]
        if (mean < wanted) if higher else (mean > wanted):
            side = "below" if higher else "above"
            sentences.append(f"{name} is {mean:.4g}, {side} the threshold of {wanted:g}")
    return sentences
