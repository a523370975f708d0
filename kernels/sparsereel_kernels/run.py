"""Runs a call whose mask is known: chooses the backend, adds the checks that SPARSEREEL_CHECK=1 asks for."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks, dispatch
from .block_lists import check_lists
from .block_mask import BlockMask
from .layout import unit_stride
from .modifiers import Modifier, modifier_name
from .problem import Problem


@dataclass(frozen=True)
class Wants:
    """What the caller reads besides the output; backward needs lse, too."""

    lse: bool = False
    backward: bool = False


@dataclass(frozen=True, eq=False)
class Saved:
    """What forward leaves for backward."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    mask: BlockMask | None
    scale: float
    key_lengths: Tensor | None
    modifier: Modifier | None


def problem_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    key_lengths: Tensor | None,
    modifier: Modifier | None,
    wants: Wants,
) -> Problem:
    """The call in numbers."""
    batch, heads, q_len, head_dim = q.shape
    return Problem(
        device_type=q.device.type,
        dtype=q.dtype,
        batch=batch,
        heads=heads,
        kv_heads=k.shape[1],
        q_len=q_len,
        kv_len=k.shape[2],
        head_dim=head_dim,
        v_dim=v.shape[3],
        block=None if mask is None else mask.BLOCK_SIZE,
        has_partial=mask is not None and mask.has_partial,
        modifier=modifier_name(modifier),
        needs_backward=wants.backward,
        compiling=torch.compiler.is_compiling(),
        needs_lse=wants.lse,
        has_key_lengths=key_lengths is not None,
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    scale: float,
    key_lengths: Tensor | None,
    modifier: Modifier | None,
    backend: str,
    wants: Wants,
) -> tuple[Tensor, Tensor]:
    """out and lse by the backend that `backend` leads to (lse is empty where a backend has none and none is wanted)."""
    chosen = dispatch.choose(backend, problem_of(q, k, v, mask, key_lengths, modifier, wants), mask)
    checking = os.environ.get("SPARSEREEL_CHECK") == "1"
    if checking:
        checks.check_values(q, k, v, key_lengths, modifier)
        if mask is not None:
            check_lists(mask.seq_lengths, mask.BLOCK_SIZE, mask.tensors())
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    out, lse = chosen.load().forward(q, k, v, mask, scale, key_lengths, modifier)
    if checking:
        checks.check_result(out, chosen.name)
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and dbias by the backend that ran forward."""
    s = saved
    problem = problem_of(s.q, s.k, s.v, s.mask, s.key_lengths, s.modifier, Wants(backward=True))
    module = dispatch.choose(backend, problem, s.mask).load()
    q, k, v = unit_stride(s.q), unit_stride(s.k), unit_stride(s.v)
    return module.backward(
        unit_stride(grad_out), grad_lse, q, k, v, s.out, s.lse, s.mask, s.scale, s.key_lengths, s.modifier
    )
