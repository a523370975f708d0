"""Attention of every query to one stand-in key for each skipped block: 1/64 of dense attention with blocks of 64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsereel.compensation.base import SparseCall
from sparsereel.selectors.partition import numbers_at_once
from sparsereel.selectors.scores import for_heads


def pooled_attention(
    call: SparseCall, queries: Tensor, keys: Tensor, values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax over the skipped blocks of each query's row, each block weighing as many keys as it has.

    Args:
        queries: [B, H, S, E], scaled; E need not be the head dimension.
        keys: [B, Hkv, nK, E].
        values: [B, Hkv, nK, Dv]; None = the block means of v.

    Returns:
        Output fp32 [B, H, S, Dv] and lse fp32 [B, H, S]; 0 and -inf for queries of rows that skip nothing.
    """
    heads = call.q.shape[1]
    keys = for_heads(keys, heads).to(queries.dtype)
    values = for_heads(call.v_means if values is None else values, heads).to(queries.dtype)
    outs, lses = [], []
    for rows, skipped in _pieces(call):
        logits = (queries[:, :, rows] @ keys.transpose(-1, -2)).float() + call.log_sizes
        logits = logits.masked_fill(~skipped, -torch.inf)
        lse = logits.logsumexp(-1)
        weights = (logits - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp()
        outs.append((weights.to(values.dtype) @ values).float())
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _pieces(call: SparseCall) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of queries that keep tables small, each with its rows of `skipped` [B or 1, H or 1, rows, nK]."""
    batch, heads, length, _ = call.q.shape
    size, count = call.block[0], call.skipped.shape[2]
    at_once = max(1, numbers_at_once(call.q) // (batch * heads * size * call.skipped.shape[3]))
    for first in range(0, count, at_once):
        rows = slice(first * size, min(length, (first + at_once) * size))
        skipped = call.skipped[:, :, first : first + at_once].repeat_interleave(size, 2)
        yield rows, skipped[:, :, : rows.stop - rows.start]
