"""The `cpu` backend: block-sparse attention in C++, built once on first use.

How it works (csrc/, from unit.h on). Keys and values that the mask visits are packed once a call into strips of 16 keys
that the inner loops read in order. A query block is cut into panels of 12 rows; a panel takes up to 512 keys at a time:
scores, exponentials and the weighted sum of values stay in the first-level cache, with an online softmax from run to
run. Strips of a partial block that no row of the panel may see are skipped. Calls of few queries and many keys are cut
along the keys too. Every sum has a fixed order, so the same input gives the same bits whatever the number of threads.
Numbers: fp32 and fp16 are multiplied in fp32; bf16 too, but for avx512_bf16 and amx, which multiply bf16 (weights are
rounded to it) and add in fp32. The exponential is good to 1e-7 (3e-6 where weights are rounded to bf16).

Instruction sets: portable, avx2, avx512, avx512_bf16, amx, chosen at run time; SPARSEREEL_ISA pins one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..layout import empty_like_query, unit_stride
from ..modifiers import KeyBias, Modifier, reduce_to_bias
from . import binding
from .builder import BuildError, BuildStatus, build, build_status

if TYPE_CHECKING:
    from ..block_mask import BlockMask
    from ..problem import Problem

__all__ = ["BuildError", "BuildStatus", "backward", "build", "build_status", "forward", "isas", "unsupported_reasons"]

HEAD_DIMS = range(8, 257)
isas = binding.isas


def _shape_reasons(problem: Problem) -> list[str]:
    reasons = []
    if problem.device_type != "cpu":
        reasons.append(f"device {problem.device_type} is not supported (cpu)")
    if problem.dtype not in binding.DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in binding.DTYPES)
        reasons.append(f"dtype {str(problem.dtype).removeprefix('torch.')} is not supported ({names})")
    if problem.head_dim not in HEAD_DIMS or problem.v_dim not in HEAD_DIMS:
        reasons.append(f"head dims {problem.head_dim}, {problem.v_dim} are not supported (8 to 256)")
    if problem.modifier not in (None, "frame_decay", "key_bias"):
        reasons.append(f"modifier {problem.modifier} is not supported (frame_decay, key_bias)")
    return reasons


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why this backend cannot run `problem`; empty where it can. Builds the kernels if nothing else stands in the way.

    Never raises: a missing compiler, an unusable cache folder and a failed build are reasons.
    """
    if reasons := _shape_reasons(problem):
        return reasons
    try:
        available = binding.isas()
    except BuildError as error:
        return [str(error)]
    if (isa := binding.chosen_isa()) not in available:
        return [f"SPARSEREEL_ISA={isa} does not run here ({', '.join(available)})"]
    return []


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    scale: float,
    key_lengths: Tensor | None = None,
    modifier: Modifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention on the CPU.

    Args:
        q: [B, H, Sq, D], fp32, bf16 or fp16, last dimension contiguous, other strides free (as for k and v).
        k: [B, Hkv, Skv, D]; Hkv divides H.
        v: [B, Hkv, Skv, Dv].
        mask: block lists for Sq x Skv tokens; None is dense.
        scale: multiplies the scores.
        key_lengths: [B] int32: keys at or past it are not seen.
        modifier: a FrameDecay or KeyBias, or None.

    Returns:
        out [B, H, Sq, Dv] in q's dtype and memory order, and lse [B, H, Sq] fp32 (natural log). A row without keys
        gives 0 and -inf.

    Raises:
        BuildError: the kernels cannot be built here.
        ValueError: the mask is for other sizes, or its lists point outside the sequence.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    out = empty_like_query(q, v.shape[3])
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    args, keep = binding.fill(q, k, v, mask, scale, key_lengths, modifier)
    args.out, args.lse = binding.view(out), lse.data_ptr()
    binding.run("sparsereel_forward", args)
    del keep  # the call read its memory until now
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: BlockMask | None,
    scale: float,
    key_lengths: Tensor | None = None,
    modifier: Modifier | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `forward`, from its results.

    Two passes, one that owns query blocks and one that owns key blocks: nothing is added up between threads, so the
    gradients are the same bits whatever the number of threads.

    Args:
        grad_out: [B, H, Sq, Dv]. grad_lse: [B, H, Sq] or None. out, lse: what forward returned. Others as forward.

    Returns:
        dq, dk, dv in the shapes, dtypes and memory orders of q, k and v, and the gradient of KeyBias.bias (None
        without one).

    Raises:
        As `forward`.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    out, grad_out = unit_stride(out), unit_stride(grad_out.to(q.dtype))
    dq, dk, dv = (empty_like_query(x, x.shape[3]) for x in (q, k, v))
    args, keep = binding.fill(q, k, v, mask, scale, key_lengths, modifier)
    lse = lse.contiguous()
    args.out, args.lse, args.grad_out = binding.view(out), lse.data_ptr(), binding.view(grad_out)
    args.grad_q, args.grad_k, args.grad_v = binding.view(dq), binding.view(dk), binding.view(dv)
    if grad_lse is not None:
        keep.append(grad_lse.to(torch.float32).contiguous())
        args.grad_lse = keep[-1].data_ptr()
    by_head = None
    if isinstance(modifier, KeyBias):
        by_head = torch.zeros(q.shape[0], q.shape[1], k.shape[2])
        args.grad_bias = by_head.data_ptr()
    binding.run("sparsereel_backward", args)
    del keep  # the call read its memory until now
    if by_head is None or not isinstance(modifier, KeyBias):
        return dq, dk, dv, None
    return dq, dk, dv, reduce_to_bias(by_head, modifier.bias)
