"""Features of whole sets, stored as safetensors so that a set is read once.

A stored file names its extractor and the SHA-256 of all clips: with another extractor it is refused, and a cache entry
whose clips have changed is not found.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sparsereel_eval.features import Extractor, clip_features

_MARK = "sparsereel_features"


def set_features(
    clips: Sequence[Path], extractor: Extractor, *, cache: Path | None = None, step: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """Features (N, D) of all clips in order; from `cache` where the same clips were read before.

    Args:
        cache: Folder of stored features, made when missing.
        step: Called after each clip.

    Raises:
        ValueError: a clip cannot be read, or there is none.
    """
    if not clips:
        raise ValueError("there are no clips to take features of")
    if cache is None:
        return _extract(clips, extractor, step)
    entry = cache / f"{_key(clips, extractor)}.safetensors"
    if entry.is_file():
        return load_features(entry, extractor)
    features = _extract(clips, extractor, step)
    save_features(entry, features, extractor)
    return features


def _extract(clips: Sequence[Path], extractor: Extractor, step: Callable[[], None]) -> torch.Tensor:
    rows = []
    for clip in clips:
        rows.append(clip_features(clip, extractor))
        step()
    return torch.cat(rows)


def save_features(path: Path, features: torch.Tensor, extractor: Extractor) -> None:
    """Store features; the file appears whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"extractor": extractor.name, "of": extractor.of, "frames": extractor.frames}
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file({"features": features.contiguous()}, temporary, {_MARK: json.dumps(about)})
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load_features(path: Path, extractor: Extractor) -> torch.Tensor:
    """Features (N, D) stored by `save_features`.

    Raises:
        ValueError: damaged, not such a file, or made with another extractor or number of frames.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_MARK, "null"))
            if about is None:
                raise ValueError(f"{path} holds no stored features")
            features = file.get_tensor("features")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    wanted = {"extractor": extractor.name, "of": extractor.of, "frames": extractor.frames}
    if about != wanted:
        raise ValueError(f"{path} was made with {about}, but {wanted} is asked for")
    return features


def is_feature_file(path: Path) -> bool:
    """Whether a path is a file of stored features, rather than a clip."""
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return _MARK in (file.metadata() or {})
    except SafetensorError:
        return False


def _key(clips: Sequence[Path], extractor: Extractor) -> str:
    whole = hashlib.sha256(f"{extractor.name}|{extractor.of}|{extractor.frames}".encode())
    for clip in clips:
        for file in sorted(clip.iterdir()) if clip.is_dir() else [clip]:
            with file.open("rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()[:32]
