"""The networks behind the dimensions, as callables, with the official program's resizing.

The official program resizes tensors without antialiasing, which moves scores in the third decimal; so do these. Only
`appearance_style` goes through PIL, which antialiases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sparsereel_eval.vbench.dimensions import Between, Features, Flow, Rating
from sparsereel_eval.vbench.weights import read_tensors

if TYPE_CHECKING:
    from sparsereel_eval.vbench.viclip import ViClip

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDE = 224
RAFT_UPDATES = 20
MUSIQ_SIDE = 512


def to_tensor(frame: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 or floats in [0, 1] to (1, 3, H, W) fp32 in [0, 1]."""
    tensor = torch.tensor(frame).permute(2, 0, 1)[None].float()
    return tensor / 255 if frame.dtype == np.uint8 else tensor


def shorter_side(pictures: torch.Tensor, side: int, mode: str) -> torch.Tensor:
    """(N, 3, H, W) resized without antialiasing so that the shorter side is `side`; the longer one is cut to whole
    pixels, as torchvision does."""
    height, width = pictures.shape[-2:]
    sides = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
    if sides == (height, width):
        return pictures
    return F.interpolate(pictures, sides, mode=mode, align_corners=False, antialias=False)


def centre(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """The middle (N, 3, side, side) of pictures that are at least as large."""
    top, left = (round((length - side) / 2) for length in pictures.shape[-2:])
    return pictures[..., top : top + side, left : left + side]


def _normalised(pictures: torch.Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in statistics)
    return (pictures - mean) / std


def subject_features(network: Callable[[torch.Tensor], torch.Tensor]) -> Features:
    """Frame to DINO's vector: shorter side 224, bilinear, no crop."""

    @torch.no_grad()
    def features(frame: np.ndarray) -> torch.Tensor:
        # Resized on 8-bit levels, then scaled.
        levels = shorter_side(to_tensor(frame) * 255, SIDE, "bilinear")
        return network(_normalised(levels / 255, _IMAGENET))[0]

    return features


def clip_features(encode: Callable[[torch.Tensor], torch.Tensor]) -> Features:
    """Frame to CLIP's vector: shorter side 224, bicubic on 8-bit levels with rounding, centre crop."""

    @torch.no_grad()
    def features(frame: np.ndarray) -> torch.Tensor:
        return encode(_clip_picture(frame))[0].float()

    return features


def _clip_picture(frame: np.ndarray) -> torch.Tensor:
    levels = shorter_side(to_tensor(frame) * 255, SIDE, "bicubic").round().clamp(0, 255)
    return _normalised(centre(levels, SIDE) / 255, _CLIP)


def video_features(encode: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Sequence[np.ndarray]], torch.Tensor]:
    """Frames to ViCLIP's vector of the clip: each frame prepared as for CLIP."""

    @torch.no_grad()
    def features(frames: Sequence[np.ndarray]) -> torch.Tensor:
        return encode(torch.stack([_clip_picture(frame) for frame in frames], 1))[0].float()

    return features


def pil_clip_features(encode: Callable[[torch.Tensor], torch.Tensor]) -> Features:
    """Frame to CLIP's vector by way of PIL's bicubic, which antialiases: CLIP's own preparation."""
    from PIL import Image

    @torch.no_grad()
    def features(frame: np.ndarray) -> torch.Tensor:
        levels = frame if frame.dtype == np.uint8 else np.rint(frame * 255).clip(0, 255).astype(np.uint8)
        height, width = levels.shape[:2]
        scale = SIDE / min(height, width)
        size = (SIDE, int(height * scale)) if width <= height else (int(width * scale), SIDE)
        sized = np.asarray(Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC))
        return encode(_normalised(centre(to_tensor(sized), SIDE), _CLIP))[0].float()

    return features


def aesthetic_rating(encode: Callable[[torch.Tensor], torch.Tensor], head: nn.Linear) -> Rating:
    """Frame to LAION's rating in [0, 10]: the linear head on CLIP's vector of length 1."""
    features = clip_features(encode)

    @torch.no_grad()
    def rating(frame: np.ndarray) -> float:
        return float(head(F.normalize(features(frame).float(), dim=-1)))

    return rating


