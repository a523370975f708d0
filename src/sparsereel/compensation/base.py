"""What a compensation is: a frozen description of how to make up for the key blocks that a sparse call skips."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsereel.registry import lists
from sparsereel.selectors.scores import block_means
from sparsereel_kernels import BlockMask
from sparsereel_kernels.block_lists import block_counts


@dataclass(frozen=True, eq=False)
class SparseCall:
    """One launch of sparse attention, as compensations see it.

    Args:
        q, k, v: [B, H, S, D], [B, Hkv, S, D], [B, Hkv, S, Dv], in the order that the mask is for.
        mask: the blocks that were visited. A block counts as skipped where none of it is visited; pairs masked inside
            a visited block stay masked.
        scale: of the scores.
        key_lengths: [B] int32, valid keys; None = all.
        isolated: bool [S] or [B or 1, H or 1, S], tokens that are never averaged with others (text); None = none.
        layer: number of the layer.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: BlockMask
    scale: float
    key_lengths: Tensor | None = None
    isolated: Tensor | None = None
    layer: int = 0

    @property
    def block(self) -> tuple[int, int]:
        """(query, key) tokens of a block."""
        return self.mask.BLOCK_SIZE

    @cached_property
    def valid(self) -> Tensor:
        """int64 [B or 1]: valid keys of each sample."""
        length = self.k.shape[2]
        if self.key_lengths is None:
            return torch.full((1,), length, device=self.k.device)
        return self.key_lengths.to(self.k.device, torch.int64).clamp(0, length)

    @cached_property
    def k_sizes(self) -> Tensor:
        """int64 [B or 1, nK]: valid tokens of each key block."""
        return _sizes(self.valid, self.k.shape[2], self.block[1])

    @cached_property
    def q_sizes(self) -> Tensor:
        """int64 [B or 1, nQ]: valid tokens of each query block."""
        return _sizes(self.valid, self.q.shape[2], self.block[0])

    @cached_property
    def visited(self) -> Tensor:
        """bool [B or 1, H or 1, nQ, nK]: blocks of which at least a part was computed."""
        return self.mask.cached("visited", lambda: self.mask.block_map() != -1)

    @cached_property
    def skipped(self) -> Tensor:
        """bool [B or 1, H or 1, nQ, nK]: blocks with valid keys, none of which was computed, in rows that see anything.

        A row that the plan gives no keys at all (`skip`) stays without.
        """
        there = (self.k_sizes > 0)[:, None, None]
        return ~self.visited & there & self.visited.any(-1, keepdim=True)

    @cached_property
    def skips_anything(self) -> bool:
        """Whether there is anything to make up for."""
        return bool(self.skipped.any())

    @cached_property
    def valid_keys(self) -> Tensor | None:
        """bool [B or 1, S]; None where all keys are valid."""
        if self.key_lengths is None:
            return None
        return torch.arange(self.k.shape[2], device=self.k.device) < self.valid[:, None]

    @cached_property
    def k_means(self) -> Tensor:
        """fp32 [B, Hkv, nK, D]."""
        return block_means(self.k, self.block[1], self.k_sizes, self.valid_keys)

    @cached_property
    def v_means(self) -> Tensor:
        """fp32 [B, Hkv, nK, Dv]."""
        return block_means(self.v, self.block[1], self.k_sizes, self.valid_keys)

    @cached_property
    def q_means(self) -> Tensor:
        """fp32 [B, H, nQ, D]."""
        return block_means(self.q, self.block[0], self.q_sizes, self.valid_keys)

    @cached_property
    def log_sizes(self) -> Tensor:
        """fp32 [B or 1, 1, 1, nK]: log of the tokens that a pooled key stands for."""
        return self.k_sizes.clamp(min=1).float().log()[:, None, None]

    def rows(self, per_block: Tensor) -> Tensor:
        """[..., nQ, x] of query blocks as [..., S, x] of queries."""
        return per_block.repeat_interleave(self.block[0], -2)[..., : self.q.shape[2], :]


def _sizes(valid: Tensor, length: int, block: int) -> Tensor:
    count = block_counts((length, length), (block, block))[0]
    return (valid[:, None] - torch.arange(count, device=valid.device) * block).clamp(0, block)


@dataclass(frozen=True, eq=False)
class Compensation:
    """How to make up for skipped blocks. Subclasses are frozen dataclasses with `eq=False`, compared as written.

    Raises:
        ValueError: a value out of range.
    """

    name: ClassVar[str]
    #: whether `complete` wants the log-sum-exp of the sparse part
    needs_lse: ClassVar[bool] = False
    #: whether it remembers dense calls of earlier steps, so that the denoising step must be known
    remembers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Clean the arguments; raise ValueError for those out of range."""

    def check_model(self, layers: int) -> None:
        """Raise ValueError where this cannot be used on a model with that many self-attention layers."""

    def complete(self, call: SparseCall, out: Tensor, lse: Tensor | None) -> Tensor:
        """The compensated output.

        Args:
            out: [B, H, S, Dv], what sparse attention gave.
            lse: [B, H, S] fp32, with `needs_lse`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define complete(call, out, lse)")

    def arguments(self) -> dict[str, Any]:
        """The arguments that differ from their defaults, so that `make(name, **arguments)` gives this back."""
        required = {f.name: getattr(self, f.name) for f in fields(self) if f.default is MISSING}
        defaults = type(self)(**required)
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in given.items() if k in required or repr(v) != repr(getattr(defaults, k))}

    def to_plain(self) -> Any:
        """Plain data for plans: the name, or `{name: {arguments}}`."""
        arguments = {key: lists(value) for key, value in self.arguments().items()}
        return {self.name: arguments} if arguments else self.name

    def __str__(self) -> str:
        listed = ", ".join(f"{key}={value}" for key, value in self.arguments().items())
        return f"{self.name}({listed})" if listed else self.name

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))
