"""The `cpu` backend: block-sparse attention in C++, built once on first use.

How it works. Keys and values that the mask visits are packed once a call into strips of 16 keys that the inner loops
read in order. A query block is cut into panels of 24 rows; a panel takes 256 keys at a time: scores, exponentials and
the weighted sum of values stay in the first-level cache, with an online softmax from run to run. Strips of a partial
block that no row of the panel may see are skipped. Every query block is computed by one thread in a fixed order, so the
same input gives the same bits whatever the number of threads.

Instruction sets: portable, avx2, avx512, avx512_bf16, chosen at run time; SPARSEREEL_ISA pins one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import binding
from .builder import BuildError, BuildStatus, build, build_status

if TYPE_CHECKING:
    from ..block_mask import BlockMask
    from ..problem import Problem

__all__ = ["BuildError", "BuildStatus", "build", "build_status", "forward", "isas", "unsupported_reasons"]

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


def _like_query(q: Tensor, features: int) -> Tensor:
    """An empty [B, H, Sq, features] in q's memory order: diffusers hands over [B, Sq, H, D] transposed."""
    batch, heads, tokens, _ = q.shape
    if q.transpose(1, 2).is_contiguous() and not q.is_contiguous():
        return q.new_empty(batch, tokens, heads, features).transpose(1, 2)
    return q.new_empty(batch, heads, tokens, features)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    scale: float,
    key_lengths: Tensor | None = None,
    modifier: object | None = None,
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
        out [B, H, Sq, Dv] in q's dtype and lse [B, H, Sq] fp32 (natural log). A row without keys gives 0 and -inf.

    Raises:
        BuildError: the kernels cannot be built here. ValueError: the mask's lists point outside the sequence.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = _like_query(q, v.shape[3])
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    keep: list[Tensor] = []
    args = binding.base_args(q, k, v, scale)
    args.out, args.lse = binding.view(out), lse.data_ptr()
    if mask is not None:
        binding.add_mask(args, mask, keep)
    if key_lengths is not None:
        keep.append(key_lengths.to(torch.int32).contiguous())
        args.key_lengths = keep[-1].data_ptr()
    if modifier is not None:
        binding.add_modifier(args, modifier, keep)
    binding.run("sparsereel_forward", args)
    return out, lse
