"""The custom operator behind `sparse_attention`, as torch.compile and autograd see it.

The mask comes in as its name, a 0-d int64 CPU tensor (registry.py). Forward returns a new tensor with the name it
used; backward reads that one, so that replacing a layer's mask between forward and backward changes nothing. Fake
implementations look at shapes only. `cudagraph_unsafe`: the name is read on the CPU at every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, registry, run
from .layout import as_laid_out, empty_like_query, full_precision
from .modifiers import FrameDecay, KeyBias, Modifier

TAGS = (torch.Tag.cudagraph_unsafe,)


def _modifier(
    frame_of_q: Tensor | None, frame_of_k: Tensor | None, table: Tensor | None, bias: Tensor | None
) -> Modifier | None:
    if bias is not None:
        return KeyBias(bias)
    if frame_of_q is not None and frame_of_k is not None and table is not None:
        return FrameDecay(frame_of_q, frame_of_k, table)
    return None


@torch.library.custom_op("sparsereel::sparse_attention", mutates_args=(), tags=TAGS)
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    name: Tensor,
    key_lengths: Tensor | None,
    frame_of_q: Tensor | None,
    frame_of_k: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    scale: float,
    backend: str,
    needs_lse: bool,
    needs_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, H, Sq, Dv]; lse [B, H, Sq], or empty where not needed; the name of the mask that was used."""
    mask = registry.find(name)
    if mask is not None:
        checks.check_mask(mask, q, k)
    modifier = _modifier(frame_of_q, frame_of_k, table, bias)
    wants = run.Wants(lse=needs_lse, backward=needs_backward)
    out, lse = run.forward(q, k, v, mask, scale, key_lengths, modifier, backend, wants)
    if not (needs_lse or needs_backward):
        lse = lse.new_empty(0)
    return as_laid_out(out, q), lse, registry.name_tensor(mask)


@attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    name: Tensor,
    key_lengths: Tensor | None,
    frame_of_q: Tensor | None,
    frame_of_k: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    scale: float,
    backend: str,
    needs_lse: bool,
    needs_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = q.shape[:3] if needs_lse or needs_backward else (0,)
    lse = q.new_empty(shape, dtype=full_precision(q.dtype))
    return empty_like_query(q, v.shape[3]), lse, torch.empty_like(name)


@torch.library.custom_op("sparsereel::sparse_attention_backward", mutates_args=(), tags=TAGS)
def backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    name: Tensor,
    key_lengths: Tensor | None,
    frame_of_q: Tensor | None,
    frame_of_k: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, and of the bias (empty where there is none)."""
    modifier = _modifier(frame_of_q, frame_of_k, table, bias)
    saved = run.Saved(q, k, v, out, lse, registry.find(name), scale, key_lengths, modifier)
    dq, dk, dv, dbias = run.backward(grad_out, grad_lse, saved, backend)
    if dbias is None or bias is None:
        dbias = lse.new_empty(0)
    return as_laid_out(dq, q), as_laid_out(dk, k), as_laid_out(dv, v), dbias.contiguous()


@backward_op.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    name: Tensor,
    key_lengths: Tensor | None,
    frame_of_q: Tensor | None,
    frame_of_k: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = lse.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return empty_like_query(q, q.shape[3]), empty_like_query(k, k.shape[3]), empty_like_query(v, v.shape[3]), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, _, key_lengths, frame_of_q, frame_of_k, table, bias, scale, backend, _, _ = inputs
    out, lse, used = output
    ctx.save_for_backward(q, k, v, out, lse, used, key_lengths, frame_of_q, frame_of_k, table, bias)
    ctx.scale, ctx.backend = scale, backend


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *rest = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = backward_op(grad_out, grad_lse, q, k, v, out, lse, *rest, ctx.scale, ctx.backend)
    dq, dk, dv, dbias = grads
    return dq, dk, dv, None, None, None, None, None, dbias if rest[-1] is not None else None, None, None, None, None


attention_op.register_autograd(_backward, setup_context=_setup_context)
