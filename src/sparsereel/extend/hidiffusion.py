"""HiDiffusion (arXiv 2311.17528): U-Nets of Stable Diffusion at two and four times the trained side, without training.

Two parts. RAU-Net: objects come twice at large sizes because the deep features are larger than those that the
convolutions were trained on, so early steps shrink them back. MSW-MSA: self-attention at the highest level runs in
four windows that move by a random quarter, which is what makes it fast.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from sparsereel.extend.change import Where
from sparsereel.extend.regions import Regions
from sparsereel.step import StepInfo

if TYPE_CHECKING:
    from sparsereel.extend.extension import Extension
    from sparsereel.runtime import ModelRuntime

Kind = Literal["auto", "sd", "sdxl", "sdxl_turbo"]

#: steps with the dilated downsampler at 2048 px in SDXL, as a share of all: 8 of 50
AGGRESSIVE = 8 / 50
#: (T1, T2) as shares of the steps, by kind and by whether the short side is four times the trained one
THRESHOLDS: dict[tuple[str, bool], tuple[float, float]] = {
    ("sd", False): (0.4, 0.0),
    ("sd", True): (0.7, 0.3),
    ("sdxl", False): (0.4, 0.0),
    ("sdxl", True): (0.7, 0.3),
    ("sdxl_turbo", False): (0.5, 0.0),
    ("sdxl_turbo", True): (0.5, 0.0),
}
#: T1 of SDXL at twice the side under a ControlNet
CONTROLNET_T1 = 0.5


@dataclass(frozen=True)
class Shrinking:
    """When the features are shrunk; [first, last) steps as shares of the run.

    Attributes:
        dilated: the downsampler strides by 4 instead of 2, with its weights dilated by 2.
        pooled: the block after it (before it, in SDXL) pools its features 2 x 2.
    """

    dilated: tuple[float, float]
    pooled: tuple[float, float]

    def at(self, step: StepInfo | None) -> tuple[bool, bool]:
        """(dilated, pooled) at a step; nothing is shrunk where the step is unknown."""
        if step is None:
            return False, False
        a, b = (int(step.total * first) <= step.index < int(step.total * last) for first, last in self._spans)
        return a, b

    @property
    def _spans(self) -> tuple[tuple[float, float], tuple[float, float]]:
        return self.dilated, self.pooled


@dataclass(frozen=True)
class Levels:
    """Which modules of a U-Net are changed.

    Attributes:
        downsampler, upsampler: numbers of the down and up blocks whose resamplers change by 4 instead of 2.
        pooled_down, pooled_up: numbers of the blocks between which features are pooled.
        window_down, window_up: numbers of the blocks whose self-attention runs in windows.
        window_blocks: transformer blocks of each attention module that do so, the first ones.
    """

    downsampler: int
    upsampler: int
    pooled_down: int
    pooled_up: int
    window_down: int
    window_up: int
    window_blocks: int

    @classmethod
    def of(cls, unet: Any, kind: str) -> Levels:
        """The levels of a U-Net of this kind: those of the authors' tables, counted from its ends.

        Raises:
            ValueError: a U-Net without the blocks that are to change.
        """
        last = len(unet.down_blocks) - 1
        large = kind != "sd"
        down = 1 if large else 0
        found = cls(down, last - 1 - down, 1, last - 1, down, last - down, 2 if large else 1)
        try:
            needed = [unet.down_blocks[number].attentions for number in (found.pooled_down, found.window_down)]
            needed += [unet.up_blocks[number].attentions for number in (found.pooled_up, found.window_up)]
            needed += [unet.down_blocks[down].downsamplers, unet.up_blocks[found.upsampler].upsamplers]
            known = all(needed) and found.upsampler >= 0
        except (AttributeError, IndexError):
            known = False
        if not known:
            raise ValueError(f"this U-Net is not built as those of {kind}, so hidiffusion does not know it")
        return found

    def in_windows(self, name: str) -> bool:
        """Whether a self-attention layer, `down_blocks.0.attentions.1.transformer_blocks.0.attn1`, runs in windows."""
        block, number, attentions, _, transformers, inner, *_ = [*name.split("."), *[""] * 6]
        if attentions != "attentions" or transformers != "transformer_blocks" or int(inner) >= self.window_blocks:
            return False
        return (block, int(number)) in (("down_blocks", self.window_down), ("up_blocks", self.window_up))


@dataclass(frozen=True)
class HiDiffusion:
    """RAU-Net and MSW-MSA, with the authors' settings by model and size unless given.

        dilated downsampler:  conv 3x3, stride 4, padding 2, dilation 2 instead of stride 2, padding 1; its upsampler
                              goes to the size of the skip connection
        pooled block:         2x2 means after its first resnet and attention, bicubic back before the last resnet
        window attention:     halves of each side, rolled by r/4 of a window, r in {0, 1, 2, 3} drawn a layer and step

    SD 1.5 / 2.1: dilated for the first T1 of the steps, pooled for the first T2. SDXL: the roles change; up to four
    times the side the first 8/50 of the steps are dilated, those up to T1 pooled. SDXL-Turbo: pooled only.
    Steps are counted from the scheduler and shifts depend on seed, step and layer alone, so that guidance in two calls
    or in one batch, and interrupted runs, give the same picture.

    Args:
        kind: "auto" tells SDXL from its extra conditioning and SDXL-Turbo from the name of its checkpoint.
        t1, t2: shares of the steps; None = the table's.
        aggressive: SDXL's dilated first steps; None = unless the pipeline inpaints or the checkpoint is Playground.
        raunet, windows: either part can be left out.
        control: share of the steps, the first ones, at which a ControlNet is listened to.

    Raises:
        ValueError: a share outside [0, 1], an unknown kind.
    """

    kind: Kind = "auto"
    t1: float | None = None
    t2: float | None = None
    aggressive: bool | None = None
    raunet: bool = True
    windows: bool = True
    control: float = 0.6

    name: ClassVar[str] = "hidiffusion"

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "sd", "sdxl", "sdxl_turbo"):
            raise ValueError(f"HiDiffusion knows the kinds auto, sd, sdxl and sdxl_turbo, got {self.kind!r}")
        for name in ("t1", "t2", "control"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"HiDiffusion's {name} is a share of the steps from 0 to 1, got {share}")

    def kind_of(self, unet: Any, checkpoint: str) -> str:
        """ "sd", "sdxl" or "sdxl_turbo"."""
        if self.kind != "auto":
            return self.kind
        if unet.config.addition_embed_type != "text_time":
            return "sd"
        return "sdxl_turbo" if "turbo" in checkpoint.lower() else "sdxl"

    def shrinking(self, kind: str, ratio: float, *, controlled: bool, gentle: bool) -> Shrinking:
        """When what is shrunk.

        Args:
            ratio: short side over the trained side.
            controlled: a ControlNet steers the U-Net.
            gentle: no aggressive first steps: inpainting, Playground.
        """
        four = ratio >= 4
        t1, t2 = THRESHOLDS[kind, four]
        if kind == "sdxl" and not four and controlled:
            t1 = CONTROLNET_T1
        t1, t2 = t1 if self.t1 is None else self.t1, t2 if self.t2 is None else self.t2
        if kind == "sd":
            return Shrinking((0.0, t1), (0.0, t2))
        if kind == "sdxl" and not four and (not gentle if self.aggressive is None else self.aggressive):
            return Shrinking((0.0, AGGRESSIVE), (AGGRESSIVE, t1))
        return Shrinking((0.0, 0.0 if kind == "sdxl_turbo" else t2), (0.0, t1))

    def window(self, where: Where, runtime: ModelRuntime) -> Regions | None:
        """The windows of one self-attention call; None where it stays whole."""
        model = runtime.model_ref()
        if not self.windows or model is None:
            return None
        kind = self.kind_of(model, checkpoint_of(model, runtime))
        if not Levels.of(model, kind).in_windows(where.name):
            return None
        height, width = where.layout[2], where.layout[3]
        window = math.ceil(height / 2), math.ceil(width / 2)
        step = runtime.step()
        quarters = 0 if step is None else draw_quarters(runtime.seed(), step.index, where.index)
        return Regions(2, 2, shift=(window[0] // 4 * quarters, window[1] // 4 * quarters))

    def install(self, model: nn.Module, extension: Extension, runtime: ModelRuntime) -> list[Any]:
        """Hooks of RAU-Net; returns handles with `.remove()`.

        Raises:
            ValueError: a U-Net that is not built as those of Stable Diffusion.
        """
        from sparsereel.extend.raunet import RAUNet

        kind = self.kind_of(model, checkpoint_of(model, runtime))
        levels = Levels.of(model, kind)
        return RAUNet(self, kind, levels, model, extension, runtime).install() if self.raunet else []


def draw_quarters(seed: int, step: int, layer: int) -> int:
    """0 .. 3 with equal chances, by seed, step and layer and nothing else."""
    return random.Random(f"sparsereel msw {seed} {step} {layer}").randrange(4)


def checkpoint_of(model: nn.Module, runtime: ModelRuntime) -> str:
    """What the weights were loaded from, for models that only their name tells apart; empty when nobody knows."""
    names = [getattr(pipe, "name_or_path", None) for pipe in runtime.steps.pipelines()]
    names.append(getattr(getattr(model, "config", None), "_name_or_path", None))
    return " ".join(name for name in names if isinstance(name, str))
