"""Inputs and the error budget that tests and benchmarks share.

The budget is derived, not guessed. With everything compared in fp64, a backend may err as much as plain PyTorch in
the same dtype does on the same input, times 1.1, plus a rounding term: one rounding of the result and the rounding of
fp32 sums over D and Skv terms, relative to the sum of absolute terms that each result is made of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from . import reference
from .attention import sparse_attention
from .block_lists import EMPTY, FULL, block_counts
from .block_mask import BlockMask
from .layout import full_precision
from .modifiers import FrameDecay, KeyBias, Modifier, reduce_to_bias

EAGER_FACTOR = 1.1
TILES = 8


def make_qkv(
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    head_dim: int = 64,
    v_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "bhsd",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q [B, H, Sq, D], k [B, Hkv, Skv, D] and v [B, Hkv, Skv, Dv].

    Args:
        layout: memory order: "bhsd" (contiguous), "bshd" (as diffusers hands them over) or "strided" (rows with gaps).
    """
    generator = torch.Generator().manual_seed(seed)
    kv_len, kv_heads, v_dim = q_len if kv_len is None else kv_len, kv_heads or heads, v_dim or head_dim

    def normal(number: int, tokens: int, features: int) -> Tensor:
        shape = (batch, number, tokens, features)
        values = torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
        if layout == "bshd":
            return values.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "strided":
            return values.repeat(1, 1, 1, 2)[..., :features]
        return values

    return (
        normal(heads, q_len, head_dim),
        normal(kv_heads, kv_len, head_dim),
        normal(kv_heads, kv_len, v_dim),
    )


