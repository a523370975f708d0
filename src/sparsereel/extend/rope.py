"""Rotary frequencies for sequences longer than the trained ones: one small frozen class a method.

An axis (frames, rows or columns) owns `dim` channels of a head; pair j = 0 .. dim/2 - 1 of them turns by
theta_j = base^(-2j/dim) from one position to the next, once around in 2 pi / theta_j positions. A policy says which
theta_j to use for an axis of `length` positions in a model that was trained on `trained` of them; s = length / trained.
Every policy leaves an axis alone that has not grown. Frequencies are float64, as diffusers computes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


def plain_frequencies(dim: int, base: float) -> Tensor:
    """float64 (dim / 2): the frequencies that the model was trained with."""
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))


def periods(dim: int, base: float) -> list[int]:
    """Positions after which each component comes round, rounded."""
    return [round(2 * math.pi / theta) for theta in plain_frequencies(dim, base).tolist()]


@dataclass(frozen=True)
class RopePolicy:
    """Plain extrapolation: the trained frequencies, at positions never seen. The other policies change some of them."""

    name: ClassVar[str] = "plain"

    def frequencies(self, dim: int, base: float, trained: int, length: int) -> Tensor:
        """float64 (dim / 2): radians a position for each pair of channels of an axis of `length` positions."""
        theta = plain_frequencies(dim, base)
        return theta if length <= trained else self._changed(theta, dim, base, trained, length)

    def _changed(self, theta: Tensor, dim: int, base: float, trained: int, length: int) -> Tensor:
        return theta

    def magnitude(self, ratio: float) -> float:
        """What cos and sin are multiplied by, in queries and keys alike, for the ratio of the axis that grew most."""
        return 1.0


@dataclass(frozen=True)
class PositionInterpolation(RopePolicy):
    """theta_j / s: positions are squeezed into the trained range (Chen et al., arXiv 2306.15595)."""

    name: ClassVar[str] = "pi"

    def _changed(self, theta: Tensor, dim: int, base: float, trained: int, length: int) -> Tensor:
        return theta * (trained / length)


@dataclass(frozen=True)
class NTK(RopePolicy):
    """base' = base * s^(dim / (dim - 2)): the slowest component is interpolated by s, the fastest not at all.

    "NTK-aware" scaling, described with YaRN (arXiv 2309.00071). An axis of one pair is interpolated.
    """

    name: ClassVar[str] = "ntk"

    def _changed(self, theta: Tensor, dim: int, base: float, trained: int, length: int) -> Tensor:
        ratio = length / trained
        if dim <= 2:
            return theta / ratio
        return plain_frequencies(dim, base * ratio ** (dim / (dim - 2)))


@dataclass(frozen=True)
class YaRN(RopePolicy):
    """By parts (arXiv 2309.00071): what turns often within the trained length stays, what turns slowly is divided by s.

    r_j = trained * theta_j / (2 pi) turns; w_j = clamp((r_j - low) / (high - low), 0, 1);
    theta'_j = theta_j * (w_j + (1 - w_j) / s). Queries and keys are both scaled by 0.1 ln s + 1.

    Args:
        low: turns up to which a component is interpolated in full.
        high: turns from which a component stays. The paper's 32 suits texts of thousands of tokens; no component of a
            21-frame axis turns more than 3.4 times, so the default here is 2 (a choice of this library).
        temper: scale queries and keys.

    Raises:
        ValueError: not 0 <= low < high.
    """

    low: float = 1.0
    high: float = 2.0
    temper: bool = True

    name: ClassVar[str] = "yarn"

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(f"YaRN needs 0 <= low < high turns, got low={self.low}, high={self.high}")

    def _changed(self, theta: Tensor, dim: int, base: float, trained: int, length: int) -> Tensor:
        turns = trained * theta / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return theta * (kept + (1 - kept) * (trained / length))

    def magnitude(self, ratio: float) -> float:
        return 0.1 * math.log(ratio) + 1.0 if self.temper and ratio > 1 else 1.0


@dataclass(frozen=True)
class RIFLEx(RopePolicy):
    """One frequency of the time axis is lowered, so that its period is longer than the clip (arXiv 2502.15894).

    Past some length a model repeats itself, in step with one "intrinsic" component k. If `length` exceeds its period
    N_k = round(2 pi / theta_k), then theta_k becomes margin * 2 pi / length; all else stays, and a length within N_k
    changes nothing.

    Args:
        component: k, counted from 1 as in the paper; None = by `loop`.
        loop: latent frames after which repetition was seen: the component whose period is nearest. None = nobody
            looked: the shortest period that is not shorter than the trained length, within which nothing repeats. For
            HunyuanVideo and CogVideoX that is the published component.
        margin: share of a turn that the clip spans; below 1 so that its end does not meet its beginning.

    Raises:
        ValueError: component or loop below 1, or margin outside (0, 1].
    """

    component: int | None = None
    loop: int | None = None
    margin: float = 0.9

    name: ClassVar[str] = "riflex"

    def __post_init__(self) -> None:
        for name, value in (("component", self.component), ("loop", self.loop)):
            if value is not None and value < 1:
                raise ValueError(f"RIFLEx counts {name} from 1, got {value}")
        if not 0 < self.margin <= 1:
            raise ValueError(f"RIFLEx needs a margin in (0, 1], got {self.margin}")

    def intrinsic(self, dim: int, base: float, trained: int) -> tuple[int, int]:
        """(k counted from 1, N_k) for a time axis of `dim` channels.

        Raises:
            ValueError: the axis has no such component.
        """
        found = periods(dim, base)
        if self.component is not None:
            if self.component > len(found):
                raise ValueError(f"RIFLEx component {self.component} does not exist: the axis has {len(found)}")
            return self.component, found[self.component - 1]
        if self.loop is None:
            number = next((j for j, period in enumerate(found) if period >= trained), len(found) - 1)
        else:
            loop = self.loop
            number = min(range(len(found)), key=lambda j: abs(found[j] - loop))
        return number + 1, found[number]

    def _changed(self, theta: Tensor, dim: int, base: float, trained: int, length: int) -> Tensor:
        number, period = self.intrinsic(dim, base, trained)
        if length > period:
            theta[number - 1] = self.margin * 2 * math.pi / length
        return theta


def axis_table(frequencies: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """float32 cos and sin (length, dim) of positions 0 .. length - 1, each pair's value twice, as Wan's tables are."""
    angles = torch.outer(torch.arange(length), frequencies)
    cos, sin = (wave.repeat_interleave(2, dim=1).float() for wave in (angles.cos(), angles.sin()))
    return cos, sin
