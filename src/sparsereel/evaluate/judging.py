"""minireel's judge in a study: what the digits lost, beside how far the pixels moved."""

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
