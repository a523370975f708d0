"""What an extension changes in one attention call, and how such a call runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sparsereel.extend.regions import Regions, attend_in_groups
from sparsereel.families.layout import Layout, decode
from sparsereel.launches import Choice, run_launches
from sparsereel.patterns.base import Pattern
from sparsereel.patterns.skip import Skip
from sparsereel.token_order import BLOCK, MASKS, Tile, tile_order
from sparsereel_kernels import BlockMask, FrameDecay, sparse_attention

if TYPE_CHECKING:
    from sparsereel.grid import TokenGrid

#: attention of q (B, H, S, D) as the plan and the window say; with `lse`, the pair (out, lse (B, H, S))
Inner = Callable[..., Any]


class Mixer(Protocol):
    """Something added to, or put in the place of, an attention call."""

    @property
    def dense_only(self) -> bool:
        """Whether a call that a sparse plan rules is left to that plan."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, grid: TokenGrid, inner: Inner) -> Tensor:
        """Attention output (B, H, S, Dv) of q, k, v (B, H, S, D) whose tokens lie on `grid`, in grid order."""
        ...


@dataclass(frozen=True)
class Change:
    """The change of one call.

    Attributes:
        modifier: of the logits.
        pattern: what queries may see at most; None = everything.
        scale: factor on the model's softmax scale.
        mixer: runs the call; None = plain attention.
    """

    modifier: FrameDecay | None = None
    pattern: Pattern | None = None
    scale: float = 1.0
    mixer: Mixer | None = None

    def within(self, pattern: Pattern) -> Pattern:
        """A head's pattern, less what this change forbids."""
        if self.pattern is None or isinstance(pattern, Skip):
            return pattern
        return self.pattern if pattern.name == "full" else pattern & self.pattern

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        choice: Choice | None,
        layout: Layout,
        tile: Tile | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Attention of one call.

        Args:
            q, k, v: (B, H, S, D).
            choice: what a sparse plan chose, this change's pattern included; None = the plan says dense.
            tile: order of the tokens; None = grid order.
            options: as `sparse_attention` takes them; "scale" None = 1 / sqrt(D).
        """
        scale = (q.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]) * self.scale
        options = {**options, "scale": scale}

        def inner(q: Tensor, k: Tensor, v: Tensor, *, lse: bool = False) -> Any:
            return self._plain(q, k, v, choice, layout, tile, options, lse)

        if self.mixer is None or (choice is not None and self.mixer.dense_only):
            return inner(q, k, v)
        if tile is None:
            return self.mixer.attend(q, k, v, scale=scale, grid=decode(layout), inner=inner)
        raise ValueError(f"{type(self.mixer).__name__} needs tokens in grid order, not in tiles; choose another plan")

    def densities(self, layout: Layout, tile: Tile | None, q: Tensor) -> tuple[float, float]:
        """Share of key blocks visited and of pairs allowed in a call that the plan leaves dense."""
        if self._in_groups(layout, tile, None, None):
            assert isinstance(self.pattern, Regions)
            groups = self.pattern.groups(decode(layout), q.device)
            share = sum(g.shape[0] * g.shape[1] ** 2 for g in groups) / q.shape[2] ** 2
            return share, share
        mask = self._mask(layout, tile, q.device)
        return (1.0, 1.0) if mask is None else (mask.density, mask.token_density)

    def _in_groups(self, layout: Layout, tile: Tile | None, modifier: Any, key_lengths: Any) -> bool:
        """Whether the window cuts the sequence in groups that plain attention can run on."""
        plain = modifier is None and self.modifier is None and key_lengths is None
        return isinstance(self.pattern, Regions) and plain and tile is None and len(layout) == 4

    def _mask(self, layout: Layout, tile: Tile | None, device: torch.device) -> BlockMask | None:
        if self.pattern is None:
            return None
        order = None if tile is None else tile_order(layout, tile)
        return MASKS.get((self.pattern,), decode(layout), block=BLOCK, device=device, order=order)

    def _plain(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        choice: Choice | None,
        layout: Layout,
        tile: Tile | None,
        options: dict[str, Any],
        lse: bool,
    ) -> Any:
        if choice is not None and not lse:
            return run_launches(q, k, v, choice, **options)
        if choice is not None:
            return sparse_attention(q, k, v, choice.only_mask, return_lse=True, **options)
        if self._in_groups(layout, tile, options["modifier"], options["key_lengths"]) and not lse:
            assert isinstance(self.pattern, Regions)
            return attend_in_groups(q, k, v, self.pattern.groups(decode(layout), q.device), options["scale"])
        mask = self._mask(layout, tile, q.device)
        if lse:
            return sparse_attention(q, k, v, mask, return_lse=True, **options)
        return sparse_attention(q, k, v, mask, **options)


@dataclass(frozen=True)
class Where:
    """Which attention call this is.

    Attributes:
        name, index: of the layer, in forward order.
        layout: of the layer; U-Nets have a smaller one at each level.
        call: of the model's whole call.
        tile: order of the tokens; None = grid order.
        device: of q.
    """

    name: str
    index: int
    layout: Layout
    call: Layout
    tile: Tile | None
    device: torch.device