def random_block_mask(
    q_len: int,
    kv_len: int | None = None,
    *,
    density: float = 0.3,
    partial_share: float = 0.5,
    block: tuple[int, int] = (128, 64),
    batch: int = 1,
    heads: int = 1,
    empty_rows: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> BlockMask:
    """A mask whose query blocks each visit the same number of random key blocks; memory O(blocks).

    Args:
        density: share of key blocks that a query block visits (at least one).
        partial_share: share of visited blocks that are partial, with half of their bits set.
        empty_rows: leave the first query block, and the first row of the second, without any key.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = (q_len, q_len if kv_len is None else kv_len)
    counts = block_counts(lengths, block)
    tiles = torch.randint(0, 256, (TILES, block[0], block[1] // 8), generator=generator, dtype=torch.uint8)
    draws = torch.rand(batch, heads, *counts, generator=generator)
    visits = min(counts[1], max(1, round(density * counts[1])))
    visited = torch.zeros_like(draws, dtype=torch.bool).scatter_(-1, draws.topk(visits, -1).indices, True)
    kind = torch.randint(0, TILES, draws.shape, generator=generator, dtype=torch.int32)
    kind = torch.where(torch.rand(draws.shape, generator=generator) < partial_share, kind, FULL)
    if empty_rows:
        tiles[0, 0] = 0
        kind[:, :, 1:2] = 0
        visited[:, :, :1] = False
    block_map = torch.where(visited, kind, EMPTY)
    return BlockMask.from_block_map(block_map, tiles, lengths, block).to(device)


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: BlockMask | None
    scale: float
    key_lengths: Tensor | None
    modifier: Modifier | None

    def to(self, dtype: torch.dtype) -> Call:
        """The same call in another precision."""
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))


Results = dict[str, Tensor]


def assert_matches_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None = None,
    *,
    backend: str,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    modifier: Modifier | None = None,
    lse: bool = True,
    gradients: bool = True,
) -> None:
    """Run a backend through `sparse_attention` and compare it with the definition in fp64.

    Args:
        backend: a name from `dispatch.BACKENDS`.
        lse: compare lse too.
        gradients: compare dq, dk, dv and, under KeyBias, the bias' gradient too.

    Raises:
        AssertionError: naming the result whose error is over the budget, with both figures.
    """
    call = Call(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale, key_lengths, modifier)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(*q.shape[:3], v.shape[3], generator=generator).to(q)
    grad_lse = torch.randn(q.shape[:3], generator=generator).to(q.device) if gradients and lse else None
    found = _run_backend(call, backend, grad_out, grad_lse, lse, gradients)
    exact = _exact(call, grad_out, grad_lse)
    eager, terms = _eager(call, grad_out, grad_lse), _terms(call, grad_out, grad_lse)
    for name, result in found.items():
        _compare(name, backend, result, exact[name], eager[name], terms[name], _relative_rounding(call, exact, name))


def _run_backend(
    call: Call, backend: str, grad_out: Tensor, grad_lse: Tensor | None, lse: bool, gradients: bool
) -> Results:
    inputs = {"dq": call.q, "dk": call.k, "dv": call.v}
    leaves = {name: x.detach().requires_grad_(gradients) for name, x in inputs.items()}
    modifier = call.modifier
    if isinstance(modifier, KeyBias) and gradients:
        modifier = KeyBias(modifier.bias.detach().requires_grad_())
        leaves["dbias"] = modifier.bias
    attend = partial(
        sparse_attention, scale=call.scale, key_lengths=call.key_lengths, modifier=modifier, backend=backend
    )
    q, k, v = leaves["dq"], leaves["dk"], leaves["dv"]
    if not lse and not gradients:
        return {"out": attend(q, k, v, call.mask)}
    out, log = attend(q, k, v, call.mask, return_lse=True)
    results = {"out": out.detach(), "lse": log.detach()}
    if gradients:
        ends = ((out,), (grad_out,)) if grad_lse is None else ((out, log), (grad_out, grad_lse.to(log.dtype)))
        grads = torch.autograd.grad(ends[0], list(leaves.values()), ends[1])
        results |= dict(zip(leaves, grads, strict=True))
    return results


def _exact(call: Call, grad_out: Tensor, grad_lse: Tensor | None) -> Results:
    wide = call.to(torch.float64)
    rest = (call.mask, call.scale, call.key_lengths, call.modifier)
    out, lse = reference.forward(wide.q, wide.k, wide.v, *rest)
    grads = reference.backward(grad_out.double(), grad_lse, wide.q, wide.k, wide.v, out, lse, *rest)
    results = {"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv"), grads[:3], strict=True))
    return results if grads[3] is None else results | {"dbias": grads[3]}


def _weights(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities, lse, FrameDecay's factors (1 without) and logits, in full precision of the call's dtype."""
    s, factor = reference.logits(call.q, call.k, call.scale, call.modifier)
    s = s.masked_fill(~reference.allowed_pairs(s.shape, call.mask, call.key_lengths, s.device), -torch.inf)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return p, lse, torch.ones_like(s) if factor is None else factor, s


def _eager(call: Call, grad_out: Tensor, grad_lse: Tensor | None) -> Results:
    """Attention as plain PyTorch computes it in the call's dtype: products rounded to it, softmax in fp32."""
    dtype, wide = call.q.dtype, full_precision(call.q.dtype)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a.to(wide) @ b.to(wide)).to(dtype)

    shared = call.q.shape[1] // call.k.shape[1]
    k, v = (x.repeat_interleave(shared, 1) for x in (call.k, call.v))
    rounded = product(call.q, k.transpose(-1, -2)).to(wide) * call.scale
    exact_s = call.q.to(wide) @ k.to(wide).transpose(-1, -2) * call.scale
    p, lse, factor, s = _weights(call)
    # The modifier is monotone in the score, so the rounded score takes the same road.
    s = s + torch.where(s.isinf(), 0, (rounded - exact_s) * factor)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    out = product(p.to(dtype), v)
    dp = product(grad_out, v.transpose(-1, -2)).to(wide)
    ds = p * (dp - (grad_out.to(wide) * out.to(wide)).sum(-1, keepdim=True))
    if grad_lse is not None:
        ds = ds + p * grad_lse[..., None].to(wide)
    results = {"out": out, "lse": lse}
    if isinstance(call.modifier, KeyBias):
        results["dbias"] = reduce_to_bias(ds.sum(2), call.modifier.bias)
    ds = (ds * factor * call.scale).to(dtype)
    results["dq"] = product(ds, k)
    results["dk"] = _grouped(product(ds.transpose(-1, -2), call.q), call.k.shape[1])
    results["dv"] = _grouped(product(p.to(dtype).transpose(-1, -2), grad_out), call.k.shape[1])
    return results


