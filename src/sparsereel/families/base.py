"""What a model family has to say so that its attention can be replaced.

A family names the classes it covers, where their self-attention lives, which attention processors it understands and
how the tokens of one forward call lie on a grid. Everything else (step, plan, masks, kernels) is shared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from sparsereel.families.layout import Layout


class Family(ABC):
    """One model family. Subclasses are stateless; one instance of each is registered in `families.FAMILIES`."""

    name: ClassVar[str]
    #: what people know these models as, for tables
    covers: ClassVar[str]
    #: class names of the diffusers models that this family covers
    classes: ClassVar[tuple[str, ...]]
    #: "dispatch" for processors that call `dispatch_attention_fn`, "sdpa" for those that call
    #: `F.scaled_dot_product_attention` themselves
    seam: ClassVar[Literal["dispatch", "sdpa"]]
    #: class names of the processors whose call is understood; a layer with another one stays dense
    processors: ClassVar[frozenset[str]]
    #: how diffusers' context parallelism deals out this family's tokens, as `parallel.Shards` names it: "sequence", or
    #: "segments" where text and image are split each for itself; None = not known, such calls stay dense
    context_parallel: ClassVar[Literal["sequence", "segments"] | None] = None
    #: name of the pipeline component that a bare model stands for
    component: ClassVar[str] = "transformer"

    @abstractmethod
    def self_attention(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Names and modules of all self-attention layers over the token grid, in forward order."""

    @abstractmethod
    def layout(self, model: nn.Module, arguments: Mapping[str, Any]) -> Layout | str | None:
        """The token layout of this call from the forward's arguments; None, or a sentence that says why not, when they
        are not understood.

        Runs inside `torch.compile`: shapes and config values only. What has to be read from a tensor's values is read
        through `reading.read_once`, which answers None there.
        """

    #: names of the forward's leading positional parameters, so that `layout` can look arguments up by name
    parameters: ClassVar[tuple[str, ...]] = ("hidden_states",)

    def layer_layout(self, layout: Layout, length: int) -> Layout | None:
        """The layout of a layer whose sequence has `length` tokens; None when the layer is not on the grid."""
        return layout if layout_length(layout) == length else None

    def key_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """The key-padding mask (B, 1, 1, keys) behind what this family's processors hand to attention.

        Some build a mask a query from one mask a key; unless a family knows that, masks are taken as they come.
        """
        return mask

    def install_order(self, model: nn.Module, runtime: OrderSource) -> list[Any]:
        """Hooks that put tokens in tile order once per forward; returns handles with `.remove()`.

        An empty list means that the family keeps the model's own token order.
        """
        return []

    @property
    def orders_tokens(self) -> bool:
        """Whether tokens are put in order once a forward; elsewhere every call moves its own."""
        return type(self).install_order is not Family.install_order

    def heads(self, module: nn.Module) -> int:
        """Number of attention heads of one layer."""
        return int(module.heads)  # type: ignore[arg-type]


class OrderSource(ABC):
    """What an ordering hook asks: the token order of the call in progress, or None for the model's own."""

    @abstractmethod
    def call_order(self, like: torch.Tensor, *, inverse: bool) -> torch.Tensor | None:
        """int64 indices (S,) on the device of `like`."""


def layout_length(layout: Layout) -> int:
    """Tokens in the sequence that a layout describes."""
    total = 0
    for start in range(0, len(layout), 4):
        kind, a, b, c = layout[start : start + 4]
        total += a * b * c if kind < 2 else a
    return total


def grid_alone(layout: Layout) -> Layout:
    """The part of a layout that lies on a grid; for layers over the picture without its text."""
    for start in range(0, len(layout), 4):
        if layout[start] < 2:
            return layout[start : start + 4]
    return ()


def by_key(mask: torch.Tensor) -> torch.Tensor:
    """(B, 1, 1, keys) behind a mask (B, 1, S, S) built as kept[query] & kept[key].

    Queries that are left out differ, which nobody sees: as keys they are left out too. Numbers added to the logits are
    another matter, since such keys may still be seen; those masks are returned as they are.
    """
    pairs = mask.dtype == torch.bool and mask.shape[2] == mask.shape[3]
    return mask.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) if pairs else mask


def with_text_of(layout: Layout, length: int) -> Layout | None:
    """`layout`, whose last segment is text, with as much of that text as fills `length` tokens; None beyond its size.

    For models that leave padded text out of the sequence.
    """
    if layout_length(layout) == length:
        return layout
    if layout[-4] != 2:
        return None
    rest = length - layout_length(layout[:-4])
    return layout[:-4] + ((2, rest, 0, 0) if rest else ()) if 0 <= rest <= layout[-3] else None


def named(parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Forward arguments by name."""
    return {**dict(zip(parameters, args, strict=False)), **kwargs}


def by_suffix(model: nn.Module, suffixes: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Modules whose dotted name ends in one of `suffixes`, in registration order."""
    return [(name, module) for name, module in model.named_modules() if name.endswith(tuple(suffixes))]
