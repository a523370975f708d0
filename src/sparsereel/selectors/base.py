"""What a selector is: a frozen description of how to choose blocks, given the q and k of one call.

A pattern knows only where tokens sit; a selector looks at them. It scores blocks cheaply, keeps the best within its
budget and hands back a BlockMask, with the order of tokens where the method moves them. What it may remember between
calls lives in `SelectionContext.state`, never in the selector, so one selector serves any number of layers and models.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsereel.grid import Permutation, TokenGrid
from sparsereel.patterns import arguments
from sparsereel.patterns.sink_tokens import Place, check_places
from sparsereel.registry import lists
from sparsereel.selectors import checks
from sparsereel.selectors.assemble import to_block_mask
from sparsereel.selectors.partition import Partition, over_heads
from sparsereel_kernels import BlockMask, KeyBias
from sparsereel_kernels.modifiers import Modifier


@dataclass(frozen=True, eq=False)
class Selection:
    """What one call of attention visits.

    Attributes:
        mask: H heads; batch B, or 1 where all samples are alike. Its rows are tokens in `order_q`, its columns tokens
            in `order_k`.
        order_q: int64 [B or 1, H or 1, S], position of each token of the new sequence in the old one; None = as it is.
        order_k: int64 [B or 1, Hkv or 1, S]. Padding stays behind the last valid key, so key lengths hold in it.
    """

    mask: BlockMask
    order_q: Tensor | None = None
    order_k: Tensor | None = None

    def arrange(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v in the order that the mask is for."""
        return reorder(q, self.order_q), reorder(k, self.order_k), reorder(v, self.order_k)

    def arrange_modifier(self, modifier: Modifier | None, heads: int) -> Modifier | None:
        """The modifier of the logits in the order that the mask is for.

        Args:
            heads: of q.

        Raises:
            ValueError: a modifier other than a bias of keys, which orders of a head's own would tear apart.
        """
        if modifier is None or self.order_k is None:
            return modifier
        if not isinstance(modifier, KeyBias):
            raise ValueError(f"{type(modifier).__name__} does not go with a selector that moves tokens")
        order, bias = self.order_k, modifier.bias
        if order.shape[1] > 1:
            order = order.repeat_interleave(heads // order.shape[1], 1)
        bias = bias[None, None] if bias.ndim == 1 else bias[:, None] if bias.ndim == 2 else bias
        batch, rows = max(order.shape[0], bias.shape[0]), max(order.shape[1], bias.shape[1])
        return KeyBias(bias.expand(batch, rows, -1).gather(2, order.expand(batch, rows, -1)))

    def restore(self, out: Tensor) -> Tensor:
        """The output [B, H, S, Dv] of attention over arranged tokens, back in the order of q."""
        if self.order_q is None:
            return out
        index = self.order_q.expand(*out.shape[:3])[..., None].expand(out.shape)
        return torch.empty_like(out).scatter_(2, index, out)


def reorder(x: Tensor, order: Tensor | None) -> Tensor:
    """x [B, H, S, D] with its tokens in `order` [B or 1, H or 1, S]; None = as they are."""
    if order is None:
        return x
    return x.gather(2, order.expand(*x.shape[:3])[..., None].expand(x.shape))


@dataclass
class Memory:
    """What one selector remembers for one layer, branch and geometry.

    Attributes:
        selection: the latest, with the step it was made at and the key lengths it was made for.
        latest: the step of the latest call.
        notes: what a method keeps between selections (centroids, log-sum-exp).
    """

    selection: Selection | None = None
    step: int = -1
    latest: int = -1
    key_lengths: Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SelectionContext:
    """One call of attention, as selectors see it.

    Args:
        grid: the tokens of the sequence.
        block: (query, key) tokens of a block.
        scale: of the scores; None = D**-0.5.
        layer, step, steps: numbers of the layer and of the denoising step, and how many steps are run.
        branch: name of the guidance branch ("cond", "uncond"); each has its own memory.
        key_lengths: [B] int32, tokens of each sample that are not padding; None = all.
        order: order of the tokens in the sequence; None = grid order.
        heads: which heads of the layer q holds; None = all. Part of what memory is kept for.
        state: memory of one generation, owned by the caller: a new dict for every generation. A call whose step lies
            before the one remembered starts afresh too.
    """

    grid: TokenGrid
    block: tuple[int, int] = (128, 64)
    scale: float | None = None
    layer: int = 0
    step: int = 0
    steps: int = 1
    branch: str = ""
    key_lengths: Tensor | None = None
    order: Permutation | None = None
    heads: tuple[int, ...] | None = None
    state: dict[Any, Any] = field(default_factory=dict)

    def memory(self, selector: Selector, q: Tensor, k: Tensor) -> Memory:
        """What `selector` remembers for this layer, branch and geometry; made when first asked for."""
        geometry = (self.grid, self.block, self.order, tuple(q.shape), tuple(k.shape), q.device)
        key = (selector, self.layer, self.branch, self.heads, geometry)
        memory: Memory | None = self.state.get(key)
        if memory is None or self.step < memory.latest:
            memory = self.state[key] = Memory()
        return memory


@dataclass(frozen=True, eq=False, kw_only=True)
class Selector:
    """How to choose blocks. Subclasses are frozen dataclasses with `eq=False`, compared and hashed as written.

    Args:
        refresh: when `refreshing` computes scores again: every so many steps (1 or "every step" = always), "once" (at
            the first sparse step, then frozen), or at the first call and then at a list of steps (whole numbers) or of
            shares of all steps.
        keep_sinks: everything also sees the first frame of a video, or `sinks`, where there are any.
        sinks: (frame, row, column) of tokens that everything sees; see `patterns.SinkTokens`.

    Raises:
        ValueError: a value out of range.
    """

    refresh: checks.Refresh = 1
    keep_sinks: bool = False
    sinks: tuple[Place, ...] = ()

    name: ClassVar[str]

    def __post_init__(self) -> None:
        arguments.store(self, refresh=checks.refresh(self.refresh))
        arguments.flag("keep_sinks", self.keep_sinks)
        if self.sinks != ():
            arguments.store(self, sinks=check_places(self.sinks))
        self.check()

    def check(self) -> None:
        """Clean the arguments of this method; raise ValueError for those out of range."""

    def block_map(self, q: Tensor, k: Tensor, cut: Partition, scale: float) -> Tensor:
        """bool [B, H, nQ, nK]: the candidates chosen for some heads (forced blocks are added later).

        Args:
            q, k: [B, H, S, D] and [B, Hkv, S, D], any number of the heads.
            scale: of the scores.
        """
        raise NotImplementedError(f"{type(self).__name__} must define block_map(q, k, cut, scale)")

    def numbers(self, cut: Partition, head_dim: int) -> int:
        """Size of the largest table that `block_map` makes for one head; heads are taken a few at a time by it."""
        return max(cut.counts[0] * cut.counts[1], cut.length * head_dim)

    def select(self, q: Tensor, k: Tensor, cut: Partition, context: SelectionContext) -> Selection:
        """The selection for all heads; methods that move tokens or remember something define this instead."""
        scale = scale_of(q, context)
        chosen = over_heads(lambda q, k: self.block_map(q, k, cut, scale), q, k, self.numbers(cut, q.shape[3]))
        return Selection(to_block_mask(cut.finish(chosen), cut.length, cut.block))

    @torch.no_grad()
    def __call__(self, q: Tensor, k: Tensor, context: SelectionContext) -> Selection:
        """Choose blocks for this q and k, whatever was chosen before (see `refreshing` for the refresh policy).

        Args:
            q: [B, H, S, D].
            k: [B, Hkv, S, D].

        Raises:
            ValueError: shapes that do not agree with each other or with the grid.
        """
        checks.attention_inputs(q, k, context.grid, context.key_lengths)
        return self.select(q, k, self.partition(context, q.device), context)

    def partition(self, context: SelectionContext, device: torch.device, order: Permutation | None = None) -> Partition:
        """The blocks of this call, in the order of the context or in `order`."""
        return Partition.of(
            context.grid,
            context.block,
            order=order or context.order,
            sink_frames=int(self.keep_sinks and not self.sinks),
            sinks=self.sinks if self.keep_sinks else (),
            key_lengths=context.key_lengths,
            device=device,
        )

    def cost(self, grid: TokenGrid, block: tuple[int, int], heads: int, head_dim: int) -> float:
        """Floating-point operations of one selection for one sample: matrix products (2 a multiply-add) and passes
        over tokens (1 a number). Each method documents its formula."""
        raise NotImplementedError(f"{type(self).__name__} must define cost(grid, block, heads, head_dim)")

    def arguments(self) -> dict[str, Any]:
        """The arguments that differ from their defaults, so that `make(name, **arguments)` gives the selector back."""
        given = {f.name: getattr(self, f.name) for f in ordered_fields(type(self))}
        required = {f.name: given[f.name] for f in fields(self) if f.default is MISSING}
        defaults = type(self)(**required)
        return {k: v for k, v in given.items() if k in required or repr(v) != repr(getattr(defaults, k))}

    def to_mapping(self) -> dict[str, Any]:
        """Plain data for plans: `{selector: name, ...arguments}`; `from_mapping` gives the selector back."""
        return {"selector": self.name, **{k: lists(v) for k, v in self.arguments().items()}}

    def __str__(self) -> str:
        """Short form for tables: the name and the arguments that differ from their defaults."""
        listed = ", ".join(f"{key}={value}" for key, value in self.arguments().items())
        return f"{self.name}({listed})" if listed else self.name

    @cached_property
    def _written(self) -> str:
        return repr(self)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Selector) and self._written == other._written

    def __hash__(self) -> int:
        return hash(self._written)


def scale_of(q: Tensor, context: SelectionContext) -> float:
    """The scale of the scores."""
    return float(q.shape[-1] ** -0.5 if context.scale is None else context.scale)


def ordered_fields(cls: type[Any]) -> list[Any]:
    """Fields in the order of documentation: those of the method, then those that all selectors have."""
    common = [f.name for f in fields(Selector)]
    return sorted(fields(cls), key=lambda f: f.name in common)