def _terms(call: Call, grad_out: Tensor, grad_lse: Tensor | None) -> Results:
    """For every result the sum of the absolute values of the terms it is made of."""
    wide = call.to(torch.float64)
    p, lse, factor, _ = _weights(wide)
    shared = call.q.shape[1] // call.k.shape[1]
    k, v = (x.repeat_interleave(shared, 1).abs() for x in (wide.k, wide.v))
    grad, q = grad_out.double().abs(), wide.q.abs()
    out = p @ v
    ds = p * (grad @ v.transpose(-1, -2) + (grad * out).sum(-1, keepdim=True))
    if grad_lse is not None:
        ds = ds + p * grad_lse.double().abs()[..., None]
    terms = {"out": out, "lse": torch.ones_like(lse)}
    if isinstance(call.modifier, KeyBias):
        terms["dbias"] = reduce_to_bias(ds.sum(2), call.modifier.bias)
    ds = ds * factor.abs() * abs(call.scale)
    terms["dq"] = ds @ k
    terms["dk"] = _grouped(ds.transpose(-1, -2) @ q, call.k.shape[1])
    terms["dv"] = _grouped(p.transpose(-1, -2) @ grad, call.k.shape[1])
    return terms


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).sum(2)


def _relative_rounding(call: Call, exact: Results, name: str) -> float:
    """Share of the terms' sum that rounding may cost: the result's own, and that of sums in full precision."""
    unit = torch.finfo(full_precision(call.q.dtype)).eps
    lse = exact["lse"][exact["lse"].isfinite()]
    # Scores are at most about lse; each is a sum of D terms, and its rounding is a relative error of its weight.
    largest = 1.0 + (float(lse.abs().max()) if lse.numel() else 0.0)
    sums = math.sqrt(call.q.shape[-1]) * largest + math.sqrt(max(1, call.q.shape[-2], call.k.shape[-2]))
    own = torch.finfo(call.q.dtype).eps
    # lse is fp32, but may rest on scores that were rounded to the call's dtype; the bias' gradient is a fp32 sum.
    stored = {"lse": own / 2 * largest, "dbias": unit}.get(name, own)
    return stored + unit * sums


def _compare(
    name: str, backend: str, found: Tensor, exact: Tensor, eager: Tensor, terms: Tensor, rounding: float
) -> None:
    assert found.shape == exact.shape, f"{backend}: {name} has shape {tuple(found.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    absent = exact == -torch.inf
    assert torch.equal(found == -torch.inf, absent), f"{backend}: {name} is -inf in other places than the definition"
    difference = (found.double() - exact.double()).masked_fill(absent, 0).abs()
    eager_error = (eager.double() - exact.double()).masked_fill(absent, 0).abs()
    budget = EAGER_FACTOR * float(eager_error.max()) + rounding * float(terms.max())
    worst = float(difference.max()) if not bool(found.isnan().any()) else math.nan
    assert worst <= budget, f"{backend}: {name} is off by {worst:.3g}, allowed {budget:.3g} ({found.dtype})"


def frame_decay(q_len: int, kv_len: int, *, frames: int = 4, seed: int = 0) -> FrameDecay:
    """Tokens spread over `frames` frames, text at the end, and a table that weakens far frames."""
    generator = torch.Generator().manual_seed(seed)
    of_q, of_k = (torch.randint(-1, frames, (n,), generator=generator, dtype=torch.int32) for n in (q_len, kv_len))
    return FrameDecay(of_q, of_k, 0.5 ** torch.arange(frames, dtype=torch.float32))


def key_bias(*shape: int, hidden: float = 0.1, seed: int = 0) -> KeyBias:
    """Normal biases of `shape`, a share `hidden` of them -inf."""
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(shape, generator=generator)
    return KeyBias(bias.masked_fill(torch.rand(shape, generator=generator) < hidden, -torch.inf))
