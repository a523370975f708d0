"""The model sees a larger clip through overlapping windows of the trained size; what it says of each place is averaged.

Inside a window nothing is larger than trained: positions, key counts and features are those that the model knows.
"""

from __future__ import annotations

import inspect
import math
import random
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsereel.extend.sizes import Triple

if TYPE_CHECKING:
    from torch import nn

    from sparsereel.extend.extension import Extension
    from sparsereel.runtime import ModelRuntime

#: what a view takes of each axis of the latents
Slices = tuple[slice, slice, slice]
#: (start, stop) along frames, rows and columns, as shares of the whole
Shares = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class View:
    """One window.

    Attributes:
        slices: what it takes of frames, rows and columns, in latent cells.
        weight: of each place it takes, (frames, rows, columns).
    """

    slices: Slices
    weight: Tensor

    def shares(self, sides: Triple) -> Shares:
        """Where it lies in latents of so many frames, rows and columns."""
        a, b, c = ((s.start / side, s.stop / side) for s, side in zip(self.slices, sides, strict=True))
        return a, b, c


@dataclass(frozen=True)
class Place:
    """The window that the model sees just now.

    Attributes:
        windows: all windows of the step.
        number: which of them.
    """

    windows: tuple[Shares, ...]
    number: int


@dataclass(frozen=True)
class Views:
    """Overlapping windows over the axes that grew, averaged with weights.

        eps(z)[p] = sum_w weight_w[p] eps(z[w])[p] / sum_w weight_w[p]      over the windows w that hold place p

    Over time this is the sliding window of FreeNoise (arXiv 2310.15169), over rows and columns that of DemoFusion
    (arXiv 2311.16973), whose windows jitter from step to step. DemoFusion's dilated sampling adds views of every s-th
    row and column of the blurred latents, fused with a weight that falls from 1 to 0 over the run: with
    c = (1 + cos(pi step / steps)) / 2 the share of these views is c^dilated. Its own form steps the blurred latents;
    here the predictions are fused.

    Args:
        time, space: axes that are seen through windows; others are seen whole.
        stride: by which the next window starts, as a share of the window: FreeNoise's 4 of 16, DemoFusion's 64 of 128.
        weights: "pyramid" rises to the middle of a window, "flat" does not.
        jitter: windows over rows and columns move by up to a quarter of their overlap, drawn by seed and step.
        dilated: exponent of the dilated views' weight; 0 = no such views.

    Raises:
        ValueError: neither axis, a stride outside (0, 1], a negative exponent, unknown weights.
    """

    time: bool = True
    space: bool = True
    stride: float = 0.5
    weights: Literal["pyramid", "flat"] = "pyramid"
    jitter: bool = False
    dilated: float = 0.0

    name: ClassVar[str] = "views"

    def __post_init__(self) -> None:
        if not (self.time or self.space):
            raise ValueError("views need an axis: time, space or both")
        if not 0 < self.stride <= 1 or self.dilated < 0:
            raise ValueError(
                f"views need a stride in (0, 1] and dilated >= 0, got stride={self.stride}, dilated={self.dilated}"
            )
        if self.weights not in ("pyramid", "flat"):
            raise ValueError(f"weights of views are 'pyramid' or 'flat', got {self.weights!r}")

    def sides(self, tokens: Triple, trained: Triple) -> Triple:
        """Size of a window, in tokens."""
        through = (self.time, self.space, self.space)
        a, b, c = (min(n, t) if on else n for n, t, on in zip(tokens, trained, through, strict=True))
        return a, b, c

    def cut(self, tokens: Triple, trained: Triple, patch: Triple, draw: random.Random | None) -> list[View]:
        """All windows of a clip, in latent cells; each place is in at least one.

        Args:
            patch: latent cells of a token.
            draw: source of the jitter; None = none.
        """
        sides = self.sides(tokens, trained)
        starts = []
        for axis, (length, side) in enumerate(zip(tokens, sides, strict=True)):
            found = window_starts(length, side, max(1, round(side * self.stride)))
            if draw is not None and axis and len(found) > 1:
                found = [_moved(start, side, length, found, draw) for start in found]
            starts.append(found)
        weight = self._weight([side * cells for side, cells in zip(sides, patch, strict=True)])
        views = []
        for corner in product(*starts):
            a, b, c = (
                slice(start * cells, (start + side) * cells)
                for start, side, cells in zip(corner, sides, patch, strict=True)
            )
            views.append(View((a, b, c), weight))
        return views

    def _weight(self, sides: list[int]) -> Tensor:
        axes = []
        for side in sides:
            place = torch.arange(side)
            axes.append(torch.minimum(place, side - 1 - place) + 1.0 if self.weights == "pyramid" else place * 0 + 1.0)
        return axes[0][:, None, None] * axes[1][:, None] * axes[2]

    def install(self, model: nn.Module, extension: Extension, runtime: ModelRuntime) -> list[Any]:
        """Put the windows around the model's forward; returns handles with `.remove()`."""
        return [ViewedForward(self, model, extension, runtime)]


