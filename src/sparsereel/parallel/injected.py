"""Context parallelism of diffusers (`enable_parallelism`) under a sparsified model: the exchange, and what is refused.

Ulysses: q, k and v become all tokens of this process's heads, the layer attends as ever (patterns and selectors of its
own heads, by their global numbers), and the output goes back. Ring: the mask of all heads is cut for each pair of
processes and the steps are merged by their log-sum-exps. Whether a call is exchanged at all depends only on what all
processes share, so that none of them waits for another in vain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsereel.families.layout import Layout, decode
from sparsereel.parallel.ring import ring_attention
from sparsereel.parallel.shards import Shards
from sparsereel.parallel.ulysses import heads_of_rank, to_heads, to_tokens

if TYPE_CHECKING:
    from sparsereel.sparse_layer import Call, SparseLayer


@dataclass(frozen=True)
class Exchange:
    """How diffusers was told to spread tokens.

    Attributes:
        mode: "ulysses" or "ring".
        group: the processes that share one sequence.
        even: every process holds the same number of tokens; else as `torch.tensor_split` cuts.
    """

    mode: str
    group: dist.ProcessGroup
    even: bool


#: makes the layer's call for q, k, v (B, S, H, D) that are whole
CallFor = Callable[[Tensor, Tensor, Tensor], "Call"]


def attend(
    layer: SparseLayer, q: Tensor, k: Tensor, v: Tensor, exchange: Exchange, asked: Call, call_for: CallFor
) -> Tensor | str:
    """Attention of one layer over shards. A collective.

    Args:
        q, k, v: (B, s, H, D), this process's tokens.
        asked: what the model asks for, in terms of the shards.
        call_for: the same for whole sequences.

    Returns:
        (B, s, H, Dv), or the reason why the call has to stay as diffusers does it.
    """
    reason = _refusal(layer, q, k, v, asked, exchange)
    if reason:
        return reason
    found = _layout(layer, q.shape[1], exchange)
    if isinstance(found, str):
        return found
    layout, shards = found
    if exchange.mode == "ring":
        return _ring(layer, layout, q, k, v, exchange, shards, asked.scale)
    return _ulysses(layer, q, k, v, exchange, shards, call_for)


def _ulysses(
    layer: SparseLayer, q: Tensor, k: Tensor, v: Tensor, exchange: Exchange, shards: Shards, call_for: CallFor
) -> Tensor:
    group, order = exchange.group, shards.order
    mine = heads_of_rank(q.shape[2], dist.get_rank(group), shards.size)
    q, k, v = (to_heads(x, shards.lengths, group) for x in (q, k, v))
    if order is not None:
        # Rank after rank is text, image, text, image ...: back to the order of the grid.
        q, k, v = (order.inverse.apply(x, 1) for x in (q, k, v))
    with layer.runtime.holding(mine):
        out = layer.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), call_for(q, k, v)).transpose(1, 2)
    return to_tokens(out if order is None else order.apply(out, 1), shards.lengths, group)


def _ring(
    layer: SparseLayer,
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exchange: Exchange,
    shards: Shards,
    scale: float | None,
) -> Tensor:
    runtime = layer.runtime
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    choice = runtime.select(layer, layout, q, k, None, scale)
    if choice is not None:
        layer.note_backend(q, k, v, choice)
    options: dict[str, Any] = {"scale": scale, "backend": runtime.backend}
    mask = None if choice is None else choice.only_mask
    # Dense calls take the same road: a process that chose otherwise would wait for a message that nobody sends.
    return ring_attention(q, k, v, mask, shards, exchange.group, options=lambda owner: options).transpose(1, 2)


def _layout(layer: SparseLayer, tokens: int, exchange: Exchange) -> tuple[Layout, Shards] | str:
    """The layout of the whole sequence, and who holds what."""
    runtime, size = layer.runtime, dist.get_world_size(exchange.group)
    split = runtime.family.context_parallel or "sequence"
    if runtime.layout is None:
        return runtime.no_layout or "the model's token grid is unknown"
    layout = runtime.layout
    grid = decode(layout)
    if split == "segments" and [segment.kind == "text" for segment in grid.segments].count(True) != 1:
        return "context parallelism needs one text and one image or video in a sequence"
    if len(grid.segments) > (2 if split == "segments" else 1):
        return f"context parallelism does not know how {len(grid.segments)} parts of a sequence are spread"
    shards = Shards.of(grid, size, split=split)
    if exchange.mode == "ring" and shards.order is not None:
        return "ring needs text and video in one piece; use ulysses_degree for models with joint text"
    if exchange.even and len(set(shards.lengths)) > 1:
        return f"{grid.seq_len} tokens do not divide by {size} processes"
    expected = shards.lengths[dist.get_rank(exchange.group)]
    return (layout, shards) if tokens == expected else f"{tokens} tokens of a process are not the {expected} expected"


def _refusal(layer: SparseLayer, q: Tensor, k: Tensor, v: Tensor, asked: Call, exchange: Exchange) -> str:
    """Why this call is left to diffusers; empty where it is not. Nothing here may differ between processes."""
    runtime, size = layer.runtime, dist.get_world_size(exchange.group)
    if runtime.family.context_parallel is None:
        return f"context parallelism is not understood for the family {runtime.family.name}"
    if torch.compiler.is_compiling():
        return "context parallelism in a compiled model"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "context parallelism has no backward pass here"
    if asked.attn_mask is not None or asked.dropout_p > 0 or asked.is_causal:
        return "an attention mask, dropout or causal attention under context parallelism"
    if q.shape[:3] != k.shape[:3]:
        return "under context parallelism q and k must have the same tokens and heads"
    if runtime.observer is not None:
        return "recordings of attention need all heads in one process"
    if exchange.mode == "ulysses":
        return f"{q.shape[2]} heads do not divide by {size} processes" if q.shape[2] % size else ""
    if layer.has_selectors or runtime.plan.compensation is not None:
        return "selectors and compensations need whole sequences: use ulysses_degree, not ring_degree"
    return ""
