"""AMT-S (Li et al., AMT: All-Pairs Multi-Field Transforms for Efficient Frame Interpolation, CVPR 2023): the frame
halfway between two frames, with the parameter names of the published amt-s.pth.

Coarse to fine: a decoder guesses the motions from the middle frame to both sides, the correlation of all pairs of
places corrects them (RAFT's lookup, both ways), and the finest decoder hands out three pairs of motions, whose warped
blends are merged. Motions are (N, 2, H, W), x before y, in pixels of their own level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS = (20, 32, 44, 56)  # of the pyramid, from half to a sixteenth of the size
SKIP = 20
FLOWS = 3
RADIUS, LEVELS = 3, 4
#: sides must be multiples of this, and at least SMALLEST, or the coarsest correlation has a single place
MULTIPLE, SMALLEST = 16, 128


class AmtS(nn.Module):
    """Two pictures to the one halfway between them."""

    def __init__(self) -> None:
        super().__init__()
        self.feat_encoder = _Matcher(84)
        self.encoder = _Pyramid()
        first, second, third, fourth = CHANNELS
        self.decoder4 = _Decoder(2 * fourth + 1, 4 + third)
        self.decoder3 = _Decoder(3 * third + 4, 4 + second)
        self.decoder2 = _Decoder(3 * second + 4, 4 + first)
        self.decoder1 = _Decoder(3 * first + 4, 8 * FLOWS)
        self.update4 = _Update(third, 1)
        self.update3 = _Update(second, 2)
        self.update2 = _Update(first, 4)
        self.comb_block = nn.Sequential(
            nn.Conv2d(3 * FLOWS, 6 * FLOWS, 3, padding=1), nn.PReLU(6 * FLOWS), nn.Conv2d(6 * FLOWS, 3, 3, padding=1)
        )

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Pictures (N, 3, H, W) in [0, 1], H and W multiples of 16 and at least 128; returns the same shape."""
        mean = torch.cat([a, b], 2).mean((1, 2, 3), keepdim=True)
        a, b = a - mean, b - mean
        lookup = Correlation(*self.feat_encoder(torch.cat([a, b])).chunk(2))
        sides = list(zip(self.encoder(a), self.encoder(b), strict=True))
        coarsest = sides[3][0]
        when = torch.full_like(coarsest[:, :1], 0.5)
        found = self.decoder4.convblock(torch.cat([*sides[3], when], 1))
        flows, features = self._corrected(self.update4, lookup, found[:, :4], found[:, 4:], 1)
        for decoder, update, (left, right), scale in (
            (self.decoder3, self.update3, sides[2], 2),
            (self.decoder2, self.update2, sides[1], 4),
        ):
            found = decoder.convblock(_seen_from_the_middle(features, left, right, flows))
            flows, features = self._corrected(
                update, lookup, found[:, :4] + 2 * _resized(flows, 2), found[:, 4:], scale
            )
        found = self.decoder1.convblock(_seen_from_the_middle(features, *sides[0], flows))
        return self._blended(a, b, flows, found, mean).clamp(0, 1)

    @staticmethod
    def _corrected(
        update: _Update, lookup: Correlation, flows: torch.Tensor, features: torch.Tensor, scale: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Motions and features with what the correlation, at an eighth of the size, says about them."""
        coarse = flows if scale == 1 else _resized(flows, 1 / scale) / scale
        # Motion is taken as straight: from one side to the other is twice as far as from the middle.
        to_a, to_b = 2 * coarse[:, :2], 2 * coarse[:, 2:]
        more_features, more_flows = update(features, coarse, lookup(to_b, to_a))
        return flows + more_flows, features + more_features

    def _blended(
        self, a: torch.Tensor, b: torch.Tensor, flows: torch.Tensor, found: torch.Tensor, mean: torch.Tensor
    ) -> torch.Tensor:
        n, _, height, width = a.shape
        to_a, to_b, mask, rest = found.split([2 * FLOWS, 2 * FLOWS, FLOWS, 3 * FLOWS], 1)
        finest = 2 * _resized(flows, 2)
        to_a = (to_a + finest[:, :2].repeat(1, FLOWS, 1, 1)).reshape(n * FLOWS, 2, height, width)
        to_b = (to_b + finest[:, 2:].repeat(1, FLOWS, 1, 1)).reshape(n * FLOWS, 2, height, width)
        share = mask.sigmoid().reshape(n * FLOWS, 1, height, width)
        left, right = (warped(x.repeat_interleave(FLOWS, 0), f) for x, f in ((a, to_a), (b, to_b)))
        blends = (share * left + (1 - share) * right).reshape(n, FLOWS, 3, height, width)
        blends = blends + mean[:, None] + rest.reshape(n, FLOWS, 3, height, width)
        return blends.mean(1) + self.comb_block(blends.flatten(1, 2))


def _seen_from_the_middle(
    features: torch.Tensor, left: torch.Tensor, right: torch.Tensor, flows: torch.Tensor
) -> torch.Tensor:
    return torch.cat([features, warped(left, flows[:, :2]), warped(right, flows[:, 2:]), flows], 1)


def warped(picture: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """picture at (place + flow), bilinear; places outside take the nearest of the border."""
    height, width = picture.shape[-2:]
    return _sample(picture, _places(height, width, picture) + flow.permute(0, 2, 3, 1), "border")


def _sample(picture: torch.Tensor, places: torch.Tensor, outside: str) -> torch.Tensor:
    """(N, C, H, W) at places (N, h, w, 2) in pixels."""
    height, width = picture.shape[-2:]
    size = torch.tensor([width - 1, height - 1], dtype=places.dtype, device=places.device)
    return F.grid_sample(picture, 2 * places / size - 1, padding_mode=outside, align_corners=True)


def _places(height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """(1, height, width, 2): x and y of every place."""
    y, x = (torch.arange(length, dtype=like.dtype, device=like.device) for length in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]


def _resized(x: torch.Tensor, factor: float) -> torch.Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


class Correlation:
    """Products of the features of all places of a with all of b, and of b with a, on four levels."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor):
        n, depth, self.height, self.width = a.shape
        products = torch.einsum("ncp,ncq->npq", a.flatten(2), b.flatten(2)) / depth**0.5
        shape = (n * self.height * self.width, 1, self.height, self.width)
        self.pyramids = [[x.reshape(shape)] for x in (products, products.transpose(1, 2))]
        for pyramid in self.pyramids:
            while len(pyramid) < LEVELS:
                pyramid.append(F.avg_pool2d(pyramid[-1], 2))

    def __call__(self, to_b: torch.Tensor, to_a: torch.Tensor) -> torch.Tensor:
        """Products within 3 places of where the motions lead, on every level: (N, 2 x 196, height, width)."""
        n = to_b.shape[0]
        steps = torch.arange(-RADIUS, RADIUS + 1, dtype=to_b.dtype, device=to_b.device)
        # As the published weights expect it: columns one after another, x before y.
        around = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)
        found = []
        for pyramid, flow in zip(self.pyramids, (to_b, to_a), strict=True):
            centre = (_places(self.height, self.width, flow) + flow.permute(0, 2, 3, 1)).reshape(-1, 1, 1, 2)
            for level, products in enumerate(pyramid):
                near = _sample(products, centre / 2**level + around, "zeros")
                found.append(near.reshape(n, self.height, self.width, -1).permute(0, 3, 1, 2))
        return torch.cat(found, 1)


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.PReLU(outputs))


