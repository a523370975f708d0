"""The `triton` backend: block-sparse attention on NVIDIA (sm_80 to sm_120) and AMD GPUs, forward and backward.

Reading order: primitives.py (what the kernels share), forward_kernel.py, backward_kernel.py, lists.py (the mask as the
kernels read it), launch.py (from tensors to launches), configs.py (tiles; `tune` in tune.py measures others).

One program owns one tile of queries (in backward over keys: of keys), so that every sum has one owner and a fixed
order: the same input gives the same bits. Products take the input's type and add in fp32; softmax is fp32. fp32
products are exact ("ieee") unless torch.set_float32_matmul_precision allows tf32. Keys and values come through TMA
descriptors on sm_90 and later where D is a power of two and strides are multiples of 16 bytes, else through pointers.
Any mask block is taken; best are multiples of 64 (128 for queries on sm_100), worst blocks of 8, 24, 40, ... tokens,
which are walked in tiles of 16. Head dims are padded to the next power of two inside the kernels.

Triton is imported when this backend is asked for a call on a GPU, not before. With TRITON_INTERPRET=1 in the
environment before the first call, Triton's interpreter runs the same kernels on CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import os
from importlib import util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..layout import unit_stride

if TYPE_CHECKING:
    from ..block_mask import BlockMask
    from ..modifiers import Modifier
    from ..problem import Problem
    from .launch import Call, Target

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = range(8, 257)
OLDEST_CAPABILITY = (8, 0)
# Processors of the GPU that the interpreter pretends to be.
INTERPRETED_PROCESSORS = 4


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why this backend cannot run `problem`; empty where it can. Never raises."""
    reasons = _device_reasons(problem.device_type)
    if problem.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        reasons.append(f"dtype {str(problem.dtype).removeprefix('torch.')} is not supported ({names})")
    if problem.head_dim not in HEAD_DIMS or problem.v_dim not in HEAD_DIMS:
        reasons.append(f"head dims {problem.head_dim}, {problem.v_dim} are not supported (8 to 256)")
    if problem.modifier not in (None, "frame_decay", "key_bias"):
        reasons.append(f"modifier {problem.modifier} is not supported (frame_decay, key_bias)")
    return reasons


def _device_reasons(device_type: str) -> list[str]:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and not interpreted:
        return ["device cpu is not supported (cuda; cpu only in Triton's interpreter, TRITON_INTERPRET=1)"]
    if device_type not in ("cpu", "cuda"):
        return [f"device {device_type} is not supported (cuda)"]
    if util.find_spec("triton") is None:
        return ["triton is not installed (pip install triton)"]
    if device_type == "cpu":
        return [] if _kernels_are_interpreted() else ["TRITON_INTERPRET=1 was set after the kernels were first used"]
    if not torch.cuda.is_available():
        return ["no CUDA device is present"]
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        return [f"compute capability {capability[0]}.{capability[1]} is not supported (8.0 and later)"]
    return []


def _kernels_are_interpreted() -> bool:
    from .forward_kernel import forward_kernel

    return type(forward_kernel).__name__ == "InterpretedFunction"


def target_of(device: torch.device) -> Target:
    """What configurations are chosen for."""
    from .configs import architecture_of
    from .launch import Target

    if device.type == "cpu":
        return Target("interpreter", "sm80", INTERPRETED_PROCESSORS)
    properties = torch.cuda.get_device_properties(device)
    architecture = architecture_of((properties.major, properties.minor), torch.version.hip is not None)
    return Target(properties.name, architecture, properties.multi_processor_count)


def call_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    scale: float,
    key_lengths: Tensor | None,
    modifier: Modifier | None,
) -> Call:
    """The call of a backend as launch.py takes it."""
    from .launch import Call

    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    if key_lengths is not None:
        key_lengths = key_lengths.contiguous()
    return Call(q, k, v, mask, scale, key_lengths, modifier, target_of(q.device))


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
    """Block-sparse attention on a GPU.

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
    """
    from . import launch

    return launch.forward(call_of(q, k, v, mask, scale, key_lengths, modifier))


@torch.no_grad()
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
    """Gradients of `forward`, from its results; no atomics, so the same bits every time.

    Args:
        grad_out: [B, H, Sq, Dv]. grad_lse: [B, H, Sq] or None. out, lse: what forward returned. Others as forward.

    Returns:
        dq, dk, dv in the shapes, dtypes and memory orders of q, k and v, and the gradient of KeyBias.bias (None
        without one).
    """
    from . import launch

    call = call_of(q, k, v, mask, scale, key_lengths, modifier)
    return launch.backward(call, unit_stride(grad_out), grad_lse, unit_stride(out), lse)
