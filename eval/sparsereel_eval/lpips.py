"""LPIPS: distance of two pictures in the features of a classification network (Zhang et al., 2018).

    d(x, y) = sum over layers of mean over places of w_l . (phi_l(x) - phi_l(y))^2

phi_l are a layer's activations, scaled to length 1 over the channels, w_l >= 0 the published weights (version 0.1) that
torchmetrics carries. The network itself, torchvision's AlexNet or VGG16 trained on ImageNet, is a file that must be on
this machine; nothing is downloaded unless asked. Figures of the two networks cannot be compared.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import nn

# torchvision puts the first digits of a file's SHA-256 into its name; they are checked before the file is opened.
FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
URL = "https://download.pytorch.org/models/"
_TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
_SMALLEST = {"alex": 32, "vgg": 16}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MissingWeights(ValueError):
    """A network's file is not on this machine; the text names it."""


class Lpips(nn.Module):
    """LPIPS with a given network.

    Args:
        trunk: The `features` of torchvision's AlexNet or VGG16.
        net: "alex" or "vgg".
    """

    def __init__(self, trunk: nn.Sequential, net: str = "alex"):
        super().__init__()
        self.trunk, self.net = trunk, net
        self.heads = [weight.requires_grad_(False) for weight in _heads(net)]
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Distance of each pair of pictures (N, 3, H, W) in [0, 1]: (N,) fp32, 0 for equal ones."""
        if min(x.shape[-2:]) < _SMALLEST[self.net]:
            raise ValueError(f"LPIPS ({self.net}) needs pictures of at least {_SMALLEST[self.net]} pixels a side")
        total = torch.zeros(x.shape[0], device=x.device)
        for a, b, head in zip(self._features(x), self._features(y), self.heads, strict=True):
            total += ((a - b).square() * head.to(a.device)).sum(1).mean((1, 2))
        return total

    def _features(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        mean, std = (torch.tensor(v, device=pictures.device).view(1, 3, 1, 1) for v in (_MEAN, _STD))
        state = (pictures.float() - mean) / std
        found = []
        # The last pooling comes after the last tap, and would fail on small pictures.
        for index, layer in enumerate(self.trunk[: _TAPS[self.net][-1] + 1]):
            state = layer(state)
            if index in _TAPS[self.net]:
                found.append(state / (state.square().sum(1, keepdim=True).sqrt() + 1e-8))
        return found


def load_lpips(net: str = "alex", weights: str | Path | None = None, *, download: bool = False) -> Lpips:
    """LPIPS with ImageNet weights from this machine.

    Args:
        net: "alex" or "vgg".
        weights: Safetensors or torchvision's own .pth file; default torchvision's place for downloads.
        download: Fetch the file from pytorch.org (alex 233 MB, vgg 528 MB) where it is missing.

    Raises:
        MissingWeights: the file is not there and `download` is off.
        ValueError: unknown network, or the file is not these weights.
    """
    if net not in FILES:
        raise ValueError(f"unknown LPIPS network {net!r}; allowed: {', '.join(FILES)}")
    path = find_weights(net) if weights is None else Path(weights)
    if not path.is_file():
        if not download or weights is not None:
            raise MissingWeights(f"LPIPS needs the file {path} (from {URL}{FILES[net]}; --download fetches it)")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL + FILES[net], str(path), hash_prefix=_digits(FILES[net]))
    from torchvision import models

    trunk = (models.alexnet if net == "alex" else models.vgg16)(weights=None).features
    try:
        state = _read_weights(path)
        features = {k.removeprefix("features."): v for k, v in state.items() if not k.startswith("classifier.")}
        trunk.load_state_dict(features)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} does not hold the {net} weights: {str(error).splitlines()[0]}") from error
    return Lpips(trunk, net)


def find_weights(net: str) -> Path:
    """Where torchvision keeps the network's file, whether it is there or not."""
    home = os.environ.get("TORCH_HOME", "~/.cache/torch")
    return Path(home).expanduser() / "hub" / "checkpoints" / FILES[net]


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    if path.name not in FILES.values():
        raise ValueError(f"{path}: weights must be safetensors, or torchvision's file {' or '.join(FILES.values())}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(_digits(path.name)):
        raise ValueError(f"{path} is damaged: its SHA-256 begins with {digest[:8]}, not {_digits(path.name)}")
    return torch.load(path, map_location="cpu", weights_only=True)


def _digits(name: str) -> str:
    return name.rsplit("-", 1)[1].split(".")[0]


def _heads(net: str) -> list[torch.Tensor]:
    """The published weights of each layer, (1, C, 1, 1), from torchmetrics' package data."""
    from torchmetrics.functional.image import lpips

    file = Path(lpips.__file__).parent / "lpips_models" / f"{net}.pth"
    state = torch.load(file, map_location="cpu", weights_only=True)
    return [state[f"lin{i}.model.1.weight"] for i in range(len(_TAPS[net]))]
