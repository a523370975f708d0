"""What is searched for: the target, the calls it is meant for, the stretches of steps. Checked when built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from sparsereel.generation import Request
from sparsereel.plan_entries import StepRange
from sparsereel.schedule import share_of

KINDS = ("target_psnr", "target_speedup", "budget")


@dataclass(frozen=True)
class Target:
    """`kind`, one of KINDS, and its value: dB, a ratio of seconds, or a density."""

    kind: str
    value: float

    @classmethod
    def of(cls, target_psnr: float | None, target_speedup: float | None, budget: float | None) -> Target:
        """The one target given.

        Raises:
            ValueError: none or several given, or out of range.
        """
        given = [(k, v) for k, v in zip(KINDS, (target_psnr, target_speedup, budget), strict=True) if v is not None]
        if len(given) != 1:
            named = ", ".join(f"{kind}={value}" for kind, value in given) or "none"
            raise ValueError(f"give exactly one of {', '.join(KINDS)}; got {named}")
        ((kind, value),) = given
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{kind} must be a finite number, got {value!r}")
        if kind == "budget" and not 0 <= value <= 1:
            raise ValueError(f"budget is a density and must lie in [0, 1], got {value}")
        if kind == "target_psnr" and not 0 < value <= 100:
            raise ValueError(f"target_psnr must be above 0 and at most 100 dB, got {value}")
        if kind == "target_speedup" and value < 1:
            raise ValueError(f"target_speedup must be at least 1, got {value}")
        return cls(kind, float(value))

    def met_by(self, value: float) -> bool:
        """Whether a measured value reaches the target; a density may exceed a budget by rounding of blocks only."""
        return value <= self.value + 0.005 if self.kind == "budget" else value >= self.value


@dataclass(frozen=True)
class Settings:
    """A checked request for a search; arguments as `sparsereel.search` names them."""

    prompts: tuple[str, ...]
    target: Target
    steps: int | None
    frames: int | None
    height: int | None
    width: int | None
    guidance: float | None
    seed: int
    held_out: int
    buckets: int
    dense_first: float
    backend: str

    @classmethod
    def of(cls, prompts: Sequence[str], target: Target, **options: Any) -> Settings:
        """Check everything that can be checked without the model.

        Raises:
            ValueError: the first thing that is wrong.
        """
        if isinstance(prompts, str) or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise ValueError("prompts must be a list of texts that are not empty")
        for name in ("steps", "frames", "height", "width"):
            _whole(name, options[name], 1, optional=True)
        for name, least in (("seed", 0), ("held_out", 0), ("buckets", 1)):
            _whole(name, options[name], least)
        dense = options["dense_first"]
        if isinstance(dense, bool) or not isinstance(dense, (int, float)) or not 0 <= dense < 1:
            raise ValueError(f"dense_first must be a share of the steps in [0, 1), got {dense!r}")
        if len(prompts) <= options["held_out"]:
            raise ValueError(
                f"{len(prompts)} prompts with held_out={options['held_out']} leave none to calibrate on; "
                f"at least {options['held_out'] + 1} are needed"
            )
        return cls(tuple(prompts), target, **{**options, "dense_first": float(dense)})

    def extended(self, arguments: dict[str, int]) -> Settings:
        """The same on a pipeline that `extend` made fit for calls with these arguments; sizes that were given stay."""
        return replace(
            self,
            frames=self.frames or arguments.get("num_frames"),
            height=self.height or arguments.get("height"),
            width=self.width or arguments.get("width"),
        )

    def request(self, number: int) -> Request:
        """The call for prompt `number`."""
        return Request(
            self.prompts[number],
            seed=self.seed + number,
            steps=self.steps,
            guidance=self.guidance,
            frames=self.frames,
            height=self.height,
            width=self.width,
        )

    @property
    def calibrating(self) -> range:
        """Numbers of the prompts to record."""
        return range(len(self.prompts) - self.held_out)

    @property
    def measuring(self) -> range:
        """Numbers of the prompts held out."""
        return range(len(self.prompts) - self.held_out, len(self.prompts))


@dataclass(frozen=True)
class Bucket:
    """A stretch of steps that shares its choices: first <= step < last."""

    first: int
    last: int
    stretch: StepRange

    @property
    def count(self) -> int:
        return self.last - self.first

    def sampled(self, count: int) -> list[int]:
        """`count` steps spread over the stretch, or all where there are fewer."""
        spread = (self.first + math.floor((i + 0.5) * self.count / count) for i in range(count))
        return sorted(set(spread))


def cut_steps(total: int, dense_first: float, buckets: int) -> tuple[Bucket, ...]:
    """The steps after the dense first ones in at most `buckets` stretches of about equal length.

    Raises:
        ValueError: no step is left.
    """
    start = share_of(dense_first, total)
    left = total - start
    if left < 1:
        raise ValueError(f"with dense_first={dense_first} none of the {total} steps is left to be sparse")
    count = min(buckets, left)
    bounds = [start + left * i // count for i in range(count + 1)]
    return tuple(
        Bucket(a, b, StepRange(f"{_share(a, total)}-{_share(b, total)}", _exact(a, total), _exact(b, total)))
        for a, b in pairwise(bounds)
    )


def _exact(step: int, total: int) -> float:
    return float(_share(step, total))


def _share(step: int, total: int) -> str:
    # Rounded down: `share_of` rounds up, so the step comes back exactly while there are fewer than 10,000.
    text = f"{math.floor(step * 10_000 / total) / 10_000:.4f}".rstrip("0")
    return text + "0" if text.endswith(".") else text


def _whole(name: str, value: object, least: int, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}")
