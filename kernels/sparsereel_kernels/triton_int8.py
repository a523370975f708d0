"""The `triton_int8` backend: the `triton` kernels with q k^T in int8, forward only, never chosen by itself.

int8 tensor cores multiply twice as fast as bf16 ones. Keys are smoothed (their mean is taken off) and queries and keys
get one scale for every tile, as in SageAttention (arXiv 2410.02367); softmax and the product with v are as in `triton`.
The error is that of 8-bit rounding: 0.013 of the output's spread on normal data over 1,024 tokens (tests hold it to
0.03). Whether a model bears it is for its user to see, so a call asks for it by name:
`sparsify(pipe, plan, backend="triton_int8")`.

FrameDecay is refused: it treats positive and negative logits differently, and smoothing moves their zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import triton

if TYPE_CHECKING:
    from .block_mask import BlockMask
    from .modifiers import Modifier
    from .problem import Problem

DTYPES = (torch.bfloat16, torch.float16)


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why this backend cannot run `problem`; empty where it can. Never raises."""
    reasons = triton.unsupported_reasons(problem)
    if problem.dtype == torch.float32:
        reasons.append("dtype float32 is not supported (bfloat16, float16)")
    if problem.modifier == "frame_decay":
        reasons.append("modifier frame_decay is not supported: smoothed keys move the zero of the logits (key_bias)")
    return reasons


@torch.no_grad()
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    scale: float,
    key_lengths: Tensor | None = None,
    modifier: Modifier | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse, arguments and shapes as `triton.forward`."""
    from .triton import launch

    return launch.forward(replace(triton.call_of(q, k, v, mask, scale, key_lengths, modifier), int8=True))
