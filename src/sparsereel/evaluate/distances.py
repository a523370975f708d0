"""FID, KID and FVD between two sets of clips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sparsereel_eval.features import Extractor

METRICS = {"fid": "pictures", "kid": "pictures", "fvd": "clips"}
Say = Callable[[str], None]
Progress = Callable[[int, int], None]  # how many are done, of how many
_EXTRAPOLATE = 1.5  # samples a dimension


@dataclass(frozen=True)
class Settings:
    """How a distance is taken.

    Attributes:
        features: Name of the extractor; see `sparsereel_eval.features`.
        weights: File of the extractor's weights, where it has none of its own.
        frames: Frames taken from each clip; None for the extractor's default.
        cache: Folder in which features are kept.
        force: Compute a Frechet distance even from fewer samples than a quarter of the features' length.
        subset_size: Samples in each of KID's subsets.
        seed: Of KID's subsets and of the extrapolation.
    """

    features: str = "judge"
    weights: Path | None = None
    frames: int | None = None
    cache: Path | None = None
    force: bool = False
    subset_size: int | None = None
    seed: int = 0


def distance(
    metric: str,
    a: Path,
    b: Path,
    settings: Settings,
    say: Say = lambda text: None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Distance of two sets, each a folder of clips, a folder of pictures, or a file of stored features.

    `progress` is called after each clip of a set.

    Raises:
        ValueError: unreadable clips, unknown features, too few samples (without `force`).
    """
    from sparsereel_eval.features import make_extractor
    from sparsereel_eval.frechet import kid, sample_warning

    extractor = make_extractor(settings.features, METRICS[metric], weights=settings.weights, frames=settings.frames)
    sets = [_features(path, extractor, settings.cache, say, progress) for path in (a, b)]
    fewest, length = min(len(x) for x in sets), sets[0].shape[1]
    if fewest < 2:
        path = (a, b)[[len(x) for x in sets].index(fewest)]
        raise ValueError(f"{path} gives one {METRICS[metric].rstrip('s')} only; {metric} needs two or more in each set")
    result: dict[str, Any] = {
        "metric": metric,
        "features": extractor.name,
        "frames_per_clip": extractor.frames,
        "samples": [len(x) for x in sets],
        "dimensions": length,
        "warnings": [],
    }
    if metric == "kid":
        found = kid(*sets, subset_size=settings.subset_size, seed=settings.seed)
        return {**result, "value": found.mean, **asdict(found)}
    warning = sample_warning(fewest, length)
    if warning:
        if fewest < length / 4 and not settings.force:
            raise ValueError(f"{warning}; with so few it says nothing (--force computes it all the same)")
        result["warnings"].append(warning)
    if len(sets[0]) != len(sets[1]):
        result["warnings"].append("the sets differ in size; Frechet distances compare only at equal sizes")
    return {**result, **_frechet(sets, settings.seed)}


def _frechet(sets: list[torch.Tensor], seed: int) -> dict[str, Any]:
    from sparsereel_eval.frechet import fid, fid_infinity

    value, fewest = fid(*sets), min(map(len, sets))
    # The bias is linear in 1/n only where the covariances have nearly full rank.
    enough = fewest >= max(30, _EXTRAPOLATE * sets[0].shape[1])
    extrapolated = fid_infinity(*sets, seed=seed) if enough else None
    return {"value": value, "extrapolated": extrapolated}


def _features(path: Path, extractor: Extractor, cache: Path | None, say: Say, progress: Progress) -> torch.Tensor:
    from sparsereel_eval.feature_files import is_feature_file, load_features, set_features
    from sparsereel_eval.folders import list_clips
    from sparsereel_eval.readers import PICTURE_SUFFIXES, natural_key

    if is_feature_file(path):
        return load_features(path, extractor)
    clips = list_clips(path)
    if clips == [path] and path.is_dir():
        # A folder of pictures is a set of pictures here, not one clip.
        found = [file for file in path.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES]
        clips = sorted((f for f in found if not f.name.startswith(".")), key=lambda f: natural_key(f.name))
    say(f"{path}: features of {len(clips)} clips")
    done = count(1)
    return set_features(clips, extractor, cache=cache, step=lambda: progress(next(done), len(clips)))


def store(
    path: Path,
    output: Path,
    metric: str,
    settings: Settings,
    say: Say = lambda text: None,
    progress: Progress = lambda done, total: None,
) -> int:
    """Write a set's features to `output`, to stand for the set in later calls; returns how many."""
    from sparsereel_eval.feature_files import save_features
    from sparsereel_eval.features import make_extractor

    extractor = make_extractor(settings.features, METRICS[metric], weights=settings.weights, frames=settings.frames)
    features = _features(path, extractor, settings.cache, say, progress)
    save_features(output, features, extractor)
    return len(features)
