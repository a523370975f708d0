"""The custom ops through which a compiled graph asks a sparsified model what to do.

The choice of a mask has to be made when the graph runs: the step lives in the scheduler, out of the graph's sight.
`select_mask` returns the name of an immutable mask, so one compiled block serves every layer, step and plan. No hook
has said here that a new forward began: the step is looked up at every call.
"""

from __future__ import annotations

from typing import Any

import torch

from sparsereel.launches import run_launches
from sparsereel.sparse_layer import LAYERS, SparseLayer, in_backward, one_modifier
from sparsereel_kernels import sparse_attention
from sparsereel_kernels.attention import mask_name


def _layer_of(slot: torch.Tensor) -> SparseLayer:
    layer = LAYERS.get(int(slot))
    if layer is None:
        raise RuntimeError("a compiled graph asks for a sparse layer that no longer exists; compile the model again")
    layer.runtime._step_known = False
    return layer


# It changes nothing; an op without results and effects would be dropped from the graph.
@torch.library.custom_op("sparsereel::note_dense", mutates_args=("slot",))
def note_dense(slot: torch.Tensor, reason: str) -> None:
    """A call of layer `slot` was left as it was."""
    layer = _layer_of(slot)
    if not in_backward():
        layer.count_dense(reason)


@note_dense.register_fake
def _(slot: torch.Tensor, reason: str) -> None:
    return None


@torch.library.custom_op("sparsereel::select_mask", mutates_args=())
def select_mask(slot: torch.Tensor, q: torch.Tensor, k: torch.Tensor, layout: list[int]) -> torch.Tensor:
    """Name (0-d int64, CPU) of the mask that layer `slot`, whose heads follow patterns, uses in this call.

    Its tokens are in the runtime's `call_tile`, which the graph puts them in.
    """
    layer = _layer_of(slot)
    choice = layer.runtime.select(layer, tuple(layout), q, k, one_mask=True)
    if choice is not None:
        layer.note_backend(q, k, k, choice)
    return mask_name(None if choice is None else choice.only_mask).clone()


@select_mask.register_fake
def _(slot: torch.Tensor, q: torch.Tensor, k: torch.Tensor, layout: list[int]) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64)


@torch.library.custom_op("sparsereel::attend_layer", mutates_args=())
def attend_layer(
    slot: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale: float | None,
    layout: list[int],
) -> torch.Tensor:
    """The whole attention of layer `slot`, whose selectors may move tokens. Inference only: it has no gradient."""
    layer = _layer_of(slot)
    runtime = layer.runtime
    lengths, bias = runtime.key_padding(attn_mask)
    choice = runtime.select_padded(layer, tuple(layout), q, k, lengths, scale, bias)
    change = runtime.change(layer, tuple(layout), q.device)
    modifier = one_modifier(bias, None if change is None else change.modifier)
    options: dict[str, Any] = {
        "scale": scale,
        "key_lengths": lengths,
        "modifier": modifier,
        "backend": runtime.backend,
    }
    if choice is not None:
        layer.note_backend(q, k, v, choice)
    if change is not None:
        layer.note_change(change, choice, tuple(layout), runtime.tile_of(tuple(layout)), q)
        out = change.run(q, k, v, choice, tuple(layout), runtime.tile_of(tuple(layout)), options)
    elif choice is None:
        out = sparse_attention(q, k, v, None, **options)
        runtime.measure(layer, q, k, v, out, options)
    else:
        out = run_launches(q, k, v, choice, **options)
    return out.contiguous()


@attend_layer.register_fake
def _(
    slot: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale: float | None,
    layout: list[int],
) -> torch.Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])
