"""The judge along a long video: does it still show what was asked for after a minute?

    rows = judge_over_time(open_clip("long.mp4"), "a red 3 moving right on navy", fps=16)
    rows[0].start, rows[0].score.digit ... rows[-1].score.digit
    drift(rows)                                # end less start, for every score

Memory does not grow with the video: a window of frames is held at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from statistics import mean
from typing import Any

import numpy as np

from sparsereel_eval.judge import Judge, JudgeScore
from sparsereel_eval.prompts import parse_prompt

# Fewer frames show too little of a digit's track to be judged.
LEAST_FRAMES = 5
# Start and end of a video are judged on this share of its windows, at least one.
ENDS = 0.2


@dataclass(frozen=True)
class Window:
    """One window of a video: `start` in seconds, its frames, and the judge's verdict.

    `score.direction` is judged in the first window only: later a wall may have turned the digit round.
    """

    start: float
    frames: int
    score: JudgeScore


def judge_over_time(
    frames: Iterable[np.ndarray], prompt: str, *, fps: float, seconds: float = 1.0, judge: Judge | None = None
) -> list[Window]:
    """Judge every `seconds` of a video; a rest of fewer than five frames at the end is left out.

    Args:
        frames: (H, W, 3) uint8 or floats in [0, 1], in order; read once.
        prompt: In minireel's vocabulary.
        fps: Frames a second.

    Raises:
        ValueError: the prompt has another form, a window would hold fewer than five frames, or the video does.
    """
    length = round(fps * seconds)
    if length < LEAST_FRAMES:
        raise ValueError(f"a window of {seconds:g} s at {fps:g} frames a second holds {length} frames; 5 are needed")
    judge, still = judge or Judge(), without_directions(prompt)
    windows: list[Window] = []
    held: list[np.ndarray] = []
    done = 0

    def close() -> None:
        text = prompt if not windows else still
        windows.append(Window(done / fps, len(held), judge.score(np.stack(held), text)))

    for frame in frames:
        held.append(frame if frame.dtype == np.uint8 else np.rint(np.clip(frame, 0, 1) * 255).astype(np.uint8))
        if len(held) == length:
            close()
            done += length
            held = []
    if len(held) >= LEAST_FRAMES:
        close()
    if not windows:
        raise ValueError(f"the video has {len(held)} frames; the judge needs {LEAST_FRAMES}")
    return windows


def ends(count: int) -> int:
    """How many windows at the start, and as many at the end, stand for them."""
    return max(1, round(count * ENDS))


def drift(windows: list[Window]) -> dict[str, dict[str, Any]]:
    """Every score at the start (the first fifth of the windows), at the end (the last fifth), and end less start."""
    count = ends(len(windows))
    result = {}
    for name in (field.name for field in fields(JudgeScore) if field.name != "direction"):
        start, end = (mean(getattr(w.score, name) for w in part) for part in (windows[:count], windows[-count:]))
        result[name] = {"start": start, "end": end, "change": end - start}
    return result


def without_directions(prompt: str) -> str:
    """The prompt with the words on motion left out."""
    wanted = parse_prompt(prompt)
    return " and ".join(f"a {digit.colour} {digit.value}" for digit in wanted.digits) + f" on {wanted.background}"