class _Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for level, (inputs, outputs) in enumerate(zip((3, *CHANNELS), CHANNELS, strict=False), start=1):
            step = nn.Sequential(_convolution(inputs, outputs, 2), _convolution(outputs, outputs))
            self.add_module(f"pyramid{level}", step)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        levels = []
        for step in self.children():
            x = step(x)
            levels.append(x)
        return levels


class _SideBlock(nn.Module):
    """A residual block whose last channels get convolutions of their own in between."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv3 = _convolution(channels, channels), _convolution(channels, channels)
        self.conv2, self.conv4 = _convolution(SKIP, SKIP), _convolution(SKIP, SKIP)
        self.conv5 = nn.Conv2d(channels, channels, 3, padding=1)
        self.prelu = nn.PReLU(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv1(x)
        for side, whole in ((self.conv2, self.conv3), (self.conv4, self.conv5)):
            out = whole(torch.cat([out[:, :-SKIP], side(out[:, -SKIP:])], 1))
        return self.prelu(x + out)


class _Decoder(nn.Module):
    """To twice the size. `inputs` channels; the widths inside leave out what is not a feature (time, motions)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        # Time is one channel more than the features of the coarsest level, motions are four more.
        width = inputs - (1 if inputs % 2 else 4)
        self.convblock = nn.Sequential(
            _convolution(inputs, width), _SideBlock(width), nn.ConvTranspose2d(width, outputs, 4, 2, 1)
        )


class _Update(nn.Module):
    """Corrections of features and motions from the correlation; `scale` is the level's size over an eighth."""

    def __init__(self, channels: int, scale: int, hidden: int = 76):
        super().__init__()
        self.scale = scale
        self.convc1 = nn.Conv2d(2 * LEVELS * (2 * RADIUS + 1) ** 2, 64, 1)
        self.convf1 = nn.Conv2d(4, 40, 7, padding=3)
        self.convf2 = nn.Conv2d(40, 20, 3, padding=1)
        self.conv = nn.Conv2d(84, 68, 3, padding=1)
        self.gru = _pair(68 + 4 + channels, hidden, hidden)
        self.feat_head = _pair(hidden, hidden, channels)
        self.flow_head = _pair(hidden, hidden, 4)

    def forward(
        self, features: torch.Tensor, flows: torch.Tensor, near: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.scale > 1:
            features = _resized(features, 1 / self.scale)
        seen = torch.cat([_leaky(self.convc1(near)), _leaky(self.convf2(_leaky(self.convf1(flows))))], 1)
        state = self.gru(torch.cat([_leaky(self.conv(seen)), flows, features], 1))
        features, flows = self.feat_head(state), self.flow_head(state)
        if self.scale == 1:
            return features, flows
        return _resized(features, self.scale), self.scale * _resized(flows, self.scale)


def _leaky(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, 0.1)


def _pair(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(hidden, outputs, 3, padding=1)
    )


class _Matcher(nn.Module):
    """RAFT's small encoder: features at an eighth of the size, to be correlated."""

    def __init__(self, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 7, 2, 3)
        self.layer1 = nn.Sequential(_Bottleneck(32, 32, 1), _Bottleneck(32, 32, 1))
        self.layer2 = nn.Sequential(_Bottleneck(32, 64, 2), _Bottleneck(64, 64, 1))
        self.layer3 = nn.Sequential(_Bottleneck(64, 96, 2), _Bottleneck(96, 96, 1))
        self.conv2 = nn.Conv2d(96, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.instance_norm(self.conv1(x)))
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        inner = outputs // 4
        self.conv1 = nn.Conv2d(inputs, inner, 1)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1)
        self.conv3 = nn.Conv2d(inner, outputs, 1)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.InstanceNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x
        for step in (self.conv1, self.conv2, self.conv3):
            out = F.relu(F.instance_norm(step(out)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))