def window_starts(length: int, side: int, stride: int) -> list[int]:
    """Where windows of `side` begin so that they cover `length`: every `stride`, and one that ends at the end."""
    if length <= side:
        return [0]
    return [*range(0, length - side, stride), length - side]


def _moved(start: int, side: int, length: int, starts: list[int], draw: random.Random) -> int:
    """A start moved by up to a quarter of the overlap; the first and last stay, so that borders stay covered."""
    if start in (starts[0], starts[-1]):
        return start
    reach = max(0, side - (starts[1] - starts[0])) // 4
    return min(max(start + draw.randint(-reach, reach), 0), length - side)


class ViewedForward:
    """Stands in for the forward of one model."""

    def __init__(self, views: Views, model: Any, extension: Extension, runtime: ModelRuntime) -> None:
        self.views = views
        self.model = model
        self.extension = extension
        self.runtime = runtime
        self.inside = False
        #: what others had set on the instance, such as hooks that move weights
        self.found = vars(model).get("forward")
        # A bound method is copied together with the model, unlike a closure.
        model.forward = self.forward

    def remove(self) -> None:
        """Leave the instance as it was."""
        if self.found is None:
            vars(self.model).pop("forward", None)
        else:
            self.model.forward = self.found

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        if self.found is not None:
            return self.found(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)

    # Several passes, which the step decides on: nothing that a graph could hold.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Window by window where the call is an extended one, else the model's own."""
        layout = self.runtime.layout
        tokens = None if layout is None else (layout[1], layout[2], layout[3])
        if self.inside or tokens is None or layout is None or not self.extension.concerns(tokens):
            return self.plain(*args, **kwargs)
        names = list(inspect.signature(type(self.model).forward).parameters)[1:]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        wants_dict = arguments.pop("return_dict", True)
        self.inside, self.extension.view = True, self.views.sides(tokens, self.extension.sizes.trained_tokens)
        try:
            out = self._through_windows(arguments, tokens)
        finally:
            self.inside, self.extension.view, self.extension.place = False, None, None
        if not wants_dict:
            return (out,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=out)

    def _through_windows(self, arguments: dict[str, Any], tokens: Triple) -> Tensor:
        step = self.runtime.step()
        name = self.runtime.family.parameters[0]
        latents: Tensor = arguments[name]
        patch = self.extension.sizes.scale.patch
        draw = None
        if self.views.jitter and step is not None:
            draw = random.Random(f"sparsereel jitter {self.runtime.seed()} {step.index}")
        total, weights = None, torch.zeros(latents.shape[-3:] if latents.ndim == 5 else (1, *latents.shape[-2:]))
        weights = weights.to(latents.device)
        views = self.views.cut(tokens, self.extension.sizes.trained_tokens, patch, draw)
        sides = (weights.shape[0], weights.shape[1], weights.shape[2])
        windows = tuple(view.shares(sides) for view in views)
        for number, view in enumerate(views):
            self.extension.place = Place(windows, number)
            out = self._call(arguments, name, lambda x, s=view.slices: _part(x, s), view.slices)
            weight = view.weight.to(latents.device)
            if total is None:
                total = latents.new_zeros(*out.shape[:2], *latents.shape[2:], dtype=torch.float32)
            _part(total, view.slices).add_(out.float() * (weight if out.ndim == 5 else weight[0]))
            weights[view.slices] += weight
        assert total is not None
        self.extension.place = None
        fused = total / (weights if latents.ndim == 5 else weights[0])
        share = 0.0 if step is None or not self.views.dilated else cosine(step.index, step.total) ** self.views.dilated
        if share > 0:
            fused = (1 - share) * fused + share * self._dilated(arguments, name, tokens, share)
        return fused.to(latents.dtype)

    def _dilated(self, arguments: dict[str, Any], name: str, tokens: Triple, share: float) -> Tensor:
        """Predictions for every s-th row and column of the blurred latents, put together."""
        latents = arguments[name]
        trained = self.extension.sizes.trained_tokens
        rows, columns = (math.ceil(tokens[axis] / trained[axis]) for axis in (1, 2))
        height = latents.shape[-2]
        blurred = arguments | {name: blur(latents, max(rows, columns), share)}
        out = None
        for row, column in product(range(rows), range(columns)):
            strides = (slice(None), slice(row, None, rows), slice(column, None, columns))
            if len(range(height)[strides[1]]) % self.extension.sizes.scale.patch[1]:
                raise ValueError(
                    "dilated views need sides whose rows divide evenly; choose a whole multiple of the trained"
                )
            here = self._call(blurred, name, lambda x, s=strides: _part(x, s), strides)
            if out is None:
                out = latents.new_zeros(*here.shape[:2], *latents.shape[2:], dtype=torch.float32)
            _part(out, strides).copy_(here.float())
        assert out is not None
        return out

    def _call(self, arguments: dict[str, Any], name: str, cut: Any, slices: Slices) -> Tensor:
        """The model on one window."""
        latents = arguments[name]
        here = dict(arguments)
        for key, value in arguments.items():
            if not isinstance(value, Tensor):
                if key.endswith("additional_residuals") and value is not None:
                    raise ValueError("windows over the picture do not go with a ControlNet or adapter")
                continue
            if value.ndim == latents.ndim and value.shape[2:] == latents.shape[2:]:
                here[key] = cut(value)
            elif key == "timestep" and value.ndim == 2 and value.shape[1] > 1:
                here[key] = _token_timesteps(value, latents, slices, self.extension.sizes.scale.patch)
        out: Tensor
        (out, *_) = self.model(**here, return_dict=False)
        return out


