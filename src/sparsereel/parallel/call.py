"""The public function: sparse attention on shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsereel.grid import Permutation, TokenGrid
from sparsereel.mask_cache import MaskCache
from sparsereel.parallel.ring import ring_attention
from sparsereel.parallel.shards import Shards
from sparsereel.parallel.ulysses import heads_of_rank, to_heads, to_tokens
from sparsereel.patterns import Pattern
from sparsereel_kernels import BlockMask, sparse_attention

MODES = ("ulysses", "ring")
Allowed = Pattern | Sequence[Pattern] | BlockMask | None

_MASKS = MaskCache(max_masks=64)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern_or_mask: Allowed,
    grid: TokenGrid,
    group: dist.ProcessGroup | None = None,
    mode: str = "ulysses",
    *,
    split: str = "sequence",
    lengths: Sequence[int] | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    layer: int = 0,
    block: tuple[int, int] = (128, 64),
    backend: str = "auto",
) -> Tensor:
    """Attention of a sequence whose tokens are spread over the processes of a group; equal to `sparse_attention` of the
    whole. A collective: every process calls it with its own shard and otherwise equal arguments.

    Args:
        q: (B, s, H, D), this process's tokens: diffusers' layout, heads after tokens. Which tokens: see `split`.
        k: (B, s, Hkv, D); Hkv divides H.
        v: (B, s, Hkv, Dv).
        pattern_or_mask: a pattern, one pattern for each of the H heads, or a BlockMask of the whole sequence in the
            order of `grid` with 1 or H heads; None is dense. Heads are meant globally: head h is head h of the model
            on whichever process it runs.
        grid: the tokens of the whole sequence, text and conditions included.
        group: a torch.distributed group; None = all processes.
        mode: "ulysses" exchanges tokens for heads: fewest bytes, H has to divide by the number of processes.
            "ring" passes keys and values round: any number of heads, and no process ever holds the whole sequence.
        split: how `Shards.of(grid, size, split=...)` deals out tokens: "sequence" in one piece a process, "segments"
            each segment for itself, as joint text-and-image models do.
        lengths: tokens of each process, for another cut than the even one of "sequence".
        key_lengths: (B,) int32; keys of a sample at or past this place in the whole sequence are not seen.
        scale, backend: as for `sparse_attention`.
        layer: number of the layer, for patterns that differ between layers.
        block: (query, key) block of the masks that are made from patterns.

    Returns:
        (B, s, H, Dv) in q's dtype. A query with no visible key gives zeros.

    Raises:
        ValueError: no process group, an unknown mode or split; tokens, heads or a mask that do not fit; gradients are
            wanted (the exchange has no backward pass); ring with split="segments" and a BlockMask or key_lengths.

    Sources: DeepSpeed-Ulysses (arXiv 2309.14509), Ring Attention (arXiv 2310.01889).
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("context parallelism needs a process group; call torch.distributed.init_process_group first")
    shards = Shards.of(grid, dist.get_world_size(group), split=split, lengths=lengths)
    _check(q, k, v, shards.lengths[dist.get_rank(group)])
    heads = q.shape[2]
    if mode == "ulysses":
        heads_of_rank(heads, 0, shards.size)
        mask = _whole_mask(pattern_or_mask, grid, None, heads, layer, block, q.device)
        return _ulysses(q, k, v, mask, shards, group, scale=scale, key_lengths=key_lengths, backend=backend)
    if shards.order is not None and (isinstance(pattern_or_mask, BlockMask) or key_lengths is not None):
        raise ValueError(
            'ring with split="segments" takes patterns only, without key_lengths: the tokens of a BlockMask cannot be '
            "moved; use ulysses"
        )
    mask = _whole_mask(pattern_or_mask, grid, shards.order, heads, layer, block, q.device)

    def options(owner: int) -> dict[str, Any]:
        start, stop = shards.span(owner)
        seen = None if key_lengths is None else (key_lengths - start).clamp(0, stop - start)
        return {"scale": scale, "key_lengths": seen, "backend": backend}

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ring_attention(q, k, v, mask, shards, group, options=options).transpose(1, 2)


def _ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    shards: Shards,
    group: dist.ProcessGroup | None,
    *,
    scale: float | None,
    key_lengths: Tensor | None,
    backend: str,
) -> Tensor:
    heads, order = q.shape[2], shards.order
    if k.shape[2] % shards.size:
        # Fewer shared heads than processes: each head of q gets its own copy.
        k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    q, k, v = (to_heads(x, shards.lengths, group) for x in (q, k, v))
    if order is not None:
        # Rank after rank is text, image, text, image ...: back to the order that masks are for.
        q, k, v = (order.inverse.apply(x, 1) for x in (q, k, v))
    mine = None if mask is None else _heads(mask, heads_of_rank(heads, dist.get_rank(group), shards.size))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = sparse_attention(q, k, v, mine, scale=scale, key_lengths=key_lengths, backend=backend).transpose(1, 2)
    return to_tokens(out if order is None else order.apply(out, 1), shards.lengths, group)


def _heads(mask: BlockMask, heads: range) -> BlockMask:
    """The mask of some heads, by their global numbers."""
    if mask.shape[1] == 1:
        return mask
    return mask.cached(f"heads {heads}", lambda: BlockMask.stack([mask.head(head) for head in heads]))


def _whole_mask(
    allowed: Allowed,
    grid: TokenGrid,
    order: Permutation | None,
    heads: int,
    layer: int,
    block: tuple[int, int],
    device: torch.device,
) -> BlockMask | None:
    if allowed is None:
        return None
    if isinstance(allowed, BlockMask):
        expected = (grid.seq_len, grid.seq_len)
        if allowed.seq_lengths != expected or allowed.shape[1] not in (1, heads):
            raise ValueError(
                f"the mask must be for {grid.seq_len} tokens and 1 or {heads} heads, got {allowed.seq_lengths[0]} × "
                f"{allowed.seq_lengths[1]} tokens and {allowed.shape[1]} heads"
            )
        return allowed
    patterns = (allowed,) * heads if isinstance(allowed, Pattern) else allowed
    if (
        not isinstance(patterns, Sequence)
        or len(patterns) != heads
        or not all(isinstance(p, Pattern) for p in patterns)
    ):
        raise ValueError(f"give a pattern, a BlockMask, None or {heads} patterns, one for each head, got {allowed!r}")
    return _MASKS.get(tuple(patterns), grid, block=block, device=device, layer=layer, order=order)


def _check(q: Tensor, k: Tensor, v: Tensor, tokens: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[1] != tokens:
            raise ValueError(
                f"{name} must be (batch, {tokens} tokens, heads, features) on this process, got {tuple(x.shape)}"
            )
    if k.shape[2] != v.shape[2] or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k and v must have one number of heads that divides q's {q.shape[2]}, got {k.shape[2]} and {v.shape[2]}"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("attention over several processes has no backward pass; call it under torch.no_grad()")
