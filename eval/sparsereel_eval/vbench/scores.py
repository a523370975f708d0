"""From raw scores of the dimensions to Quality, Semantic and Total, with VBench's published constants.

    norm = (raw - low) / (high - low)            not clamped, as in the official script
    Quality, Semantic = weighted mean of norm over 7 and 9 dimensions
    Total = (4 Quality + Semantic) / 5

The official script counts a missing dimension as raw 0. Here Quality needs its 7, Semantic its 9, Total all 16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsereel_eval.vbench.names import DIMENSIONS, QUALITY_WEIGHT, SEMANTIC_WEIGHT, dimension


@dataclass(frozen=True)
class Scores:
    """Scores of one model; None where dimensions are missing.

    Attributes:
        raw, normalised: By dimension, in [0, 1] as a rule.
        quality, semantic, total: In [0, 1]; papers print 100 times these.
        missing: Dimensions without a score.
    """

    raw: dict[str, float]
    normalised: dict[str, float]
    quality: float | None
    semantic: float | None
    total: float | None
    missing: tuple[str, ...]


def score(raw: Mapping[str, float]) -> Scores:
    """Normalise and aggregate raw scores.

    Raises:
        ValueError: an unknown dimension, or a score outside [-1, 1] (percentages are meant to be divided by 100).
    """
    found: dict[str, float] = {}
    for name, value in raw.items():
        key = dimension(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1 <= value <= 1:
            raise ValueError(f"the raw score of {key} must be a number in [-1, 1], got {value!r}")
        if key in found:
            raise ValueError(f"{key} has two scores")
        found[key] = float(value)
    ordered = {key: found[key] for key in DIMENSIONS if key in found}
    norm = {k: (v - DIMENSIONS[k].low) / (DIMENSIONS[k].high - DIMENSIONS[k].low) for k, v in ordered.items()}
    quality, semantic = _mean(norm, "quality"), _mean(norm, "semantic")
    total = None
    if quality is not None and semantic is not None:
        total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    missing = tuple(key for key in DIMENSIONS if key not in found)
    return Scores(ordered, norm, quality, semantic, total, missing)


def _mean(norm: Mapping[str, float], group: str) -> float | None:
    members = {key: about for key, about in DIMENSIONS.items() if about.group == group}
    if not all(key in norm for key in members):
        return None
    return sum(norm[key] * about.weight for key, about in members.items()) / sum(a.weight for a in members.values())


def read_results(paths: Sequence[Path]) -> dict[str, float]:
    """Raw scores from the official program's `*_eval_results.json` files: {dimension: [score, clips]} or plain numbers.

    Raises:
        ValueError: unreadable, not of this form, or two files score one dimension differently.
    """
    found: dict[str, float] = {}
    for path in paths:
        for name, value in _load(path).items():
            key = dimension(name)
            number = value[0] if isinstance(value, list) and value else value
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise ValueError(f"{path}: {name} must be a number or [number, clips], got {str(value)[:60]}")
            if key in found and found[key] != number:
                raise ValueError(f"{path} gives {key} as {number}, another file as {found[key]}")
            found[key] = float(number)
    return found


def _load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict) or not data:
        raise ValueError(f"{path} must hold an object with a score for each dimension")
    return data
