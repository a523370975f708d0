"""CLIP score: cosine of a prompt and the frames generated from it (Hessel et al., 2021), plain, not times 2.5.

Values of one model compare only with that model's; they lie near 0.2 to 0.35 for ViT-B/32. The effect of an
acceleration is smaller than the spread over prompts, so compare the same prompts in pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sparsereel_eval.lpips import MissingWeights


@dataclass(frozen=True)
class ClipScore:
    """Of one clip: mean cosine of text and frames, and of neighbouring frames (None for one frame)."""

    text: float
    steadiness: float | None


@dataclass(frozen=True)
class ClipModel:
    """A CLIP model as two callables.

    Attributes:
        name: Model and digest of the weights.
        encode_image: (N, 3, S, S), normalised, to (N, D).
        encode_text: One text to (1, D).
        size: S, in pixels.
        mean, std: Of the normalisation, by channel.
    """

    name: str
    encode_image: Callable[[torch.Tensor], torch.Tensor]
    encode_text: Callable[[str], torch.Tensor]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.no_grad()
    def score(self, frames: torch.Tensor, prompt: str) -> ClipScore:
        """Score frames (F, 3, H, W) in [0, 1] against their prompt."""
        pictures = F.normalize(self.encode_image(self.prepare(frames)).float(), dim=1)
        text = F.normalize(self.encode_text(prompt).float(), dim=1)
        steady = (pictures[1:] * pictures[:-1]).sum(1)
        return ClipScore(float((pictures @ text.T).mean()), float(steady.mean()) if len(steady) else None)

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        """Shorter side to S (bicubic, antialiased), centre S x S, normalised."""
        height, width = frames.shape[-2:]
        scale = self.size / min(height, width)
        sides = (max(self.size, round(height * scale)), max(self.size, round(width * scale)))
        sized = F.interpolate(frames, sides, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (sides[0] - self.size) // 2, (sides[1] - self.size) // 2
        sized = sized[..., top : top + self.size, left : left + self.size]
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (sized - mean) / std


def load_clip_model(name: str, weights: str | Path | None) -> ClipModel:
    """A model of open_clip with weights from a safetensors file on this machine; nothing is downloaded.

    Args:
        name: open_clip's name. OpenAI's weights belong to the names that end in -quickgelu: under the plain name they
            load without complaint and give wrong features.

    Raises:
        MissingWeights: no file.
        ValueError: unknown model, or the file does not fit it.
    """
    if weights is None or not Path(weights).is_file():
        raise MissingWeights(f"the CLIP score needs --weights: a safetensors file of open_clip's {name}")
    import open_clip
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if name not in open_clip.list_models():
        raise ValueError(
            f"open_clip knows no model {name!r}; ViT-B-32-quickgelu is one of {len(open_clip.list_models())}"
        )
    model: Any = open_clip.create_model(name, pretrained=None)
    try:
        model.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError, OSError) as error:
        raise ValueError(f"{weights} does not hold the weights of {name}: {str(error).splitlines()[0]}") from error
    model.eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(name)
    size = model.visual.image_size
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    return ClipModel(
        f"{name}@{digest[:12]}",
        model.encode_image,
        lambda text: model.encode_text(tokenizer([text])),
        size[0] if isinstance(size, tuple) else size,
        tuple(getattr(model.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN),
        tuple(getattr(model.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD),
    )
