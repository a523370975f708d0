"""What `method` stands for: rotary frequencies of time and space, and what is done to the attention logits.

`method="auto"` by family and ratio (target / trained tokens along the axis); axes that did not grow are left alone:

| family | time grows | space grows |
|---|---|---|
| wan | ultravico, alpha 0.9 | yarn |
| hunyuan_video | ultravico: alpha 0.95 up to 2x, then 0.9; beta 0.6 up to 3x, then 0.8 | plain |

The values of UltraViCo are the paper's. YaRN in space is a choice of this library, without a paper behind it for Wan.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from sparsereel.extend.rope import NTK, PositionInterpolation, RIFLEx, RopePolicy, YaRN
from sparsereel.extend.sizes import Sizes
from sparsereel.extend.ultravico import UltraViCo

PLAIN = RopePolicy()
METHODS: dict[str, tuple[str, ...]] = {
    "wan": ("auto", "plain", "riflex", "pi", "ntk", "yarn", "ultravico", "ultravico_frames"),
    "hunyuan_video": ("auto", "plain", "ultravico", "ultravico_frames"),
}
#: k of RIFLEx for known time axes, by (channels, base): Wan's 44 channels of 128
INTRINSIC = {(44, 1e4): 6}


@dataclass(frozen=True)
class Recipe:
    """One way to extend.

    Attributes:
        time, space: rotary frequencies of the frame axis, and of rows and columns.
        decay: what happens to logits of far pairs; None = nothing.
    """

    time: RopePolicy = PLAIN
    space: RopePolicy = PLAIN
    decay: UltraViCo | None = None

    def policy(self, axis: int) -> RopePolicy:
        """The policy of axis 0 (frames), 1 (rows) or 2 (columns)."""
        return self.space if axis else self.time

    def describe(self) -> str:
        """In short, for tables."""
        axes = (("time", self.time), ("space", self.space))
        parts = [f"{_short(policy)} in {axis}" for axis, policy in axes if policy != PLAIN]
        return " and ".join(([_short(self.decay)] if self.decay else []) + parts) or "plain"


def _short(part: RopePolicy | UltraViCo) -> str:
    """Name and settings that differ from their defaults; alpha always."""
    given = {f.name: getattr(part, f.name) for f in fields(part) if getattr(part, f.name) != f.default}
    if isinstance(part, UltraViCo):
        given = {"alpha": part.alpha} | given
    listed = ", ".join(f"{name}={value}" for name, value in given.items())
    return f"{part.name}({listed})" if listed else part.name


def resolve(method: str | Recipe, family: str, sizes: Sizes) -> Recipe:
    """The recipe of a method for a family and a size.

    Raises:
        ValueError: a family that cannot be extended, an unknown method, or one that is for other families.
    """
    if family not in METHODS:
        raise ValueError(f"extend does not know the family {family!r}; it knows: {', '.join(METHODS)}")
    if isinstance(method, Recipe):
        if family != "wan" and (method.time != PLAIN or method.space != PLAIN):
            raise ValueError(f"rotary frequencies can be changed for wan only, not for {family}")
        return method
    name = str(method).replace("-", "_").lower()
    if name not in METHODS["wan"]:
        raise ValueError(f"unknown method {method!r}; allowed: {', '.join(METHODS[family])}")
    if name not in METHODS[family]:
        raise ValueError(f"method {method!r} is for wan, not for {family}; allowed: {', '.join(METHODS[family])}")
    if name == "auto":
        return _automatic(family, sizes)
    if name.startswith("ultravico"):
        return Recipe(decay=_ultravico(family, sizes, by_frames=name.endswith("frames")))
    if name == "riflex":
        return Recipe(time=RIFLEx())
    policy = {"plain": PLAIN, "pi": PositionInterpolation(), "ntk": NTK(), "yarn": YaRN()}[name]
    return Recipe(time=policy, space=policy)


def _automatic(family: str, sizes: Sizes) -> Recipe:
    longer, *larger = (ratio > 1 for ratio in sizes.ratios)
    return Recipe(
        space=YaRN() if family == "wan" and any(larger) else PLAIN,
        decay=_ultravico(family, sizes, by_frames=False) if longer else None,
    )


def _ultravico(family: str, sizes: Sizes, *, by_frames: bool) -> UltraViCo:
    ratio = sizes.ratios[0]
    if family == "wan":
        return UltraViCo(by="frames" if by_frames else "tokens")
    alpha, beta = (0.95 if ratio <= 2 else 0.9), (0.6 if ratio <= 3 else 0.8)
    return UltraViCo(alpha, beta, period=50.0, gamma=4.0, by="frames" if by_frames else "tokens")
