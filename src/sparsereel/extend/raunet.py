"""RAU-Net's hooks on one U-Net: shrunken deep features in the first steps (see hidiffusion.py)."""

from __future__ import annotations

import logging
import math
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsereel.extend.hidiffusion import HiDiffusion, Levels, checkpoint_of

if TYPE_CHECKING:
    from sparsereel.extend.extension import Extension
    from sparsereel.runtime import ModelRuntime

logger = logging.getLogger("sparsereel")

Size = tuple[int, int]


class RAUNet:
    """One U-Net's hooks, and the call in progress."""

    def __init__(
        self,
        method: HiDiffusion,
        kind: str,
        levels: Levels,
        model: nn.Module,
        extension: Extension,
        runtime: ModelRuntime,
    ) -> None:
        self.method = method
        self.kind = kind
        self.levels = levels
        self.model: Any = model
        self.extension = extension
        self.runtime = runtime
        self.dilated = self.pooled = False
        #: sizes to come back to: before each block's downsampler, before the pooling
        self.before_downsampler: dict[int, Size] = {}
        self.before_pooling: Size | None = None
        self._told = False

    def install(self) -> list[Any]:
        """Add the hooks; returns handles with `.remove()`."""
        unet, levels = self.model, self.levels
        pooled_down, pooled_up = unet.down_blocks[levels.pooled_down], unet.up_blocks[levels.pooled_up]
        downsampler = unet.down_blocks[levels.downsampler].downsamplers[0]
        last_but_one = pooled_up.attentions[len(pooled_up.attentions) - 2]
        handles = [
            unet.register_forward_pre_hook(self.begin, with_kwargs=True),
            unet.register_forward_hook(self.end, always_call=True),
            pooled_down.attentions[0].register_forward_hook(self.pool),
            last_but_one.register_forward_hook(self.grow),
        ]
        last = len(unet.down_blocks) - 1
        for number in range(last):
            down = unet.down_blocks[number].downsamplers[0]
            up = unet.up_blocks[last - 1 - number].upsamplers[0]
            handles.append(down.register_forward_pre_hook(partial(self.note_size, number)))
            handles.append(up.register_forward_pre_hook(partial(self.to_size, number), with_kwargs=True))
        # Under LoRA the convolution is one of several that stride.
        for module in downsampler.modules():
            if isinstance(module, nn.Conv2d) and tuple(module.stride) == (2, 2):
                handles.append(_Dilation(self, module))
        return handles

    # -------------------------------------------------------------- hooks

    def begin(self, unet: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """What is shrunk in this call; fits a ControlNet's features to it."""
        self.dilated = self.pooled = False
        sample = kwargs["sample"] if "sample" in kwargs else args[0]
        height, width = sample.shape[2:]
        if not self.extension.concerns((1, height, width)):
            return None
        if torch.compiler.is_compiling():
            raise ValueError("hidiffusion changes sizes inside the U-Net from step to step: run it without compile")
        step = self.runtime.step()
        if step is None:
            self._tell("the denoising step is unknown, so hidiffusion shrinks no features")
            return None
        if kwargs.get("down_intrablock_additional_residuals") is not None:
            self._tell("a T2I-Adapter's features do not fit shrunken ones, so hidiffusion shrinks none under it")
            return None
        controlled = kwargs.get("down_block_additional_residuals") is not None
        trained = self.extension.sizes.trained_tokens
        ratio = min(height / trained[1], width / trained[2])
        checkpoint = checkpoint_of(unet, self.runtime)
        gentle = self.model.config.in_channels == 9 or "playground" in checkpoint.lower()
        found = self.method.shrinking(self.kind, ratio, controlled=controlled, gentle=gentle)
        self.dilated, self.pooled = found.at(step)
        if not controlled:
            return None
        kwargs = dict(kwargs)
        if step.index >= int(step.total * self.method.control):
            kwargs["down_block_additional_residuals"] = kwargs["mid_block_additional_residual"] = None
        else:
            self._fit_control((height, width), kwargs)
        return args, kwargs

    def end(self, unet: nn.Module, args: Any, output: Any) -> None:
        """The call is over."""
        self.dilated = self.pooled = False
        self.before_downsampler.clear()
        self.before_pooling = None

    def pool(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After the first attention on the way down."""
        if not self.pooled:
            return None
        hidden, *rest = output
        self.before_pooling = (hidden.shape[2], hidden.shape[3])
        return (F.avg_pool2d(hidden, 2, ceil_mode=True, count_include_pad=False), *rest)

    def grow(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After the last attention but one on the way up."""
        if not self.pooled or self.before_pooling is None:
            return None
        hidden, *rest = output
        return (F.interpolate(hidden, size=self.before_pooling, mode="bicubic"), *rest)

    def note_size(self, number: int, module: nn.Module, args: Any) -> None:
        """Before the downsampler of a block."""
        self.before_downsampler[number] = (args[0].shape[2], args[0].shape[3])

    def to_size(self, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before the upsampler on the same level: go to the size of the skip connection, whatever it is."""
        if not (self.dilated or self.pooled):
            return None
        return (args[0], self.before_downsampler[number]), {}

    # -------------------------------------------------------------- ControlNet

    def _fit_control(self, size: Size, kwargs: dict[str, Any]) -> None:
        sizes = self.feature_sizes(size)
        found = kwargs["down_block_additional_residuals"]
        if len(found) != len(sizes) - 1:
            raise ValueError(f"expected {len(sizes) - 1} ControlNet features for this U-Net, got {len(found)}")
        kwargs["down_block_additional_residuals"] = tuple(
            _resized(feature, size) for feature, size in zip(found, sizes, strict=False)
        )
        kwargs["mid_block_additional_residual"] = _resized(kwargs["mid_block_additional_residual"], sizes[-1])

    def feature_sizes(self, size: Size) -> list[Size]:
        """Sizes of the skip connections in the call in progress, and at the end that of the middle."""
        sizes = [size]
        for number, block in enumerate(self.model.down_blocks):
            for index in range(len(block.resnets)):
                if self.pooled and number == self.levels.pooled_down and index == 0:
                    size = _divided(size, 2)
                sizes.append(size)
            if block.downsamplers is not None:
                size = _divided(size, 4 if self.dilated and number == self.levels.downsampler else 2)
                sizes.append(size)
        return [*sizes, size]

    def _tell(self, text: str) -> None:
        if not self._told:
            self._told = True
            logger.warning(text)


def _divided(size: Size, factor: int) -> Size:
    return math.ceil(size[0] / factor), math.ceil(size[1] / factor)


def _resized(feature: Tensor, size: Size) -> Tensor:
    return feature if feature.shape[2:] == size else F.interpolate(feature, size, mode="bicubic")


class _Dilation:
    """A 3x3 convolution of stride 2 that strides by 4, with its taps 2 apart, while its U-Net says so."""

    def __init__(self, net: RAUNet, module: nn.Conv2d) -> None:
        if "_conv_forward" in vars(module):
            raise ValueError("another library has replaced this U-Net's downsampling convolution; remove that first")
        self.net = net
        self.module = module
        # A bound method is copied together with the model, unlike a closure.
        module._conv_forward = MethodType(_conv_forward, self)  # type: ignore[method-assign]

    def remove(self) -> None:
        """Leave the instance as it was."""
        vars(self.module).pop("_conv_forward", None)


def _conv_forward(self: _Dilation, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    module = self.module
    if not self.net.dilated:
        return type(module)._conv_forward(module, features, weight, bias)
    return F.conv2d(features, weight, bias, stride=4, padding=2, dilation=2, groups=module.groups)
