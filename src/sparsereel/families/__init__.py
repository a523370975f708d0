"""The model families whose attention sparsereel can replace, and how to find the one a model belongs to."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsereel.families.base import Family
from sparsereel.families.cogvideox import CogVideoX
from sparsereel.families.cross_attention_dits import Allegro, DiT, HunyuanDiT, Latte, PixArt
from sparsereel.families.flux import Bria, BriaFibo, Chroma, Flux, Flux2, LongCatImage, OvisImage
from sparsereel.families.hunyuan_relatives import HunyuanImage, HunyuanVideo15, HunyuanVideoFramepack, MotifVideo
from sparsereel.families.hunyuan_video import HunyuanVideo
from sparsereel.families.joint_images import AuraFlow, CogView3Plus, CogView4, HiDream, StableDiffusion3
from sparsereel.families.joint_videos import ConsisID, EasyAnimate, Kandinsky5, Mochi
from sparsereel.families.ltx import LTX2Video, LTXVideo
from sparsereel.families.lumina import Lumina2, ZImage
from sparsereel.families.qwen_image import QwenImage
from sparsereel.families.refused import REFUSED
from sparsereel.families.stable_diffusion import StableDiffusion, VideoUNet
from sparsereel.families.wan import Wan
from sparsereel.families.wan_like import AnyFlow, ChronoEdit, Cosmos, SkyReelsV2, WanAnimate

__all__ = ["FAMILIES", "REFUSED", "Family", "find", "models_of", "orders_tokens", "register", "unwrap"]

#: video models, then image models; `register` adds to it
FAMILIES: list[Family] = [
    *(
        Wan(),
        HunyuanVideo(),
        CogVideoX(),
        LTXVideo(),
        LTX2Video(),
        SkyReelsV2(),
        HunyuanVideo15(),
        HunyuanVideoFramepack(),
    ),
    *(WanAnimate(), ChronoEdit(), AnyFlow(), Cosmos(), Mochi(), Allegro(), Latte(), EasyAnimate(), ConsisID()),
    *(Kandinsky5(), MotifVideo(), VideoUNet()),
    *(Flux(), Flux2(), QwenImage(), ZImage(), Chroma(), StableDiffusion3(), StableDiffusion(), HunyuanImage()),
    *(CogView4(), CogView3Plus(), Lumina2(), HiDream(), AuraFlow(), PixArt(), DiT(), HunyuanDiT()),
    *(Bria(), BriaFibo(), LongCatImage(), OvisImage()),
]


def register(family: Family) -> None:
    """Make a family of one's own known, before those that come with the package.

    Raises:
        ValueError: not an instance of a `Family`, or another family has that name.
    """
    if not isinstance(family, Family):
        raise ValueError(f"register expects an instance of a Family, got {family!r}")
    if any(known.name == family.name for known in FAMILIES):
        raise ValueError(f"a family named {family.name!r} is registered already; give yours another name")
    FAMILIES.insert(0, family)


def orders_tokens(name: str) -> bool:
    """Whether the family of that name puts tokens in order once a forward."""
    return any(family.orders_tokens for family in FAMILIES if family.name == name)


def unwrap(model: Any) -> Any:
    """The module behind `torch.compile`'s wrapper."""
    return getattr(model, "_orig_mod", model)


def find(model: Any) -> Family | None:
    """The family of a model, by the names of its class and base classes; None when there is none."""
    names = {cls.__name__ for cls in type(unwrap(model)).__mro__}
    for family in FAMILIES:
        if names.intersection(family.classes):
            return family
    return None


def models_of(pipe_or_model: Any) -> dict[str, nn.Module]:
    """Supported models by component name: those of a pipeline, or the one model given.

    Raises:
        ValueError: nothing here is of a known family; the text lists the known classes.
    """
    if isinstance(pipe_or_model, nn.Module):
        family = find(pipe_or_model)
        found = {} if family is None else {family.component: unwrap(pipe_or_model)}
        given = type(unwrap(pipe_or_model)).__name__
    else:
        components = getattr(pipe_or_model, "components", None)
        if not isinstance(components, dict):
            raise ValueError(
                f"expected a diffusers pipeline or one of its models, got {type(pipe_or_model).__name__}; "
                f"known models: {_known()}"
            )
        modules = {name: value for name, value in components.items() if isinstance(value, nn.Module)}
        found = {name: unwrap(value) for name, value in modules.items() if find(value) is not None}
        given = f"{type(pipe_or_model).__name__} with " + ", ".join(
            sorted({type(unwrap(value)).__name__ for value in modules.values()})
        )
    if not found:
        raise ValueError(
            f"no model of a known family in {given}; {_refusals(pipe_or_model)}known models: {_known()}; "
            "docs/new-family.md shows how to register a family of one's own"
        )
    return found


def _refusals(pipe_or_model: Any) -> str:
    """Why known classes among what was given are refused; empty where there are none."""
    components = getattr(pipe_or_model, "components", None)
    given = components.values() if isinstance(components, dict) else [pipe_or_model]
    names = {type(unwrap(value)).__name__ for value in given}
    return "".join(f"{name} is refused: {REFUSED[name]}; " for name in sorted(names) if name in REFUSED)


def _known() -> str:
    return ", ".join(name for family in FAMILIES for name in family.classes)
