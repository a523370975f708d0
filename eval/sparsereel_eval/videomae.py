"""VideoMAE (Tong et al., 2022) as a feature extractor of clips: transformers' network, weights from a safetensors file.

The file is the one published beside a model, such as `model.safetensors` of MCG-NJU/videomae-base-finetuned-kinetics.
The vector is the mean over the patches of all frames, through the norm before the classifier where the file has one.
The VideoMAE-v2 network of cd-fvd is another one: figures do not compare.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

FRAMES, SIDE = 16, 224
#: width, layers, heads
SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}


class VideoMae(nn.Module):
    """Clips (N, 3, 16, 224, 224), normalised, to (N, D)."""

    def __init__(self, network: Any, norm: nn.LayerNorm | None):
        super().__init__()
        self.network, self.norm = network, norm

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.network(clips.transpose(1, 2)).last_hidden_state.mean(1)
        return found if self.norm is None else self.norm(found)


def load_videomae(size: str, path: Path) -> VideoMae:
    """A network of `SIZES` with the weights of a file; a decoder or classifier in it is left out.

    Raises:
        ValueError: unreadable, or not the weights of this size.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import VideoMAEConfig, VideoMAEModel

    width, layers, heads = SIZES[size]
    try:
        state = {name.removeprefix("videomae."): value for name, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {str(error).splitlines()[0]}") from error
    config = VideoMAEConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        # Files of mean pooling have no norm on the patches, but one on their mean.
        use_mean_pooling="layernorm.weight" not in state,
    )
    network = VideoMAEModel(config)
    known = network.state_dict()
    kept = {new: value for name, value in state.items() if (new := _named(name, known)) in known}
    norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if "fc_norm.weight" in state else None
    try:
        network.load_state_dict(kept)
        if norm is not None:
            norm.load_state_dict({part: state[f"fc_norm.{part}"] for part in ("weight", "bias")})
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"{path} does not hold the weights of VideoMAE {size}: {str(error).splitlines()[0]}"
        ) from error
    return VideoMae(network, norm).eval().requires_grad_(False)


def _named(name: str, known: dict[str, torch.Tensor]) -> str:
    """A weight's name in the installed transformers: version 5 renamed the biases of queries and values."""
    for old, new in ((".q_bias", ".query.bias"), (".v_bias", ".value.bias")):
        for before, after in ((old, new), (new, old)):
            if name.endswith(before) and name not in known:
                return name.removesuffix(before) + after
    return name
