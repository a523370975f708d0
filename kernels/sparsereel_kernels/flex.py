"""The `flex` backend: PyTorch's FlexAttention, compiled. The peer that every other backend is measured against.

Compiled once for each kind of call (dtype, sizes, modifier) and kept by torch.compile. Key lengths and modifiers
become a score function, packed bits a mask function. On CPUs FlexAttention has neither gradients nor lse.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .modifiers import FrameDecay, KeyBias, Modifier, bias_as_4d
from .problem import dtype_name

if TYPE_CHECKING:
    from .block_mask import BlockMask
    from .problem import Problem

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Different geometries that may be compiled side by side; beyond it torch.compile refuses instead of running eagerly,
# which would build the dense matrix.
RECOMPILE_LIMIT = 64
# Smallest side of a matrix product on a GPU's tensor cores.
MMA_SIDE = 16


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why FlexAttention cannot run `problem`; empty where it can."""
    reasons = []
    if problem.device_type not in ("cpu", "cuda"):
        reasons.append(f"device {problem.device_type} is not supported (cpu, cuda)")
    if problem.dtype not in DTYPES:
        names = ", ".join(map(dtype_name, DTYPES))
        reasons.append(f"dtype {dtype_name(problem.dtype)} is not supported ({names})")
    if 0 in (problem.batch, problem.heads, problem.q_len, problem.kv_len):
        reasons.append("empty tensors are not supported")
    if problem.device_type == "cpu":
        reasons += _cpu_reasons(problem)
    elif min(problem.head_dim, problem.v_dim) < MMA_SIDE:
        reasons.append(f"head dims {problem.head_dim}, {problem.v_dim} are not supported (at least {MMA_SIDE})")
    elif problem.block is not None and math.gcd(*problem.block) < MMA_SIDE:
        reasons.append(f"blocks {problem.block} without a common divisor of {MMA_SIDE} are not supported")
    return reasons


def _cpu_reasons(problem: Problem) -> list[str]:
    reasons = []
    if problem.needs_backward:
        reasons.append("gradients are not supported on CPU by torch's FlexAttention")
    elif problem.needs_lse:
        reasons.append("lse is not supported on CPU by torch's FlexAttention")
    if not reasons and not _has_compiler():
        reasons.append("no C++ compiler was found")
    return reasons


@lru_cache(maxsize=1)
def _has_compiler() -> bool:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError):
        return False
    return True


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
    """Attend through FlexAttention. Shapes as in `sparse_attention`.

    Returns:
        out [B, H, Sq, Dv]; lse [B, H, Sq] fp32, empty on CPU.
    """
    with_lse = q.device.type != "cpu"
    # On CPU FlexAttention refuses tensors that require grad even where none is recorded.
    q, k, v = q.detach(), k.detach(), v.detach()
    flex_mask = None if mask is None else mask.to_flex()
    run = _compiled(with_lse, _kind(modifier, key_lengths))
    result = run(q, k, v, flex_mask, scale, *_captured(key_lengths, modifier))
    return result if with_lse else (result, q.new_empty(0, dtype=torch.float32))


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
    """Gradients through FlexAttention's own backward, which needs its forward run again.

    Returns:
        (dq, dk, dv) and the gradient of KeyBias.bias or None.
    """
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    wanted = [q, k, v]
    if isinstance(modifier, KeyBias):
        modifier = KeyBias(modifier.bias.detach().requires_grad_())
        wanted.append(modifier.bias)
    flex_mask = None if mask is None else mask.to_flex()
    with _autograd_on():
        run = _compiled(True, _kind(modifier, key_lengths))
        again = run(q, k, v, flex_mask, scale, *_captured(key_lengths, modifier))
        known = 1 if grad_lse is None else 2
        grads = torch.autograd.grad(again[:known], wanted, (grad_out, grad_lse)[:known])
    return grads[0], grads[1], grads[2], grads[3] if len(grads) > 3 else None


@contextmanager
def _autograd_on() -> Iterator[None]:
    """Record gradients although a custom operator is running, which shuts autograd out below itself."""
    autograd = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in autograd:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(included, excluded):
        yield


# ---------------------------------------------------------------- score functions


def _kind(modifier: Modifier | None, key_lengths: Tensor | None) -> str:
    """Names the score function; part of what is compiled."""
    name = {None: "plain", FrameDecay: "decay", KeyBias: "bias"}[None if modifier is None else type(modifier)]
    return name if key_lengths is None else name + "+lengths"


def _captured(key_lengths: Tensor | None, modifier: Modifier | None) -> tuple[Tensor | None, ...]:
    """(lengths, frame_of_q, frame_of_k, table, bias [B or 1, H or 1, Skv]) for the score function."""
    frames = (modifier.frame_of_q, modifier.frame_of_k, modifier.table) if isinstance(modifier, FrameDecay) else None
    bias = bias_as_4d(modifier.bias).squeeze(2) if isinstance(modifier, KeyBias) else None
    return (key_lengths, *(frames or (None, None, None)), bias)


def _score_mod(
    kind: str,
    lengths: Tensor | None,
    frame_of_q: Tensor | None,
    frame_of_k: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
) -> ScoreMod | None:
    """The score function of `kind` over these tensors; None where scores stay as they are."""

    def modified(score: Tensor, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Tensor:
        if bias is not None:
            return score + bias[b if bias.shape[0] > 1 else 0, h if bias.shape[1] > 1 else 0, kv_idx]
        if frame_of_q is not None and frame_of_k is not None and table is not None:
            f, g = frame_of_q[q_idx], frame_of_k[kv_idx]
            distance = torch.clamp(torch.abs(f - g), max=table.shape[0] - 1)
            return torch.where((score > 0) & (f >= 0) & (g >= 0), score * table[distance], score)
        return score

    def bounded(score: Tensor, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Tensor:
        assert lengths is not None
        # A mask function would not do: FlexAttention does not ask it about full blocks.
        return torch.where(kv_idx < lengths[b], modified(score, b, h, q_idx, kv_idx), -torch.inf)

    if kind.endswith("+lengths"):
        return bounded
    return None if kind == "plain" else modified


@lru_cache(maxsize=16)
def _compiled(with_lse: bool, kind: str) -> Callable[..., Any]:
    """Compiled FlexAttention with the score function of `kind`."""
    # Static shapes: with dynamic ones, torch 2.14 generates CPU code that does not compile for some sizes.
    return torch.compile(partial(_attend, with_lse, kind), fullgraph=True, dynamic=False, **_limits())


def _limits() -> dict[str, Any]:
    known = inspect.signature(torch.compile).parameters
    return {"recompile_limit": RECOMPILE_LIMIT} if "recompile_limit" in known else {}


def _attend(
    with_lse: bool, kind: str, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, *captured: Tensor | None
) -> Any:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    score_mod = _score_mod(kind, *captured)
    shared = q.shape[1] != k.shape[1]
    if not with_lse:
        return flex_attention(q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=shared)
    wants = AuxRequest(lse=True)
    options = None if mask is None else _tiles(mask.BLOCK_SIZE)
    out, aux = flex_attention(
        q, k, v, score_mod, mask, scale=scale, enable_gqa=shared, return_aux=wants, kernel_options=options
    )
    return out, aux.lse


def _tiles(block: tuple[int, int]) -> Any:
    """Tile sizes of the GPU kernels: they must divide the mask's blocks, which the defaults need not."""
    side = math.gcd(*block, 64)
    backward = dict.fromkeys(("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), side)
    return {"BLOCK_M": math.gcd(block[0], 128), "BLOCK_N": math.gcd(block[1], 64), **backward}
