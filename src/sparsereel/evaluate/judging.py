"""minireel's judge on clips and in a study: what the digits lost, beside how far the pixels moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FIGURES = ("sound", "digit", "colour", "count", "direction", "smoothness")


def can_judge(prompts: Sequence[str]) -> bool:
    """Whether every prompt is in minireel's vocabulary."""
    from sparsereel_eval.prompts import parse_prompt

    try:
        for prompt in prompts:
            parse_prompt(prompt)
    except ValueError:
        return False
    return True


def judge_clips(clips: Mapping[Path, str]) -> dict[Path, dict[str, float]]:
    """The judge's scores of clips with their prompts; a figure that a prompt gives no ground for is left out."""
    from sparsereel.media import to_uint8
    from sparsereel_eval.judge import Judge
    from sparsereel_eval.readers import open_clip

    judge = Judge()
    found = {}
    for path, prompt in clips.items():
        scores = judge.score(to_uint8(open_clip(path).read()), prompt).to_dict()
        found[path] = {name: float(value) for name in FIGURES if (value := scores[name]) is not None}
    return found


def judge_table(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Figure to its summary over a plan's runs, like `sparsereel_eval.paired.aggregate`.

    `runs` hold "prompt", "judged" and "dense_judged". A row also holds dense's mean and the p of Wilcoxon's test
    between both, prompt by prompt.
    """
    from sparsereel_eval.intervals import group_means, summarise, wilcoxon

    table: dict[str, dict[str, Any]] = {}
    for name in FIGURES:
        both = [
            (run["judged"][name], run["dense_judged"][name], run["prompt"])
            for run in runs
            if name in run["judged"] and name in run["dense_judged"]
        ]
        if not both:
            continue
        test, dense, prompts = (list(column) for column in zip(*both, strict=True))
        left, right = group_means(test, prompts), group_means(dense, prompts)
        table[name] = {
            **summarise(test, prompts),
            "higher_is_better": True,
            "reference": float(np.mean(right)),
            "test": float(np.mean(left)),
            "p": wilcoxon(left.tolist(), right.tolist()),
        }
    return table


def judge_paths(
    clips: Path, prompt: str | None, prompts: Path | None, *, window: float = 1.0, fps: float | None = None
) -> dict[str, Any]:
    """Judge a clip or a folder of clips, whole and window by window.

    Args:
        clips: What `sparsereel_eval.folders.list_clips` takes.
        prompt: Of every clip; or `prompts`, a file with one a clip; else the JSON beside each clip.
        window: Seconds judged at a time.
        fps: Frames a second; default the file's, or minireel's 16 where it does not say.

    Returns:
        "table": figure to its summary over clips; "drift": figure to "start", "end", "change" over the clips with two
        windows or more; "clips": every clip's own, with its windows.

    Raises:
        ValueError: unreadable clips, a prompt that is missing or not minireel's, a window that is too short.
    """
    from sparsereel.evaluate.text import find_prompts
    from sparsereel_eval.folders import list_clips
    from sparsereel_eval.intervals import summarise

    if prompt is not None and prompts is not None:
        raise ValueError("give --prompt or --prompts, not both")
    files = list_clips(clips)
    texts = [prompt] * len(files) if prompt is not None else find_prompts(files, prompts)
    rows = [_judge_file(file, text, window, fps) for file, text in zip(files, texts, strict=True)]
    table = {
        name: summarise(values, [row["prompt"] for row in rows if name in row["scores"]])
        for name in FIGURES
        if (values := [row["scores"][name] for row in rows if name in row["scores"]])
    }
    long = [row["drift"] for row in rows if row["drift"] is not None]
    over_time = {
        name: {**{key: float(np.mean([one[name][key] for one in long])) for key in _DRIFT}, "clips": len(long)}
        for name in (long[0] if long else ())
    }
    return {"table": table, "drift": over_time, "clips": rows}


_DRIFT = ("start", "end", "change")


def _judge_file(path: Path, prompt: str, window: float, fps: float | None) -> dict[str, Any]:
    from sparsereel.media import FPS
    from sparsereel_eval.drift import drift, judge_over_time
    from sparsereel_eval.readers import open_clip

    clip = open_clip(path)
    rate = fps or clip.fps or float(FPS)
    windows = judge_over_time(clip, prompt, fps=rate, seconds=window)
    whole = judge_clips({path: prompt})[path]
    return {
        "clip": str(path),
        "prompt": prompt,
        "scores": whole,
        "drift": drift(windows) if len(windows) > 1 else None,
        "windows": [{"start": w.start, "frames": w.frames, **w.score.to_dict()} for w in windows],
    }
