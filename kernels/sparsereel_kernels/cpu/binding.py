"""Hands tensors to the C interface of csrc/args.h.

`Args` mirrors `SparsereelArgs` field by field; the library is refused where the sizes differ.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_mask
from ..modifiers import FrameDecay, Modifier, bias_as_4d
from .builder import BuildError, library

if TYPE_CHECKING:
    from ..block_mask import BlockMask

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STATUS = {
    1: "the CPU kernels ran out of memory",
    2: "the block mask names a key block or a tile that does not exist",
    3: "the instruction set asked for does not run here",
    4: "sizes are outside what the CPU kernels take",
}


class View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("batch", "head", "token")]


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Args(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "batch heads kv_heads q_len kv_len head_dim v_dim dtype threads"),
        *_fields(ctypes.c_double, "scale"),
        *_fields(View, "q k v out"),
        *_fields(ctypes.c_void_p, "lse"),
        *_fields(ctypes.c_int64, "has_mask block_q block_k mask_batch mask_heads max_full max_partial tiles"),
        *_fields(
            ctypes.c_void_p, "full_count full_index partial_count partial_index partial_tile partial_bits key_lengths"
        ),
        *_fields(ctypes.c_void_p, "frame_of_q frame_of_k decay"),
        *_fields(ctypes.c_int64, "decay_size"),
        *_fields(ctypes.c_void_p, "bias"),
        *_fields(ctypes.c_int64, "bias_batch bias_head"),
        *_fields(View, "grad_out grad_q grad_k grad_v"),
        *_fields(ctypes.c_void_p, "grad_lse grad_bias"),
    ]


def view(x: Tensor) -> View:
    """[B, H, S, D] with a contiguous last dimension; a dimension of size 1 may carry any stride."""
    return View(x.data_ptr(), *x.stride()[:3])


@lru_cache(maxsize=1)
def kernels() -> ctypes.CDLL:
    """The library with its signatures set.

    Raises:
        BuildError: it cannot be built, loaded, or does not fit this file.
    """
    loaded = library()
    loaded.sparsereel_args_size.restype = ctypes.c_int64
    loaded.sparsereel_isas.restype = ctypes.c_char_p
    for entry in (loaded.sparsereel_forward, loaded.sparsereel_backward):
        entry.argtypes = [ctypes.POINTER(Args), ctypes.c_char_p, ctypes.c_void_p]
        entry.restype = ctypes.c_int32
    if loaded.sparsereel_args_size() != ctypes.sizeof(Args):
        raise BuildError("the built library does not fit this version of sparsereel; empty its cache folder")
    return loaded


def isas() -> list[str]:
    """Instruction sets that the library holds and this processor runs, best first."""
    return bytes(kernels().sparsereel_isas()).decode().split(",")


def chosen_isa() -> str:
    """The best instruction set, or the one that SPARSEREEL_ISA pins."""
    return os.environ.get("SPARSEREEL_ISA") or isas()[0]


# OpenMP's threads do not survive a fork: a child that entered the pool would wait for them forever.
_process_of_pool = os.getpid()


@lru_cache(maxsize=1)
def _gomp_parallel() -> int | None:
    # torch has loaded its OpenMP library with global scope; without one the kernels start plain threads.
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


def run(entry: str, args: Args) -> None:
    """Calls one entry point and turns its status into an exception."""
    function = getattr(kernels(), entry)
    parallel = _gomp_parallel() if os.getpid() == _process_of_pool else None
    status = function(ctypes.byref(args), chosen_isa().encode(), parallel)
    if status == 1:
        raise MemoryError(STATUS[1])
    if status:
        raise ValueError(STATUS[status])


def fill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    scale: float,
    key_lengths: Tensor | None,
    modifier: Modifier | None,
) -> tuple[Args, list[Tensor]]:
    """What forward and backward share, and the tensors to hold on to until the call has returned.

    Raises:
        ValueError: the mask is for other lengths, batch or heads.
    """
    args, keep = Args(), [q, k, v]
    args.batch, args.heads, args.q_len, args.head_dim = q.shape
    args.kv_heads, args.kv_len, args.v_dim = k.shape[1], k.shape[2], v.shape[3]
    args.dtype, args.threads, args.scale = DTYPES[q.dtype], torch.get_num_threads(), scale
    args.q, args.k, args.v = view(q), view(k), view(v)
    if mask is not None:
        check_mask(mask, q, k)
        _add_mask(args, mask, keep)
    if key_lengths is not None:
        args.key_lengths = _held(keep, key_lengths.to(torch.int32))
    if isinstance(modifier, FrameDecay):
        args.frame_of_q = _held(keep, modifier.frame_of_q)
        args.frame_of_k = _held(keep, modifier.frame_of_k)
        args.decay = _held(keep, modifier.table)
        args.decay_size = modifier.table.numel()
    elif modifier is not None:
        bias = bias_as_4d(modifier.bias.detach())[:, :, 0]
        args.bias = _held(keep, bias)
        args.bias_head = bias.shape[2] if bias.shape[1] > 1 else 0
        args.bias_batch = bias.shape[1] * bias.shape[2] if bias.shape[0] > 1 else 0
    return args, keep


def _held(keep: list[Tensor], x: Tensor) -> int:
    """The address of `x`, made contiguous and kept alive."""
    keep.append(x.contiguous())
    return keep[-1].data_ptr()


def _add_mask(args: Args, mask: BlockMask, keep: list[Tensor]) -> None:
    args.has_mask = 1
    args.block_q, args.block_k = mask.BLOCK_SIZE
    args.mask_batch, args.mask_heads = mask.kv_num_blocks.shape[:2]
    args.max_partial, args.max_full = mask.kv_indices.shape[-1], mask.full_kv_indices.shape[-1]
    args.tiles = mask.partial_bits.shape[0]
    args.full_count = _held(keep, mask.full_kv_num_blocks)
    args.full_index = _held(keep, mask.full_kv_indices)
    args.partial_count = _held(keep, mask.kv_num_blocks)
    args.partial_index = _held(keep, mask.kv_indices)
    args.partial_tile = _held(keep, mask.partial_tile)
    args.partial_bits = _held(keep, mask.partial_bits)
