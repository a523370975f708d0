"""How long and large a clip is asked for, beside what the model was trained on: in pixels, and in tokens a axis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sparsereel.families.call_defaults import call_default

Triple = tuple[int, int, int]
AXES = ("frames", "height", "width")


@dataclass(frozen=True)
class Scale:
    """Pixels a token stands for.

    Attributes:
        frames: frames a latent frame holds, after the first.
        patch: latent cells a token holds, by axis.
        pixels: pixels a side of a latent cell.
    """

    frames: int
    pixels: int
    patch: Triple

    def tokens(self, size: Triple) -> Triple:
        """Tokens along each axis of a clip of so many frames and pixels."""
        latent = (size[0] - 1) // self.frames + 1
        return (
            latent // self.patch[0],
            size[1] // self.pixels // self.patch[1],
            size[2] // self.pixels // self.patch[2],
        )


@dataclass(frozen=True)
class Sizes:
    """What was trained and what is wanted.

    Attributes:
        trained, target: frames, height, width in frames and pixels.
        given: which axes the user named; along the others a call may have any size.
    """

    scale: Scale
    trained: Triple
    target: Triple
    given: tuple[bool, bool, bool]

    @property
    def trained_tokens(self) -> Triple:
        return self.scale.tokens(self.trained)

    @property
    def target_tokens(self) -> Triple:
        return self.scale.tokens(self.target)

    @property
    def ratios(self) -> tuple[float, float, float]:
        """Target over trained, in tokens along each axis."""
        pairs = zip(self.target_tokens, self.trained_tokens, strict=True)
        a, b, c = (target / trained for target, trained in pairs)
        return a, b, c

    @property
    def grows(self) -> bool:
        """Whether any axis is longer than trained."""
        return any(ratio > 1 for ratio in self.ratios)

    def matches(self, tokens: Triple) -> bool:
        """Whether a call with so many tokens along each axis has the wanted size."""
        each = zip(self.given, tokens, self.target_tokens, strict=True)
        return all(have == want for given, have, want in each if given)

    @property
    def arguments(self) -> dict[str, int]:
        """What to call the pipeline with to get the wanted size."""
        names = ("num_frames", "height", "width")
        return {name: size for name, size, given in zip(names, self.target, self.given, strict=True) if given}


def resolve(pipe: Any, model: Any, frames: Any, height: Any, width: Any) -> Sizes:
    """Sizes of an `extend` call.

    A ratio of frames counts latent frames, as the papers do: 81 frames are 21 latent ones, twice that is 42, which is
    165 frames. A ratio of height or width is rounded to the nearest size that the pipeline takes.

    Raises:
        ValueError: nothing asked for, a pipeline whose trained size is unknown, a size that the model cannot make (the
            nearest one is named).
    """
    if frames is None and height is None and width is None:
        raise ValueError("extend needs frames, height or width: a float is a ratio, an int a target")
    scale = _scale(pipe, model)
    trained = _trained(pipe, model)
    if frames is not None and _is_unet(model):
        raise ValueError("this model makes pictures, which have no frames; extend their height or width")
    target = (
        _frames(frames, trained[0], scale),
        _pixels("height", height, trained[1], scale.pixels * scale.patch[1]),
        _pixels("width", width, trained[2], scale.pixels * scale.patch[2]),
    )
    return Sizes(scale, trained, target, (frames is not None, height is not None, width is not None))


def _scale(pipe: Any, model: Any) -> Scale:
    if _is_unet(model) and getattr(pipe, "vae_scale_factor", None) is not None:
        return Scale(1, int(pipe.vae_scale_factor), (1, 1, 1))
    frames, pixels = (getattr(pipe, f"vae_scale_factor_{name}", None) for name in ("temporal", "spatial"))
    if frames is None or pixels is None:
        raise ValueError(
            "extend needs a diffusers pipeline of videos or of Stable Diffusion, whose trained size and VAE are known; "
            f"got {type(pipe).__name__}"
        )
    return Scale(int(frames), int(pixels), _patch(model.config))


def _is_unet(model: Any) -> bool:
    return hasattr(model, "down_blocks") and hasattr(model, "up_blocks")


def _patch(config: Any) -> Triple:
    patch = config.patch_size
    if isinstance(patch, int):
        return int(getattr(config, "patch_size_t", None) or 1), patch, patch
    return tuple(patch)


#: Wan 2.2 TI2V 5B, told from its 48 latent channels, is called through pipelines whose defaults are those of Wan 2.1.
_WAN_5B_CHANNELS, _WAN_5B = 48, (121, 704, 1280)


def _trained(pipe: Any, model: Any) -> Triple:
    """What its model was trained for: what the pipeline's call makes by default, or the size of a U-Net's samples."""
    if _is_unet(model):
        side = model.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return 1, int(height * pipe.vae_scale_factor), int(width * pipe.vae_scale_factor)
    if getattr(model.config, "out_channels", None) == _WAN_5B_CHANNELS:
        return _WAN_5B
    sizes = [call_default(pipe, name) for name in ("num_frames", "height", "width")]
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(
            f"the size that {type(pipe).__name__} was trained for is not known: its call has no default size"
        )
    return tuple(sizes)


def _frames(wanted: Any, trained: int, scale: Scale) -> int:
    if wanted is None:
        return trained
    step = scale.frames
    if isinstance(wanted, float):
        latent = (trained - 1) // step + 1
        return (max(1, round(latent * _ratio("frames", wanted))) - 1) * step + 1
    _check_int("frames", wanted)
    if wanted % step != 1 % step:
        nearest = step * max(0, round((wanted - 1) / step)) + 1
        hint = f"; a ratio is a float: {wanted}.0" if wanted <= 10 else ""
        raise ValueError(f"frames must be {step}k + 1, got {wanted}; the nearest is {nearest}{hint}")
    return int(wanted)


def _pixels(name: str, wanted: Any, trained: int, unit: int) -> int:
    if wanted is None:
        return trained
    if isinstance(wanted, float):
        return unit * max(1, round(trained * _ratio(name, wanted) / unit))
    _check_int(name, wanted)
    if wanted % unit:
        nearest = unit * max(1, round(wanted / unit))
        raise ValueError(f"{name} must be a multiple of {unit} pixels, got {wanted}; the nearest is {nearest}")
    return int(wanted)


def _ratio(name: str, ratio: float) -> float:
    if not math.isfinite(ratio) or ratio <= 0:
        raise ValueError(f"a ratio of {name} must be a positive number, got {ratio}")
    return ratio


def _check_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a ratio (a float above 0) or a target (an int of at least 1), got {value!r}")
