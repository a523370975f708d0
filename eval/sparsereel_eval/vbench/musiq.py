"""MUSIQ (Ke et al., Multi-scale Image Quality Transformer, ICCV 2021): a picture's quality, with the parameter names of
IQA-PyTorch's musiq_spaq_ckpt-358bb6af.pth.

The picture at two sizes and its own is cut into patches of 32 pixels; a small convolutional network makes each a token,
places are hashed to a grid of 10 x 10, and a transformer's class token gives the rating, 0 to 100 for SPAQ.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

PATCH, GRID, WIDTH, LAYERS, HEADS, MLP = 32, 10, 384, 14, 6, 1152
LONGER_SIDES = (224, 384)
_INPUTS = ("query", "key", "value")


class Musiq(nn.Module):
    """Pictures (N, 3, H, W) in [0, 1] to ratings (N,)."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.conv_root = _Convolution(3, 64, 7, 2, bias=False)
        self.gn_root = nn.GroupNorm(32, 64, eps=1e-6)
        self.block1 = _Bottleneck(64, 256)
        self.embedding = nn.Linear(256 * (PATCH // 4) ** 2, WIDTH)
        self.transformer_encoder = _Encoder(layers)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        tokens, places, scales = [], [], []
        for scale, sized in enumerate(_sizes(pictures * 2 - 1)):
            patches, count = _patches(sized)
            tokens.append(self._tokens(patches))
            places.append(hashed_places(*count))
            scales.append(torch.full_like(places[-1], scale))
        x = torch.cat(tokens, 1)
        found: torch.Tensor = self.transformer_encoder(x, torch.cat(places), torch.cat(scales))
        return self.head(found).flatten()

    def _tokens(self, patches: torch.Tensor) -> torch.Tensor:
        """(N, P, 3, 32, 32) to (N, P, width)."""
        n, count = patches.shape[:2]
        x = F.relu(self.gn_root(self.conv_root(patches.flatten(0, 1))))
        x = self.block1(F.max_pool2d(_same(x, 3, 2), 3, 2))
        # Channels last, as TensorFlow flattened them.
        return self.embedding(x.permute(0, 2, 3, 1).reshape(n, count, -1))


def _sizes(pictures: torch.Tensor) -> list[torch.Tensor]:
    height, width = pictures.shape[-2:]
    ratios = [side / max(height, width) for side in LONGER_SIDES]
    sides = [(max(1, round(height * ratio)), max(1, round(width * ratio))) for ratio in ratios]
    return [F.interpolate(pictures, size, mode="bicubic", align_corners=False) for size in sides] + [pictures]


def _patches(pictures: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Patches in reading order, zeros around what does not fill them: (N, P, 3, 32, 32); how many (down, across)."""
    count = tuple(math.ceil(side / PATCH) for side in pictures.shape[-2:])
    cut = F.unfold(_same(pictures, PATCH, PATCH), PATCH, stride=PATCH)
    return cut.transpose(1, 2).reshape(len(pictures), -1, 3, PATCH, PATCH), (count[0], count[1])


def hashed_places(down: int, across: int) -> torch.Tensor:
    """Which of the 10 x 10 learnt places each of the patches takes, (down * across,)."""
    grid = torch.arange(float(GRID))[None, None]
    y, x = (F.interpolate(grid, count, mode="nearest")[0, 0].long() for count in (down, across))
    return (y[:, None] * GRID + x).flatten()


def _same(x: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """TensorFlow's padding: as many outputs as the size over the stride, rounded up; the odd zero at the end."""
    needed = [max(0, (math.ceil(side / stride) - 1) * stride + kernel - side) for side in x.shape[-2:]]
    (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in needed)
    return F.pad(x, (left, right, top, bottom))


class _Convolution(nn.Conv2d):
    """Weights are standardised for every output channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(_same(x, self.kernel_size[0], self.stride[0]), weight, self.bias, self.stride)


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1, self.gn1 = _Convolution(inputs, inputs, 1, bias=False), nn.GroupNorm(32, inputs, eps=1e-4)
        self.conv2, self.gn2 = _Convolution(inputs, inputs, 3, bias=False), nn.GroupNorm(32, inputs, eps=1e-4)
        self.conv3, self.gn3 = _Convolution(inputs, outputs, 1, bias=False), nn.GroupNorm(32, outputs, eps=1e-4)
        self.conv_proj, self.gn_proj = _Convolution(inputs, outputs, 1, bias=False), nn.GroupNorm(32, outputs, eps=1e-4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.gn1(self.conv1(x)))
        y = self.gn3(self.conv3(F.relu(self.gn2(self.conv2(y)))))
        return F.relu(y + self.gn_proj(self.conv_proj(x)))


class _Encoder(nn.Module):
    def __init__(self, layers: int):
        super().__init__()
        self.posembed_input = nn.ParameterDict({"position_emb": torch.zeros(1, GRID * GRID, WIDTH)})
        self.scaleembed_input = nn.ParameterDict({"scale_emb": torch.zeros(len(LONGER_SIDES) + 1, WIDTH)})
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.encoder_norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.transformer = nn.ModuleDict({f"encoderblock_{i}": _Block() for i in range(layers)})

    def forward(self, x: torch.Tensor, places: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Tokens (N, P, width) to the class token (N, width)."""
        x = x + self.posembed_input["position_emb"][0, places] + self.scaleembed_input["scale_emb"][scales]
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)
        for block in self.transformer.values():
            x = block(x)
        return self.encoder_norm(x[:, 0])


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attention = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in (*_INPUTS, "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, MLP), "fc2": nn.Linear(MLP, WIDTH)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        n, count, _ = y.shape
        q, k, v = (self.attention[name](y).view(n, count, HEADS, -1).transpose(1, 2) for name in _INPUTS)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, count, WIDTH)
        x = x + self.attention["out"](mixed)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
