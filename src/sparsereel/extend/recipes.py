"""What `method` stands for. A recipe has a place for each thing that can be changed; names joined by "+" fill several.

`method="auto"` by family and ratio (target / trained tokens along the axis); axes that did not grow are left alone:

| family | time grows | space grows |
|---|---|---|
| wan | ultravico, alpha 0.9 | yarn |
| hunyuan_video | ultravico: alpha 0.95 up to 2x, then 0.9; beta 0.6 up to 3x, then 0.8 | plain |
| stable_diffusion | - | hidiffusion |

The values of UltraViCo are the paper's. YaRN in space is a choice of this library, without a paper behind it for Wan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from sparsereel.extend.agent import AgentAttention
from sparsereel.extend.dual import DualPath
from sparsereel.extend.guide import Guide
from sparsereel.extend.hidiffusion import HiDiffusion
from sparsereel.extend.mixers import Compressed, Registers
from sparsereel.extend.noise import Antiphase, Noise, Rescheduled
from sparsereel.extend.regional import Box, RegionalPrior
from sparsereel.extend.rope import NTK, PositionInterpolation, RIFLEx, RopePolicy, YaRN
from sparsereel.extend.sizes import Sizes
from sparsereel.extend.statistics import LocalStatistics
from sparsereel.extend.ultravico import UltraViCo
from sparsereel.extend.views import Views
from sparsereel.extend.windows import Alternating, Entropy, InwardWindow, LocalRegions, Window

PLAIN = RopePolicy()
Mixer = AgentAttention | Registers | Compressed
#: k of RIFLEx for known time axes, by (channels, base): Wan's 44 channels of 128
INTRINSIC = {(44, 1e4): 6}


@dataclass(frozen=True)
class Recipe:
    """One way to extend.

    Attributes:
        time, space: rotary frequencies of the frame axis, and of rows and columns.
        decay: what happens to logits of far pairs; None = nothing.
        window: what queries may see; None = everything.
        temper: how sharp softmax is; None = as trained.
        mixer: what is added to attention or put in its place; None = nothing.
        unet: what changes between the blocks of a U-Net; None = nothing.
        statistics: over what group norms take their statistics; None = the whole picture.
        views: windows through which the whole model sees the clip; None = it sees all at once.
        dual: a second, unwindowed pass for the cross-attention; None = none.
        noise: how the noise of the first step, or of all, is arranged; None = independent.
        guide: how a small result leads the large one; None = nothing is made first.
        regional: which words and further prompts reach a window of `views`; None = all words reach all.
    """

    time: RopePolicy = PLAIN
    space: RopePolicy = PLAIN
    decay: UltraViCo | None = None
    window: Window | None = None
    temper: Entropy | None = None
    mixer: Mixer | None = None
    unet: HiDiffusion | None = None
    statistics: LocalStatistics | None = None
    views: Views | None = None
    dual: DualPath | None = None
    noise: Noise | None = None
    guide: Guide | None = None
    regional: RegionalPrior | None = None

    def __post_init__(self) -> None:
        if self.views is not None and self.dual is not None:
            raise ValueError("views and the dual path both put something around the model; take one of them")
        if self.regional is not None:
            self._check_regional(self.regional)

    def _check_regional(self, prior: RegionalPrior) -> None:
        if self.views is None:
            raise ValueError("a regional prior is about windows; give views as well, or a method that has them")
        if prior.prompts and not self.views.space:
            raise ValueError("regional prompts are for windows over the picture, which these views see whole")
        if prior.threshold and self.guide is None:
            raise ValueError(
                "a regional prior screens tokens by a map of the small result; give a guide, or threshold=0"
            )

    def policy(self, axis: int) -> RopePolicy:
        """The policy of axis 0 (frames), 1 (rows) or 2 (columns)."""
        return self.space if axis else self.time

    @property
    def in_attention(self) -> bool:
        """Whether attention calls are changed."""
        unet = self.unet is not None and self.unet.windows
        return unet or any((self.decay, self.window, self.temper, self.mixer))

    @property
    def keeps_attention(self) -> bool:
        """Whether a call of the wanted size attends as it would without the recipe, apart from where its tokens are.

        True for what moves tokens, also where one small result leads the large run.
        """
        in_one_go = self.guide is None or self.guide.stages == 1
        return in_one_go and self == Recipe(time=self.time, space=self.space, guide=self.guide)

    @property
    def on_model(self) -> list[Any]:
        """What is installed on the model besides: each has `install(model, extension, runtime) -> handles`."""
        return [part for part in (self.unet, self.statistics, self.views, self.dual, self.regional) if part is not None]

    def describe(self) -> str:
        """In short, for tables."""
        parts = [_short(part) for name, part in self._parts() if name not in ("time", "space")]
        axes = [f"{_short(part)} in {name}" for name, part in self._parts() if name in ("time", "space")]
        return " and ".join(parts + axes) or "plain"

    def with_regions(self, prompts: tuple[tuple[str, Box], ...]) -> Recipe:
        """The recipe with prompts for boxes of the picture; a recipe without a regional prior screens nothing then.

        Raises:
            ValueError: the recipe has no windows, or a box is none.
        """
        prior = self.regional or RegionalPrior(threshold=0)
        return replace(self, regional=replace(prior, prompts=prompts)) if prompts else self

    def _parts(self) -> list[tuple[str, Any]]:
        """What differs from doing nothing."""
        found = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, part) for name, part in found if part is not None and part != PLAIN]

    def with_(self, other: Recipe) -> Recipe:
        """Both.

        Raises:
            ValueError: both change the same thing.
        """
        taken = dict(self._parts())
        for name, part in other._parts():
            if taken.setdefault(name, part) != part:
                raise ValueError(f"{_short(taken[name])} and {_short(part)} both set {name}; take one of them")
        return replace(self, **taken)


def _short(part: Any) -> str:
    """Name and settings that differ from their defaults; alpha always."""
    given = {f.name: getattr(part, f.name) for f in fields(part) if getattr(part, f.name) != f.default}
    if isinstance(part, UltraViCo):
        given = {"alpha": part.alpha} | given
    listed = ", ".join(f"{name}={value}" for name, value in given.items())
    return f"{part.name}({listed})" if listed else str(part.name)


Make = Callable[[str, Sizes], Recipe]


def _both(policy: RopePolicy) -> Make:
    return lambda family, sizes: Recipe(time=policy, space=policy)


def _fixed(recipe: Recipe) -> Make:
    return lambda family, sizes: recipe


def _ultravico(family: str, sizes: Sizes, *, by_frames: bool = False) -> Recipe:
    ratio = sizes.ratios[0]
    if family == "wan":
        return Recipe(decay=UltraViCo(by="frames" if by_frames else "tokens"))
    alpha, beta = (0.95 if ratio <= 2 else 0.9), (0.6 if ratio <= 3 else 0.8)
    return Recipe(decay=UltraViCo(alpha, beta, period=50.0, gamma=4.0, by="frames" if by_frames else "tokens"))


def _automatic(family: str, sizes: Sizes) -> Recipe:
    longer, *larger = (ratio > 1 for ratio in sizes.ratios)
    if family == "stable_diffusion":
        return Recipe(unet=HiDiffusion()) if any(larger) else Recipe()
    found = Recipe(space=YaRN() if family == "wan" and any(larger) else PLAIN)
    return found.with_(_ultravico(family, sizes)) if longer else found


def _demofusion(family: str, sizes: Sizes) -> Recipe:
    # One stage for each whole multiple of the trained side, as in the paper.
    stages = max(1, math.ceil(max(sizes.ratios[1:])) - 1)
    return Recipe(views=Views(time=False, jitter=True, dilated=1.0), guide=Guide(stages=stages))


def _upscale(family: str, sizes: Sizes) -> Recipe:
    # minireel knows digits of one size: with a quarter of the steps enlarged ones lose their strokes, with half they
    # break in two.
    guide = Guide(mode="start", strength=0.125, through="pixels")
    return Recipe(space=YaRN() if family == "wan" else PLAIN, guide=guide)


_FREENOISE = Recipe(views=Views(space=False, stride=0.25), noise=Rescheduled())
_FLEX = Recipe(time=YaRN(temper=False), noise=Antiphase(), window=InwardWindow(space=False, sink=3))
_FREESWIM = Recipe(
    window=InwardWindow(time=False),
    temper=Entropy(1.046),
    dual=DualPath(),
    guide=Guide(mode="start", through="pixels"),
)
_CUPSCALE = Recipe(views=Views(time=False), guide=Guide(mode="lowpass"), regional=RegionalPrior())
_WAN, _VIDEO, _UNET = ("wan",), ("wan", "hunyuan_video"), ("stable_diffusion",)

#: families and recipe of every name
NAMES: dict[str, tuple[tuple[str, ...], Make]] = {
    "auto": (_VIDEO + _UNET, _automatic),
    "plain": (_VIDEO + _UNET, _fixed(Recipe())),
    "riflex": (_WAN, _fixed(Recipe(time=RIFLEx()))),
    "pi": (_WAN, _both(PositionInterpolation())),
    "pi_time": (_WAN, _fixed(Recipe(time=PositionInterpolation()))),
    "ntk": (_WAN, _both(NTK())),
    "yarn": (_WAN, _both(YaRN())),
    "ultravico": (_VIDEO, _ultravico),
    "ultravico_frames": (_VIDEO, lambda family, sizes: _ultravico(family, sizes, by_frames=True)),
    "window": (_WAN, _fixed(Recipe(window=InwardWindow()))),
    "entropy": (_WAN, _fixed(Recipe(temper=Entropy()))),
    "gri": (_WAN, _fixed(Recipe(window=Alternating()))),
    "regions": (_WAN, _fixed(Recipe(window=LocalRegions()))),
    "registers": (_WAN, _fixed(Recipe(window=InwardWindow(time=False), mixer=Registers()))),
    "ultragen": (_WAN, _fixed(Recipe(window=LocalRegions(), mixer=Compressed()))),
    "sliding": (_WAN, _fixed(Recipe(views=Views(space=False)))),
    "freenoise": (_WAN, _fixed(_FREENOISE)),
    "flex": (_WAN, _fixed(_FLEX)),
    "freeswim": (_WAN, _fixed(_FREESWIM)),
    "multidiffusion": (_WAN + _UNET, _fixed(Recipe(views=Views(time=False)))),
    "demofusion": (_WAN + _UNET, _demofusion),
    "upscale": (_WAN + _UNET, _upscale),
    "cupscale": (_WAN + _UNET, _fixed(_CUPSCALE)),
    "hidiffusion": (_UNET, _fixed(Recipe(unet=HiDiffusion()))),
    "agent": (_UNET, _fixed(Recipe(mixer=AgentAttention()))),
    "tlc": (_UNET, _fixed(Recipe(statistics=LocalStatistics()))),
}
FAMILIES = _VIDEO + _UNET
#: names by family
METHODS: dict[str, tuple[str, ...]] = {
    family: tuple(name for name, (families, _) in NAMES.items() if family in families) for family in FAMILIES
}


def resolve(method: str | Recipe, family: str, sizes: Sizes) -> Recipe:
    """The recipe of a method for a family and a size.

    Raises:
        ValueError: a family that cannot be extended, an unknown method, or one that is for other families.
    """
    if family not in METHODS:
        raise ValueError(f"extend does not know the family {family!r}; it knows: {', '.join(METHODS)}")
    if isinstance(method, Recipe):
        _check_parts(method, family)
        return method
    found = Recipe()
    for name in str(method).replace("-", "_").lower().split("+"):
        found = found.with_(_named(name.strip(), method, family)(family, sizes))
    return found


#: what a recipe may set, by family
_PARTS = {
    "wan": ("time", "space", "decay", "window", "temper", "mixer", "views", "dual", "noise", "guide", "regional"),
    "hunyuan_video": ("decay",),
    "stable_diffusion": ("mixer", "unet", "statistics", "views", "guide", "regional"),
}


def _check_parts(recipe: Recipe, family: str) -> None:
    """Refuse a recipe that sets what its family has not."""
    for name, part in recipe._parts():
        of_unets = isinstance(part, AgentAttention)
        if name not in _PARTS[family] or (name == "mixer" and of_unets != (family == "stable_diffusion")):
            allowed = ", ".join(_PARTS[family])
            raise ValueError(f"{_short(part)} is not for {family}; a recipe for it may set {allowed}")


def _named(name: str, method: str | Recipe, family: str) -> Make:
    allowed = ", ".join(METHODS[family])
    if name not in NAMES:
        raise ValueError(f"unknown method {method!r}; allowed: {allowed}, or several joined by +")
    families, make = NAMES[name]
    if family not in families:
        raise ValueError(f"method {name!r} is for {' and '.join(families)}, not for {family}; allowed: {allowed}")
    return make
