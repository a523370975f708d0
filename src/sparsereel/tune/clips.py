"""A folder of captioned videos as latents and prompt embeddings, encoded once and kept beside the training state."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsereel.extend.guide import statistics_of
from sparsereel.files import replacing

CAPTIONS = "captions.jsonl"


@dataclass(frozen=True)
class Clips:
    """Encoded clips.

    Attributes:
        latents: (N, C, F, H, W) float32, as the transformer sees them.
        texts: (N, L, D) float32 prompt embeddings.
        empty: (L, D) that of the empty prompt.
    """

    latents: Tensor
    texts: Tensor
    empty: Tensor


def find_clips(folder: Path) -> list[tuple[Path, str]]:
    """Videos and captions, in order of their names.

    Raises:
        ValueError: no folder, no videos, a video without a caption, a caption without a video.
    """
    from sparsereel_eval.readers import CLIP_SUFFIXES, natural_key

    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of videos")
    listed = folder / CAPTIONS
    if listed.is_file():
        return _listed(folder, listed)
    paths = sorted(
        (p for p in folder.iterdir() if p.suffix.lower() in CLIP_SUFFIXES), key=lambda p: natural_key(p.name)
    )
    if not paths:
        raise ValueError(f"{folder} holds no videos ({', '.join(CLIP_SUFFIXES)})")
    found = []
    for path in paths:
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise ValueError(f"{path.name} has no caption: write {text.name} beside it, or {CAPTIONS} for all")
        found.append((path, text.read_text(encoding="utf-8").strip()))
    return found


def _listed(folder: Path, listed: Path) -> list[tuple[Path, str]]:
    found = []
    for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            path, caption = folder / str(entry["file"]), str(entry["caption"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{listed}, line {number}: expected {{"file": ..., "caption": ...}}') from None
        if not path.is_file():
            raise ValueError(f"{listed}, line {number}: there is no file {path.name} in {folder}")
        found.append((path, caption))
    if not found:
        raise ValueError(f"{listed} names no videos")
    return found


def encode(pipe: Any, entries: list[tuple[Path, str]], size: tuple[int, int, int], cache: Path) -> Clips:
    """Clips of `size` (frames, height, width), from `cache` if that was made from the same files and size.

    Raises:
        ValueError: a clip with fewer frames, or that cannot be read (the text names it).
    """
    marks = [[path.name, path.stat().st_size, path.stat().st_mtime_ns, caption] for path, caption in entries]
    facts = json.dumps({"clips": marks, "size": list(size)})
    if cache.is_file() and _facts(cache) == facts:
        return Clips(**load_file(cache))
    texts = _embed(pipe, [caption for _, caption in entries] + [""])
    latents = torch.cat([_latents(pipe, _frames(path, size)) for path, _ in entries])
    made = Clips(latents, texts[:-1].contiguous(), texts[-1].contiguous())
    with replacing(cache) as temporary:
        save_file(dict(vars(made)), temporary, metadata={"facts": facts})
    return made


def _facts(path: Path) -> str | None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("facts")


def _frames(path: Path, size: tuple[int, int, int]) -> Tensor:
    """(1, 3, F, H, W) in [-1, 1]: the first frames, scaled to cover the size, the middle of the picture."""
    from sparsereel_eval.readers import open_clip

    frames, height, width = size
    kept: list[np.ndarray] = []
    stream = iter(open_clip(path))
    for frame in stream:
        kept.append(frame if frame.dtype == np.uint8 else np.rint(frame * 255).astype(np.uint8))
        if len(kept) == frames:
            break
    stream.close()
    if len(kept) < frames:
        raise ValueError(f"{path.name} has {len(kept)} frames; {frames} are needed")
    video = torch.from_numpy(np.stack(kept)).permute(0, 3, 1, 2).float() / 127.5 - 1
    factor = max(height / video.shape[2], width / video.shape[3])
    if factor != 1:
        sides = (max(height, round(video.shape[2] * factor)), max(width, round(video.shape[3] * factor)))
        video = F.interpolate(video, size=sides, mode="bilinear", antialias=True, align_corners=False)
    top, left = (video.shape[2] - height) // 2, (video.shape[3] - width) // 2
    return video[:, :, top : top + height, left : left + width].transpose(0, 1)[None]


@torch.no_grad()
def _latents(pipe: Any, video: Tensor) -> Tensor:
    vae = pipe.vae
    found = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, scale = statistics_of(vae, found)
    return ((found - mean) * scale).cpu()


@torch.no_grad()
def _embed(pipe: Any, captions: list[str]) -> Tensor:
    length = inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default
    parts = [
        pipe.encode_prompt(prompt=caption, do_classifier_free_guidance=False, max_sequence_length=length)[0]
        for caption in captions
    ]
    return torch.cat(parts).float().cpu()
