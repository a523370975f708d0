"""The two clip sizes that minireel is trained, measured and published at."""

from __future__ import annotations

from dataclasses import dataclass

TEMPORAL_COMPRESSION = 4
SPATIAL_COMPRESSION = 8


@dataclass(frozen=True)
class Size:
    """A clip size with the sampling settings that go with it.

    Attributes:
        frames: Frames of the clip; always 4k + 1, as the VAE folds four frames into one latent frame after the first.
        height: Pixels; a multiple of 8.
        width: Pixels; a multiple of 8.
        steps: Denoising steps; more is slower and a little cleaner.
        guidance: Classifier-free guidance scale; higher follows the prompt more closely and moves less smoothly.
        tokens: Length of the transformer's self-attention sequence, which follows from the size (patch 1 x 1 x 1).
    """

    frames: int
    height: int
    width: int
    steps: int
    guidance: float
    tokens: int

    def __post_init__(self) -> None:
        check_size(self.frames, self.height, self.width)
        if self.tokens != count_tokens(self.frames, self.height, self.width):
            expected = count_tokens(self.frames, self.height, self.width)
            raise ValueError(f"tokens is {self.tokens}, but a clip of this size has {expected}.")


def count_tokens(frames: int, height: int, width: int) -> int:
    """Self-attention tokens of a clip of that many frames and pixels."""
    latent_frames = (frames - 1) // TEMPORAL_COMPRESSION + 1
    return latent_frames * (height // SPATIAL_COMPRESSION) * (width // SPATIAL_COMPRESSION)


def check_size(frames: int, height: int, width: int) -> None:
    """Refuse a clip size the VAE cannot hold.

    Raises:
        ValueError: frames is not 4k + 1, or height or width no positive multiple of 8; the text names the nearest size.
    """
    if frames < 1 or frames % TEMPORAL_COMPRESSION != 1:
        nearest = TEMPORAL_COMPRESSION * max(0, round((frames - 1) / TEMPORAL_COMPRESSION)) + 1
        raise ValueError(f"num_frames must be 4k + 1 (1, 5, 9 ...), got {frames}; the nearest is {nearest}.")
    for name, pixels in (("height", height), ("width", width)):
        if pixels < SPATIAL_COMPRESSION or pixels % SPATIAL_COMPRESSION:
            nearest = SPATIAL_COMPRESSION * max(1, round(pixels / SPATIAL_COMPRESSION))
            raise ValueError(
                f"{name} must be a multiple of {SPATIAL_COMPRESSION} pixels, got {pixels}; the nearest is {nearest}."
            )


NATIVE = Size(frames=33, height=96, width=96, steps=20, guidance=3.5, tokens=1296)
LARGE = Size(frames=129, height=128, width=128, steps=16, guidance=3.5, tokens=8448)