def _part(x: Tensor, slices: Slices) -> Tensor:
    """(B, C, F, H, W), or (B, C, H, W) of pictures."""
    return x[(..., *(slices if x.ndim == 5 else slices[1:]))]


def _token_timesteps(timesteps: Tensor, latents: Tensor, slices: Slices, patch: Triple) -> Tensor:
    """One timestep a token, (B, S), of a window."""
    shape = [n // cells for n, cells in zip(latents.shape[2:], patch, strict=True)]
    tokens = tuple(
        slice(None if s.start is None else s.start // cells, None if s.stop is None else s.stop // cells, s.step)
        for s, cells in zip(slices, patch, strict=True)
    )
    return timesteps.unflatten(1, shape)[(slice(None), *tokens)].flatten(1)


def cosine(index: int, total: int) -> float:
    """From 1 at the first step to nearly 0 at the last, as half a cosine."""
    return (1 + math.cos(math.pi * index / total)) / 2


def blur(latents: Tensor, factor: int, strength: float) -> Tensor:
    """Gaussian blur of rows and columns with a kernel of 2 factor - 1 places, mean and deviation kept, as DemoFusion
    prepares dilated views. `strength` in (0, 1] scales the kernel's deviation."""
    side = 2 * factor - 1
    deviation = max(1e-3, 0.99 * strength + 0.01)
    place = torch.arange(side, device=latents.device, dtype=torch.float32) - factor + 1
    kernel = torch.exp(-(place**2) / (2 * deviation**2))
    kernel = kernel / kernel.sum()
    flat = latents.float().flatten(0, -3).unsqueeze(1)
    padded = F.pad(flat, (factor - 1,) * 4, mode="replicate")
    out = F.conv2d(F.conv2d(padded, kernel.view(1, 1, side, 1)), kernel.view(1, 1, 1, side)).view(latents.shape)
    axes = tuple(range(2, latents.ndim))
    mean, spread = latents.float().mean(axes, keepdim=True), latents.float().std(axes, keepdim=True)
    out = (out - out.mean(axes, keepdim=True)) / out.std(axes, keepdim=True).clamp(min=1e-6) * spread + mean
    return out.to(latents.dtype)
