"""What turns clips into feature vectors for FID, KID and FVD; any callable can take its place.

| name | of | length | weights |
|---|---|---|---|
| judge | pictures | 144 | in the package: convolutions of minireel's judge over each colour channel |
| judge-motion | clips | 288 | the same; mean over frames, and mean absolute change between neighbours |
| torchvision:NAME | pictures or clips | its own | a file named by the user |
| videomae:SIZE | clips | 384 to 1280 | a file named by the user |

The judge's features know handwritten digits: they fit minireel, not photographs. Figures of two extractors, and of
torchvision's Inception against the original FID network, cannot be compared; every result names its extractor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sparsereel_eval import videomae
from sparsereel_eval.lpips import MissingWeights
from sparsereel_eval.readers import ClipFile, open_clip

# Side in pixels; frames of a clip.
PICTURE_NETS = {"resnet18": 224, "resnet50": 224, "inception_v3": 299, "vit_b_16": 224, "convnext_tiny": 224}
CLIP_NETS = {"r3d_18": (16, 112), "mc3_18": (16, 112), "r2plus1d_18": (16, 112), "mvit_v2_s": (16, 224)}
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_KINETICS = {"mvit_v2_s": ((0.45,) * 3, (0.225,) * 3)}
_KINETICS_R3D = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)


@dataclass(frozen=True)
class Extractor:
    """A feature extractor.

    Attributes:
        name: With what identifies the weights; stands in every result and every stored file.
        of: "pictures": called with (N, 3, H, W) in [0, 1], one vector a picture. "clips": with (1, F, 3, H, W).
        function: Returns (N, D).
        frames: Frames a clip hands over, spread evenly; None for all of them.
    """

    name: str
    of: str
    function: Callable[[torch.Tensor], torch.Tensor]
    frames: int | None

    def __post_init__(self) -> None:
        if self.of not in ("pictures", "clips"):
            raise ValueError(f"an extractor works on pictures or clips, got {self.of!r}")


def make_extractor(name: str, of: str, *, weights: str | Path | None = None, frames: int | None = None) -> Extractor:
    """An extractor by name.

    Args:
        name: "judge", "torchvision:NAME" or "videomae:SIZE".
        of: "pictures" (FID, KID) or "clips" (FVD).
        weights: Safetensors file of the network.
        frames: Frames taken from a clip; default 4 pictures, or what the clip network was trained on.

    Raises:
        MissingWeights: a network without a file.
        ValueError: unknown name, a file that does not fit, or another number of frames than VideoMAE's 16.
    """
    if name == "judge":
        if of == "clips":
            return Extractor("judge-motion", of, _JudgeFeatures().clip, frames)
        return Extractor("judge", of, _JudgeFeatures().pictures, frames or 4)
    nets = PICTURE_NETS if of == "pictures" else CLIP_NETS
    known = [f"torchvision:{each}" for each in nets]
    known += [f"videomae:{size}" for size in videomae.SIZES] if of == "clips" else []
    if name not in known:
        allowed = ", ".join(["judge", *known])
        raise ValueError(f"unknown features {name!r} of {of}; allowed: {allowed}")
    if name.startswith("videomae:") and frames not in (None, videomae.FRAMES):
        raise ValueError(f"{name} takes {videomae.FRAMES} frames of a clip, not {frames}")
    if weights is None or not Path(weights).is_file():
        raise MissingWeights(f"the features {name} need a safetensors file of the network's weights, got {weights}")
    kind, net = name.split(":")
    path = Path(weights)
    network = _torchvision(net, path) if kind == "torchvision" else videomae.load_videomae(net, path)
    named = f"{name}@{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    if of == "pictures":
        return Extractor(named, of, _Pictures(network, PICTURE_NETS[net]), frames or 4)
    if kind == "videomae":
        return Extractor(named, of, _Clips(network, videomae.SIDE, *_IMAGENET), videomae.FRAMES)
    length, side = CLIP_NETS[net]
    return Extractor(named, of, _Clips(network, side, *_KINETICS.get(net, _KINETICS_R3D)), frames or length)


class _JudgeFeatures:
    def __init__(self) -> None:
        from sparsereel_eval.classifier import load_classifier

        layers = list(load_classifier())
        end = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.AdaptiveMaxPool2d))
        self.trunk = nn.Sequential(*layers[:end]).eval()

    @torch.no_grad()
    def pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        n = pictures.shape[0]
        channels = pictures.reshape(n * 3, 1, *pictures.shape[2:])
        return self.trunk(channels).mean((2, 3)).reshape(n, -1)

    def clip(self, clips: torch.Tensor) -> torch.Tensor:
        rows = []
        for clip in clips:
            found = torch.cat([self.pictures(part) for part in clip.split(16)])
            change = found.diff(dim=0).abs().mean(0) if len(found) > 1 else torch.zeros_like(found[0])
            rows.append(torch.cat([found.mean(0), change]))
        return torch.stack(rows)


def _torchvision(net: str, path: Path) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torchvision import models

    package = models if net in PICTURE_NETS else models.video
    extra = {"init_weights": False, "transform_input": False} if net == "inception_v3" else {}
    network: nn.Module = getattr(package, net)(weights=None, **extra)
    try:
        network.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError, OSError) as error:
        raise ValueError(f"{path} does not hold the weights of {net}: {str(error).splitlines()[0]}") from error
    for head in ("fc", "heads", "head", "classifier"):
        if hasattr(network, head):
            keep = list(getattr(network, head).children())[:-1] if net == "convnext_tiny" else []
            setattr(network, head, nn.Sequential(*keep) if keep else nn.Identity())
    return network.eval().requires_grad_(False)


class _Pictures:
    def __init__(self, network: nn.Module, side: int):
        self.network, self.side = network, side

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in _IMAGENET)
        # One size for every picture; antialiased, as a plain resize shifts FID by points.
        sized = F.interpolate(pictures, (self.side, self.side), mode="bilinear", antialias=True)
        return self.network((sized - mean) / std).flatten(1)


class _Clips:
    def __init__(self, network: nn.Module, side: int, mean: tuple[float, ...], std: tuple[float, ...]):
        self.network, self.side = network, side
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))

    @torch.no_grad()
    def __call__(self, clips: torch.Tensor) -> torch.Tensor:
        n, frames = clips.shape[:2]
        sized = F.interpolate(clips.flatten(0, 1), (self.side, self.side), mode="bilinear", antialias=True)
        sized = ((sized - self.mean) / self.std).view(n, frames, 3, self.side, self.side)
        return self.network(sized.transpose(1, 2)).flatten(1)


def clip_features(path: str | Path, extractor: Extractor) -> torch.Tensor:
    """Features of one clip: (frames taken, D) of pictures, or (1, D) of the clip; fp32.

    Raises:
        ValueError: unreadable, or fewer frames than a clip network needs.
    """
    clip = open_clip(path)
    frames = pick_frames(clip, extractor.frames)
    if extractor.of == "clips":
        if extractor.frames is not None and len(frames) < extractor.frames:
            raise ValueError(f"{path} has {len(frames)} frames, {extractor.name} needs {extractor.frames}")
        return extractor.function(frames[None]).float().cpu()
    return extractor.function(frames).float().cpu()


def pick_frames(clip: ClipFile, count: int | None) -> torch.Tensor:
    """`count` frames spread evenly (the middle of equal parts), or all: (F, 3, H, W) fp32 in [0, 1].

    Fewer are returned where the clip is shorter. A clip of unknown length is decoded twice rather than held.
    """
    total = clip.frames if clip.frames is not None else sum(1 for _ in clip)
    if count is None or count >= total:
        wanted = set(range(total))
    else:
        wanted = {int((i + 0.5) * total / count) for i in range(count)}
    kept = [frame for index, frame in enumerate(clip) if index in wanted]
    return torch.stack([_to_tensor(frame) for frame in kept])


def _to_tensor(frame: np.ndarray) -> torch.Tensor:
    tensor = torch.tensor(frame, dtype=torch.float32).permute(2, 0, 1)
    return tensor / 255 if frame.dtype == np.uint8 else tensor
