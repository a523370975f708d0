"""Own versions of VBench's dimensions. Without weights: temporal flickering. The others take their model as an
argument, a plain callable, so that any backbone can be put in; with another than the official one the figure is only
comparable with itself. All scores are in [0, 1], higher is better, and belong to one clip.

A frozen clip scores best on consistency, flickering and smoothness: read them beside `dynamic_degree`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice, pairwise

import numpy as np
import torch

Features = Callable[[np.ndarray], torch.Tensor]  # (H, W, 3) frame -> (D,)
Between = Callable[[np.ndarray, np.ndarray], np.ndarray]  # two frames -> the frame in the middle
Flow = Callable[[np.ndarray, np.ndarray], np.ndarray]  # two frames -> (H, W, 2) motion in pixels
Rating = Callable[[np.ndarray], float]  # frame -> [0, 100]


def temporal_flickering(frames: Iterable[np.ndarray]) -> float:
    """(255 - mean absolute difference of neighbours) / 255, on 8-bit levels; meant for still scenes.

    Raises:
        ValueError: fewer than two frames.
    """
    differences = [float(np.abs(_levels(a) - _levels(b)).mean()) for a, b in pairwise(frames)]
    _need(len(differences) + 1, 2, "temporal_flickering")
    return (255 - float(np.mean(differences))) / 255


def consistency(frames: Iterable[np.ndarray], features: Features) -> float:
    """Subject (DINO) or background (CLIP) consistency: mean over later frames of the mean of two cosines, with the
    first frame and with the one before, negative ones counting 0."""
    vectors = [torch.nn.functional.normalize(features(frame).double().flatten(), dim=0) for frame in frames]
    _need(len(vectors), 2, "consistency")
    terms = [
        (max(0.0, float(now @ before)) + max(0.0, float(now @ vectors[0]))) / 2 for before, now in pairwise(vectors)
    ]
    return float(np.mean(terms))


def motion_smoothness(frames: Iterable[np.ndarray], between: Between) -> float:
    """Every second frame is predicted from its neighbours; (255 - mean absolute error) / 255 on 8-bit levels."""
    errors, held = [], []
    for frame in frames:
        held.append(frame)
        if len(held) == 3:
            errors.append(float(np.abs(_levels(between(held[0], held[2])) - _levels(held[1])).mean()))
            held = held[2:]
    _need(len(held) + 2 * len(errors), 3, "motion_smoothness")
    return (255 - float(np.mean(errors))) / 255


def is_dynamic(frames: Iterable[np.ndarray], fps: float, flow: Flow) -> bool:
    """Whether a clip moves: of pairs at about 8 frames a second, at least a quarter have fast pixels.

    A pair is fast when the mean of its largest 5 % motions exceeds 6 pixels at 256 pixels of height or width. The share
    of such clips is the dimension `dynamic_degree`.

    Raises:
        ValueError: fewer than 6 frames at that rate, where the official rule calls anything dynamic.
    """
    if not fps > 0:
        raise ValueError(f"dynamic_degree needs the clip's frame rate, got {fps}")
    fast, kept = 0, 1
    for a, b in pairwise(islice(frames, 0, None, max(1, round(fps / 8)))):
        lengths = np.sort(np.hypot(*np.moveaxis(flow(a, b), -1, 0)).ravel())
        fast += bool(lengths[-max(1, int(lengths.size * 0.05)) :].mean() > 6 * min(a.shape[:2]) / 256)
        kept += 1
    _need(kept, 6, "dynamic_degree at 8 frames a second")
    return fast >= round(4 * kept / 16)


def imaging_quality(frames: Iterable[np.ndarray], rating: Rating) -> float:
    """Mean rating of the frames (MUSIQ: 0 to 100) / 100."""
    ratings = [float(rating(frame)) for frame in frames]
    _need(len(ratings), 1, "imaging_quality")
    if not all(0 <= value <= 100 for value in ratings):
        raise ValueError(f"ratings must lie in [0, 100], got {min(ratings):.3g} to {max(ratings):.3g}")
    return float(np.mean(ratings)) / 100


def aesthetic_quality(frames: Iterable[np.ndarray], rating: Rating) -> float:
    """Mean rating of the frames (LAION's head: 0 to 10, and a little beyond) / 10."""
    ratings = [float(rating(frame)) for frame in frames]
    _need(len(ratings), 1, "aesthetic_quality")
    return float(np.mean(ratings)) / 10


def appearance_style(frames: Iterable[np.ndarray], features: Features, style: torch.Tensor) -> float:
    """Mean cosine (CLIP) of the frames and the words that name the style, (D,)."""
    text = torch.nn.functional.normalize(style.double().flatten(), dim=0)
    terms = [float(torch.nn.functional.normalize(features(f).double().flatten(), dim=0) @ text) for f in frames]
    _need(len(terms), 1, "appearance_style")
    return float(np.mean(terms))


def text_consistency(
    frames: Sequence[np.ndarray], features: Callable[[Sequence[np.ndarray]], torch.Tensor], text: torch.Tensor
) -> float:
    """Temporal style and overall consistency: cosine (ViCLIP) of a clip and its prompt, which can be negative.

    Args:
        frames: Those that `middle_frames` names.
        features: Frames to the clip's vector (D,).
        text: The prompt's vector (D,).
    """
    _need(len(frames), 1, "text_consistency")
    both = [torch.nn.functional.normalize(x.double().flatten(), dim=0) for x in (features(frames), text)]
    return float(both[0] @ both[1])


def middle_frames(total: int, count: int) -> list[int]:
    """The middle frame of each of `count` equal parts; of shorter clips every frame, the last one repeated."""
    parts = min(count, total)
    edges = np.linspace(0, total, parts + 1).astype(int)
    picked = [int(start + end - 1) // 2 for start, end in pairwise(edges)]
    return picked + picked[-1:] * (count - parts)


def _levels(frame: np.ndarray) -> np.ndarray:
    return frame.astype(np.float32) if frame.dtype == np.uint8 else frame.astype(np.float32) * 255


def _need(frames: int, least: int, what: str) -> None:
    if frames < least:
        raise ValueError(f"{what} needs at least {least} frames, got {frames}")
