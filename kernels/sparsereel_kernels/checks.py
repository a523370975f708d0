"""Checks of a call, each a sentence that names what was given and what is allowed. Done once, before any backend."""

from __future__ import annotations

import torch
from torch import Tensor

from .block_mask import BlockMask
from .modifiers import FrameDecay, KeyBias, Modifier
from .problem import dtype_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256


def check_inputs(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, modifier: Modifier | None) -> None:
    """What can be told from shapes, types and devices alone; nothing is read from a device.

    Raises:
        ValueError: with one sentence.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, tokens, features), got {tuple(x.shape)}")
    _check_kinds(q, k, v)
    _check_shapes(q, k, v)
    if key_lengths is not None:
        _check_key_lengths(key_lengths, q)
    if modifier is not None:
        _check_modifier(modifier, q, k)


def _check_kinds(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must lie on one device, got {q.device}, {k.device} and {v.device}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.dtype not in DTYPES:
        allowed = ", ".join(map(dtype_name, DTYPES))
        raise ValueError(f"q, k and v must be {allowed}, got {dtype_name(q.dtype)}")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v must have one batch size, got {q.shape[0]}, {k.shape[0]} and {v.shape[0]}")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise ValueError(
            f"k and v must have the same heads and tokens, got {k.shape[1]}×{k.shape[2]} and {v.shape[1]}×{v.shape[2]}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the heads of k and v must divide the {q.shape[1]} heads of q, got {k.shape[1]}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have the same head dim, got {q.shape[3]} and {k.shape[3]}")
    for name, features in (("q and k", q.shape[3]), ("v", v.shape[3])):
        if not MIN_HEAD_DIM <= features <= MAX_HEAD_DIM:
            raise ValueError(f"the head dim of {name} must be {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {features}")


def _check_key_lengths(key_lengths: Tensor, q: Tensor) -> None:
    if not isinstance(key_lengths, Tensor) or key_lengths.shape != (q.shape[0],):
        given = tuple(key_lengths.shape) if isinstance(key_lengths, Tensor) else type(key_lengths).__name__
        raise ValueError(f"key_lengths must be a tensor of shape ({q.shape[0]},), one length a sample, got {given}")
    if key_lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"key_lengths must be int32, got {dtype_name(key_lengths.dtype)}")
    if key_lengths.device != q.device:
        raise ValueError(f"key_lengths must lie on q's device {q.device}, got {key_lengths.device}")


def _check_modifier(modifier: Modifier, q: Tensor, k: Tensor) -> None:
    if isinstance(modifier, FrameDecay):
        lengths = modifier.frame_of_q.shape[0], modifier.frame_of_k.shape[0]
        if lengths != (q.shape[2], k.shape[2]):
            raise ValueError(
                f"FrameDecay needs an index for each of {q.shape[2]} queries and {k.shape[2]} keys, "
                f"got {lengths[0]} and {lengths[1]}"
            )
        tensors = [modifier.frame_of_q, modifier.frame_of_k, modifier.table]
    elif isinstance(modifier, KeyBias):
        _check_bias_shape(modifier.bias, q, k)
        tensors = [modifier.bias]
    else:
        raise ValueError(f"modifier must be a FrameDecay, a KeyBias or None, got {type(modifier).__name__}")
    for x in tensors:
        if x.device != q.device:
            raise ValueError(f"the modifier must lie on q's device {q.device}, got {x.device}")


def _check_bias_shape(bias: Tensor, q: Tensor, k: Tensor) -> None:
    batch, heads, keys = q.shape[0], q.shape[1], k.shape[2]
    sizes = (*(batch, heads)[: bias.ndim - 1], keys)
    leading = all(given in (1, real) for given, real in zip(bias.shape[:-1], sizes[:-1], strict=True))
    if bias.shape[-1] != keys or not leading:
        raise ValueError(
            f"KeyBias.bias must be ({keys},), ({batch} or 1, {keys}) or ({batch} or 1, {heads} or 1, {keys}), "
            f"got {tuple(bias.shape)}"
        )


def check_mask(mask: object, q: Tensor, k: Tensor) -> None:
    """ValueError unless `mask` was built for this call's lengths, device, batch and heads."""
    if not isinstance(mask, BlockMask):
        raise ValueError(f"mask must be a BlockMask, a name from mask_name() or None, got {type(mask).__name__}")
    if mask.seq_lengths != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"mask is for {mask.seq_lengths[0]} queries and {mask.seq_lengths[1]} keys, "
            f"but q has {q.shape[2]} and k has {k.shape[2]} tokens"
        )
    if mask.device != q.device:
        raise ValueError(f"mask lies on {mask.device} but q on {q.device}; use mask.to(q.device)")
    for what, given, real in (("batch", mask.shape[0], q.shape[0]), ("heads", mask.shape[1], q.shape[1])):
        if given not in (1, real):
            raise ValueError(f"mask has {what} {given}, but q has {real} (allowed: 1 or {real})")


def check_name(name: Tensor) -> None:
    """ValueError unless `name` can be the name of a mask."""
    if name.ndim or name.dtype != torch.int64 or name.device.type != "cpu":
        raise ValueError(
            f"mask must be a BlockMask, a name from mask_name() or None, got a tensor {name.dtype} "
            f"{tuple(name.shape)} on {name.device}"
        )


def check_values(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, modifier: Modifier | None) -> None:
    """What SPARSEREEL_CHECK=1 adds: reads every value.

    Raises:
        ValueError: NaN or infinity in q, k or v, a key length outside 0 .. Skv, a bias or a factor that is NaN.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise ValueError(f"{name} must be finite, got {bad} of {x.numel()} values NaN or infinite")
    if key_lengths is not None and bool(((key_lengths < 0) | (key_lengths > k.shape[2])).any()):
        raise ValueError(f"key_lengths must lie in 0 to {k.shape[2]}, got {key_lengths.tolist()}")
    if isinstance(modifier, KeyBias) and bool((modifier.bias.isnan() | (modifier.bias == torch.inf)).any()):
        raise ValueError("KeyBias.bias must be finite or -inf, got NaN or +inf")
    if isinstance(modifier, FrameDecay) and not bool(modifier.table.isfinite().all()):
        raise ValueError("FrameDecay.table must be finite, got NaN or infinity")


def check_result(out: Tensor, backend: str) -> None:
    """What SPARSEREEL_CHECK=1 adds after the call: FloatingPointError where finite inputs gave NaN."""
    if bool(out.isnan().any()):
        raise FloatingPointError(f"backend {backend} gave NaN for finite inputs")
