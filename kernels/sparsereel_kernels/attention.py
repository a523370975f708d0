"""sparse_attention, the public function: checks, then the custom operator or, where neither autograd nor a compiler
watches, the backend directly."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal, overload

import torch
from torch import Tensor

from . import checks, registry, run
from .block_mask import BlockMask
from .custom_op import attention_op
from .modifiers import FrameDecay, KeyBias, Modifier

__all__ = ["mask_name", "sparse_attention"]

# Stands for "no mask"; constant, so that compiled graphs of dense and sparse layers are the same.
_NO_MASK = registry.name_tensor(None)


def mask_name(mask: BlockMask | None) -> Tensor:
    """A 0-d int64 CPU tensor that `sparse_attention` takes in place of `mask`, also inside compiled graphs.

    The tensor keeps its mask alive. A layer that holds one in an attribute can be given another mask at any time, or
    None for dense, by assigning another name: compiled graphs read it at every call and are not compiled again. Do
    not change a name in place. Under gradient checkpointing pass the name as an argument of the checkpointed
    function: what runs again then sees the mask that the first run saw, whatever the attribute says by then.
    """
    return registry.name_tensor(mask)


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | Tensor | None = None,
    *,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    modifier: Modifier | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | Tensor | None = None,
    *,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    modifier: Modifier | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | Tensor | None = None,
    *,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    modifier: Modifier | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to the key blocks listed in `mask`.

    Args:
        q: [B, H, Sq, D], fp32, bf16 or fp16 (fp64 in the backends "torch" and "reference"); D is 8 to 256.
        k: [B, Hkv, Skv, D]; Hkv divides H.
        v: [B, Hkv, Skv, Dv]; Dv is 8 to 256.
        mask: block lists for Sq x Skv tokens, or their `mask_name`; None is dense. The caller builds it for the same
            grid and token order as q and k. It is never changed.
        scale: multiplies the scores before softmax; default D**-0.5. Larger means sharper.
        key_lengths: [B] int32; keys of a sample at or past its length are not seen.
        modifier: a FrameDecay or KeyBias that changes the scores before softmax.
        return_lse: also return the log of each row's sum of exponentials.
        backend: a name from `dispatch.BACKENDS`; "auto" takes the best for this device (SPARSEREEL_BACKEND pins it).

    Returns:
        [B, H, Sq, Dv] in q's dtype and memory order; with `return_lse` also lse [B, H, Sq], fp32 (fp64 for fp64),
        natural log. Both are differentiable (once). A query with no visible key gives zeros and lse -inf.

    Raises:
        ValueError: shapes, dtypes or devices disagree (both values are in the text).
        BackendUnavailable: the named backend (or, for "auto", every backend) cannot run; the text lists the reasons.

    Under torch.autocast q, k and v are cast first, as for torch's own attention.
    """
    casting = _casts(q)
    if casting:
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    checks.check_inputs(q, k, v, key_lengths, modifier)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    wants = run.Wants(return_lse, _needs_gradients(q, k, v, modifier))
    # Cast once, above: a backend that multiplies in fp32 for want of bf16 hardware is not to be cast back.
    eager = casting and not torch.compiler.is_compiling()
    with torch.autocast(q.device.type, enabled=False) if eager else nullcontext():
        if torch.compiler.is_compiling() or wants.backward:
            out, lse = _through_operator(q, k, v, mask, scale, key_lengths, modifier, backend, wants)
        else:
            found = _find(mask)
            if found is not None:
                checks.check_mask(found, q, k)
            out, lse = run.forward(q, k, v, found, scale, key_lengths, modifier, backend, wants)
    return (out, lse) if return_lse else out


def _casts(q: Tensor) -> bool:
    """Whether autocast is on, which torch's own attention casts q, k and v for: rotary tables often leave fp32."""
    return isinstance(q, Tensor) and q.dtype != torch.float64 and torch.is_autocast_enabled(q.device.type)


def _needs_gradients(q: Tensor, k: Tensor, v: Tensor, modifier: Modifier | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    bias = isinstance(modifier, KeyBias) and modifier.bias.requires_grad
    return bias or q.requires_grad or k.requires_grad or v.requires_grad


def _find(mask: BlockMask | Tensor | None) -> BlockMask | None:
    if isinstance(mask, Tensor):
        checks.check_name(mask)
        return registry.find(mask)
    return mask


def _name_of(mask: BlockMask | Tensor | None) -> Tensor:
    if mask is None:
        return _NO_MASK
    if isinstance(mask, Tensor):
        checks.check_name(mask)
        return mask
    if not isinstance(mask, BlockMask):
        raise ValueError(f"mask must be a BlockMask, a name from mask_name() or None, got {type(mask).__name__}")
    return mask.name


def _through_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | Tensor | None,
    scale: float,
    key_lengths: Tensor | None,
    modifier: Modifier | None,
    backend: str,
    wants: run.Wants,
) -> tuple[Tensor, Tensor]:
    decay = modifier if isinstance(modifier, FrameDecay) else None
    frame_of_q, frame_of_k, table = (decay.frame_of_q, decay.frame_of_k, decay.table) if decay else (None, None, None)
    bias = modifier.bias if isinstance(modifier, KeyBias) else None
    name = _name_of(mask)
    tensors = (q, k, v, name, key_lengths, frame_of_q, frame_of_k, table, bias)
    out, lse, _ = attention_op(*tensors, scale, backend, wants.lse, wants.backward)
    return out, lse
