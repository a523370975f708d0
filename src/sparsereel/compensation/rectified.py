"""Rectified SpaAttn: kept weights shrink to the mass they would have had, dropped blocks answer with mean values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsereel.compensation.base import Compensation, SparseCall
from sparsereel.patterns import arguments
from sparsereel.selectors.scores import block_means, for_heads

FLAVOURS = ("gapr", "ipar")


@dataclass(frozen=True, eq=False)
class Rectified(Compensation):
    """Rectified SpaAttn (arXiv 2511.19835): pooled attention says what share of the mass each block would hold.

        P_ij = softmax_j(log n_j + scale mean(q_i) mean(k_j))
        out_i = R_i sparse_i + sum_(j corrected) P_ij mean(v_j)

    with R_i the sum of P over all blocks that are not corrected. IPAR (isolated pooling, reallocation) is the weight
    n_j beside text that is never pooled: each text token is a column of its own. GAPR corrects a skipped block only
    where the gain |q k| of its means exceeds the pooling error, estimated from mean absolute deviations,
    |dev(q) mean(k)| + |mean(q) dev(k)|; other skipped blocks count as kept. Exact where the tokens of each block are
    equal. One estimate for a whole block of queries: cheaper and coarser than `mean_key`.

    Args:
        flavour: "gapr" as published, or "ipar": every skipped block is corrected.

    Raises:
        ValueError: an unknown flavour.
    """

    flavour: str = "gapr"

    name: ClassVar[str] = "rectified"

    def check(self) -> None:
        arguments.one_of("flavour", self.flavour, FLAVOURS)

    def complete(self, call: SparseCall, out: Tensor, lse: Tensor | None) -> Tensor:
        if not call.skips_anything:
            return out
        mass = pooled_mass(call)
        corrected = call.skipped if self.flavour == "ipar" else call.skipped & gains(call)
        kept = (mass * ~corrected).sum(-1, keepdim=True)
        # Rows without any key keep their zeros; their shares mean nothing.
        kept = torch.where(call.visited.any(-1, keepdim=True), kept, 1.0)
        added = (mass * corrected) @ for_heads(call.v_means, out.shape[1])
        return (out * call.rows(kept) + call.rows(added)).to(out.dtype)


def pooled_mass(call: SparseCall) -> Tensor:
    """fp32 [B, H, nQ, nK]: the share of each key block for the mean query of each query block; rows sum to 1."""
    heads = call.q.shape[1]
    scores = call.q_means * call.scale @ for_heads(call.k_means, heads).transpose(-1, -2) + call.log_sizes
    scores = scores.masked_fill((call.k_sizes == 0)[:, None, None], -torch.inf)
    return torch.softmax(_isolate(call, scores), -1).nan_to_num(0.0)


def _isolate(call: SparseCall, scores: Tensor) -> Tensor:
    """The scores, where blocks with isolated tokens are judged by each of their tokens instead of by their mean."""
    if call.isolated is None:
        return scores
    flags = call.isolated.reshape(-1, call.isolated.shape[-1]).any(0)
    blocks = (flags.nonzero().flatten() // call.block[1]).unique()
    if not blocks.numel():
        return scores
    tokens = blocks[:, None] * call.block[1] + torch.arange(call.block[1], device=blocks.device)
    inside = (tokens < call.valid[:, None, None])[:, None]
    keys = call.k[:, :, tokens.clamp(max=call.k.shape[2] - 1).flatten()].float()
    logits = (call.q_means * call.scale) @ for_heads(keys, call.q.shape[1]).transpose(-1, -2)
    logits = logits.unflatten(-1, tokens.shape).masked_fill(~inside[:, :, None], -torch.inf)
    return scores.index_copy(-1, blocks, logits.logsumexp(-1).to(scores.dtype))


def gains(call: SparseCall) -> Tensor:
    """bool [B, H, nQ, nK]: blocks whose means say more than their pooling hides (GAPR)."""
    heads = call.q.shape[1]
    keys, spread = (for_heads(x, heads).transpose(-1, -2) for x in (call.k_means, _deviation(call, keys=True)))
    gain = (call.q_means @ keys).abs()
    error = (_deviation(call, keys=False) @ keys).abs() + (call.q_means @ spread).abs()
    return gain > error


def _deviation(call: SparseCall, *, keys: bool) -> Tensor:
    """fp32 [B, H, n, D]: mean absolute deviation of each channel inside a block."""
    x, means, block = (call.k, call.k_means, call.block[1]) if keys else (call.q, call.q_means, call.block[0])
    sizes = call.k_sizes if keys else call.q_sizes
    off = (x - means.repeat_interleave(block, 2)[:, :, : x.shape[2]]).abs()
    return block_means(off, block, sizes, call.valid_keys)
