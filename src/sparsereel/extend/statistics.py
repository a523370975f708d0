"""Group statistics over windows of the trained size (TLC, arXiv 2112.04491), for U-Nets and VAE decoders."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsereel.extend.on_pipeline import at_work

if TYPE_CHECKING:
    from sparsereel.extend.extension import Extension
    from sparsereel.runtime import ModelRuntime

Window = tuple[int, int]


@dataclass(frozen=True)
class LocalStatistics:
    """Group norms see windows of the size that they were trained on, not the whole larger picture.

    A normalisation whose mean and variance are taken over the whole picture meets other numbers at another size. With
    k = `factor` times the side of the trained feature map, mean and variance are taken over k x k windows around each
    place (shifted inward at the borders), over the channels of the group, as in the original. Where the map is no
    larger than k the norm is the plain one, bit for bit.

    Args:
        factor: window over trained side; the paper's 1.5.

    Raises:
        ValueError: a factor that is not positive.
    """

    factor: float = 1.5

    name: ClassVar[str] = "tlc"

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"local statistics need a positive factor, got {self.factor}")

    def install(self, model: nn.Module, extension: Extension, runtime: ModelRuntime) -> list[Any]:
        """Change every group norm of a U-Net; returns handles with `.remove()`.

        Raises:
            ValueError: the model has no group norms, so nothing would change.
        """
        norms = _norms(model)
        if not norms:
            raise ValueError(f"tlc changes group norms, and {type(model).__name__} has none")

        def ratios() -> tuple[float, float] | None:
            layout = runtime.layout
            if layout is None or not extension.concerns((layout[1], layout[2], layout[3])):
                return None
            return extension.sizes.ratios[1:]

        return [LocalNorm(norm, self.factor, ratios) for norm in norms]

    def install_vae(self, vae: nn.Module, extension: Extension, model: nn.Module) -> list[Any]:
        """Change the group norms of a VAE's decoder; none where it has none (Wan's VAE normalises place by place)."""
        decoder = getattr(vae, "decoder", None)
        norms = [] if decoder is None else _norms(decoder)
        if not norms:
            return []
        call = _DecoderCall(extension, model)
        return [
            decoder.register_forward_pre_hook(call.begin),  # type: ignore[union-attr]
            decoder.register_forward_hook(call.end, always_call=True),  # type: ignore[union-attr]
            *(LocalNorm(norm, self.factor, call.ratios) for norm in norms),
        ]


class _DecoderCall:
    """How large the latents are that a decoder is working on."""

    def __init__(self, extension: Extension, model: nn.Module) -> None:
        self.extension = extension
        self.model = model
        self.found: tuple[float, float] | None = None

    def begin(self, module: nn.Module, args: Any) -> None:
        if not at_work(self.model, self.extension):
            return
        sizes = self.extension.sizes
        side = (sizes.trained[1] / sizes.scale.pixels, sizes.trained[2] / sizes.scale.pixels)
        height, width = args[0].shape[-2:]
        self.found = (height / side[0], width / side[1])

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.found = None

    def ratios(self) -> tuple[float, float] | None:
        return self.found


def _norms(model: nn.Module) -> list[nn.GroupNorm]:
    return [module for module in model.modules() if isinstance(module, nn.GroupNorm)]


class LocalNorm:
    """Stands in for the forward of one group norm."""

    def __init__(self, norm: nn.GroupNorm, factor: float, ratios: Callable[[], tuple[float, float] | None]) -> None:
        if "forward" in vars(norm):
            raise ValueError("another library has replaced a group norm of this model; remove that first")
        self.norm = norm
        self.factor = factor
        self.ratios = ratios
        # A bound method is copied together with the model, unlike a closure.
        norm.forward = MethodType(_forward, self)  # type: ignore[method-assign]

    def remove(self) -> None:
        """Leave the instance as it was."""
        vars(self.norm).pop("forward", None)

    def window(self, size: Window) -> Window:
        """The window for features of this size; the size itself where nothing is to change."""
        ratios = self.ratios()
        if ratios is None:
            return size
        a, b = (min(n, math.ceil(self.factor * n / max(r, 1.0))) for n, r in zip(size, ratios, strict=True))
        return a, b


def _forward(self: LocalNorm, features: Tensor) -> Tensor:
    norm = self.norm
    size = (features.shape[-2], features.shape[-1])
    window = size if features.ndim < 4 else self.window(size)
    if window == size:
        return type(norm).forward(norm, features)
    return local_group_norm(features, norm.num_groups, window, norm.weight, norm.bias, norm.eps)


def local_group_norm(
    features: Tensor, groups: int, window: Window, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Group norm of (B, C, ..., H, W) with statistics over `window` (rows, columns) around each place."""
    channels = features.shape[1]
    # Prefix sums of large maps lose digits in float32.
    split = features.double().unflatten(1, (groups, channels // groups))
    kept = tuple(range(2, split.ndim - 2))
    mean = box_mean(split.mean(dim=kept, keepdim=True), window)
    variance = (box_mean(split.square().mean(dim=kept, keepdim=True), window) - mean.square()).clamp(min=0)
    out = ((split - mean) * (variance + eps).rsqrt()).flatten(1, 2).to(features.dtype)
    shape = (1, channels, *[1] * (features.ndim - 2))
    out = out if weight is None else out * weight.view(shape)
    return out if bias is None else out + bias.view(shape)


def box_mean(x: Tensor, window: Window) -> Tensor:
    """Means over `window` of the last two axes, at every place; windows shift inward at the borders."""
    for axis, k in zip((-2, -1), window, strict=True):
        length = x.shape[axis]
        sums = F.pad(x.transpose(axis, -1), (1, 0)).cumsum(-1)
        means = (sums[..., k:] - sums[..., :-k]) / k
        before = (k - 1) // 2
        index = (torch.arange(length, device=x.device) - before).clamp(0, length - k)
        x = means[..., index].transpose(axis, -1)
    return x