def imaging_rating(network: Callable[[torch.Tensor], torch.Tensor]) -> Rating:
    """Frame to MUSIQ's rating in [0, 100]; longer sides over 512 are first brought to 512."""

    @torch.no_grad()
    def rating(frame: np.ndarray) -> float:
        picture = to_tensor(frame)
        height, width = picture.shape[-2:]
        if max(height, width) > MUSIQ_SIDE:
            scale = MUSIQ_SIDE / max(height, width)
            sides = int(scale * height), int(scale * width)
            picture = F.interpolate(picture * 255, sides, mode="bilinear", align_corners=False) / 255
        return float(network(picture))

    return rating


def optical_flow(network: nn.Module) -> Flow:
    """Two frames to RAFT's flow (H, W, 2) in pixels, padded to multiples of 8 by repetition; the padding stays in."""

    @torch.no_grad()
    def flow(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        pair = [F.pad(to_tensor(frame) * 2 - 1, _padding(frame, 8, 128), mode="replicate") for frame in (a, b)]
        return network(*pair, num_flow_updates=RAFT_UPDATES)[-1][0].permute(1, 2, 0).numpy()

    return flow


def interpolation(network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Between:
    """Two frames to the one halfway by AMT, 8-bit, cut to whole levels as the official program does."""
    from sparsereel_eval.vbench.amt import MULTIPLE, SMALLEST

    @torch.no_grad()
    def between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        left, right, top, bottom = padding = _padding(a, MULTIPLE, SMALLEST)
        pair = [F.pad(to_tensor(frame), padding, mode="replicate") for frame in (a, b)]
        middle = network(*pair)[0].permute(1, 2, 0).numpy()
        height, width = middle.shape[:2]
        return (middle[top : height - bottom, left : width - right] * 255).clip(0, 255).astype(np.uint8)

    return between


def _padding(frame: np.ndarray, multiple: int, smallest: int) -> tuple[int, int, int, int]:
    """Left, right, top, bottom to a multiple and at least the smallest side, half on each side."""
    height, width = ((max(smallest, -(-length // multiple) * multiple) - length) for length in frame.shape[:2])
    return width // 2, width - width // 2, height // 2, height - height // 2


def load_dino(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """DINO ViT-B/16 from its published file."""
    import timm

    network = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0, dynamic_img_size=True)
    return _filled(network, path, "DINO ViT-B/16")


def load_clip(path: Path, name: str) -> Any:
    """A CLIP model of open_clip from a safetensors file; OpenAI's weights go with names that end in -quickgelu."""
    import open_clip

    return _filled(open_clip.create_model(name, pretrained=None), path, name)


def load_head(path: Path) -> nn.Linear:
    """LAION's linear rating of ViT-L/14 features."""
    head: nn.Linear = _filled(nn.Linear(768, 1), path, "the aesthetic head")
    return head


def load_raft(path: Path) -> nn.Module:
    """RAFT (large) as torchvision has it."""
    from torchvision.models.optical_flow import raft_large

    network: nn.Module = _filled(raft_large(weights=None), path, "RAFT (large)")
    return network


def load_amt(path: Path) -> nn.Module:
    """AMT-S from its published file."""
    from sparsereel_eval.vbench.amt import AmtS

    network: nn.Module = _filled(AmtS(), path, "AMT-S")
    return network


def load_viclip(path: Path) -> ViClip:
    """ViCLIP from its published file."""
    from sparsereel_eval.vbench.viclip import ViClip

    with torch.device("meta"):
        empty = ViClip()
    network: ViClip = _filled(empty, path, "ViCLIP")
    return network


def load_musiq(path: Path) -> nn.Module:
    """MUSIQ (SPAQ) from IQA-PyTorch's file."""
    from sparsereel_eval.vbench.musiq import Musiq

    network: nn.Module = _filled(Musiq(), path, "MUSIQ")
    return network


def _filled(network: Any, path: Path, name: str) -> Any:
    try:
        # Assigned where the network was built without memory.
        empty = any(parameter.is_meta for parameter in network.parameters())
        network.load_state_dict(read_tensors(path), assign=empty)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of {name}: {str(error).splitlines()[0]}") from error
    return network.eval().requires_grad_(False)
