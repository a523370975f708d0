"""One call of a sparse layer as one or more launches: heads with static patterns together, each selector by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparsereel.compensation.base import Compensation, SparseCall
from sparsereel.grid import Permutation
from sparsereel.selectors.base import Selection, reorder
from sparsereel_kernels import BlockMask, FrameDecay, KeyBias, sparse_attention
from sparsereel_kernels.modifiers import Modifier


@dataclass(frozen=True, eq=False)
class Launch:
    """Heads that run together.

    Attributes:
        heads: their numbers, in ascending order; None = all heads of the layer.
        mask: for these heads (or one head that stands for all); None = dense.
        selection: the orders of tokens that the mask is for, where a selector moves them.
    """

    heads: tuple[int, ...] | None
    mask: BlockMask | None
    selection: Selection | None = None

    @property
    def moves_tokens(self) -> bool:
        """Whether q, k and v have to be put in another order first."""
        found = self.selection
        return found is not None and (found.order_q is not None or found.order_k is not None)


@dataclass(frozen=True, eq=False)
class Choice:
    """What one call of a layer runs. `density` and `token_density` are means over all heads.

    Attributes:
        order: that the call's tokens have to be put in first; None = they are in the order of the masks.
        compensation: makes up for what the launches skip; None = nobody does.
        isolated: bool [S], tokens that a compensation never averages with others.
        residual: [B, H, S, D], added to the output.
        layer: number of the layer.
    """

    launches: tuple[Launch, ...]
    density: float
    token_density: float
    order: Permutation | None = None
    compensation: Compensation | None = None
    isolated: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    layer: int = 0

    @classmethod
    def of(cls, launches: list[Launch], heads: int) -> Choice:
        """A choice from its launches, which together hold every head of `heads` once."""
        shares = [(len(x.heads) if x.heads is not None else heads) / heads for x in launches]
        masks = [x.mask for x in launches]
        density = sum(s * (1.0 if m is None else m.density) for s, m in zip(shares, masks, strict=True))
        token_density = sum(s * (1.0 if m is None else m.token_density) for s, m in zip(shares, masks, strict=True))
        return cls(tuple(launches), density, token_density)

    @property
    def only_mask(self) -> BlockMask | None:
        """The mask, of tokens in `order`, where one plain launch is all there is; None otherwise."""
        (first, *rest) = self.launches
        return None if rest or first.heads is not None or first.moves_tokens else first.mask


def run_launches(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, choice: Choice, **options: Any) -> torch.Tensor:
    """Attention of q (B, H, S, D) to k and v (B, Hkv, S, D), launch by launch.

    Args:
        options: `scale`, `key_lengths`, `modifier` and `backend` of `sparse_attention`.
    """
    order = choice.order
    if order is not None:
        q, k, v = (order.apply(x, 2) for x in (q, k, v))
        options["modifier"] = modifier_in_order(options.get("modifier"), order.on(q.device))
    out = _all_launches(q, k, v, choice, options)
    if order is not None:
        out = order.inverse.apply(out, 2)
    return out if choice.residual is None else out + choice.residual


def modifier_in_order(modifier: Modifier | None, order: torch.Tensor) -> Modifier | None:
    """A modifier of the logits for queries and keys that were both put in `order`, int64 (S,)."""
    if isinstance(modifier, KeyBias):
        return KeyBias(modifier.bias.index_select(-1, order))
    if isinstance(modifier, FrameDecay):
        frames = (modifier.frame_of_q.index_select(0, order), modifier.frame_of_k.index_select(0, order))
        return FrameDecay(*frames, modifier.table)
    return modifier


def _all_launches(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, choice: Choice, options: dict[str, Any]
) -> torch.Tensor:
    first = choice.launches[0]
    if first.heads is None:
        return _run(q, k, v, first, choice, options)
    parts = []
    for launch in choice.launches:
        heads = list(launch.heads or ())
        shared = [head * k.shape[1] // q.shape[1] for head in heads]
        parts.append(_run(q[:, heads], k[:, shared], v[:, shared], launch, choice, options))
    # Put the heads back in their places: the launches hold them in an order of their own.
    numbers = [head for launch in choice.launches for head in launch.heads or ()]
    places = torch.tensor(numbers, device=q.device).argsort()
    return torch.cat(parts, dim=1).index_select(1, places)


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, launch: Launch, choice: Choice, options: dict[str, Any]
) -> torch.Tensor:
    isolated = choice.isolated
    selection = launch.selection if launch.moves_tokens else None
    if selection is not None:
        options = {**options, "modifier": selection.arrange_modifier(options.get("modifier"), q.shape[1])}
        q, k, v = selection.arrange(q, k, v)
        if isolated is not None and selection.order_k is not None:
            isolated = reorder(isolated[None, None, :, None].expand(*k.shape[:3], 1), selection.order_k)[..., 0]
    out = _attend(q, k, v, launch.mask, choice, isolated, options)
    return out if selection is None else selection.restore(out)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask | None,
    choice: Choice,
    isolated: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    method = choice.compensation
    if method is None or method.remembers or mask is None:
        return sparse_attention(q, k, v, mask, **options)
    scale = float(q.shape[-1] ** -0.5 if options["scale"] is None else options["scale"])
    call = SparseCall(q, k, v, mask, scale, options["key_lengths"], isolated, choice.layer)
    if not method.needs_lse:
        return method.complete(call, sparse_attention(q, k, v, mask, **options), None)
    return method.complete(call, *sparse_attention(q, k, v, mask, return_lse=True, **options))
