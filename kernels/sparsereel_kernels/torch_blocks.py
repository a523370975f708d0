"""The `torch` backend: gathers the visited key blocks of many query blocks, then a few large matrix products.

Pure PyTorch, forward and backward, on every device. Rows (a query block of one head) are sorted by the number of key
blocks they visit and taken in chunks of a few million pairs, so that memory stays O(S) and Python is called tens of
times, not thousands. Products run in the input's type, softmax in fp32. A row too long for one chunk is taken in
stretches whose results are merged through their lse.

Heads are taken in up to GROUPS groups a sample: copies into blocks and the gradients' fp32 sums exist for one group at
a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .gathered import Group, Workspace, compute_dtype, from_blocks, to_blocks
from .layout import empty_like_query, full_precision
from .modifiers import KeyBias, Modifier, reduce_to_bias
from .visits import Chunk, chunks, dense_visits, visits_of

if TYPE_CHECKING:
    from .block_mask import BlockMask
    from .problem import Problem

GROUPS = 4
DENSE_BLOCK = (256, 128)
# Pairs of tokens in a chunk: large enough to keep Python out of the way, small enough for the last-level cache.
CPU_PAIRS, DEVICE_PAIRS = 1 << 20, 1 << 24
SMALLEST_CHUNK = 1 << 17
PAIR_BYTES = 16


def unsupported_reasons(problem: Problem) -> list[str]:
    """Nothing that `sparse_attention` takes is refused."""
    return []


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
    """Attend to the visited blocks. Shapes as in `sparse_attention`.

    Returns:
        out [B, H, Sq, Dv] in q's dtype and memory order; lse [B, H, Sq] in fp32 (fp64 for fp64).
    """
    out = empty_like_query(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=full_precision(q.dtype))
    pairs = _pairs_at_once(q, k, v)
    for group in _groups(q, k, v, mask, scale, key_lengths, modifier):
        group_out, group_lse = _forward_group(group, pairs)
        where = (group.sample, slice(group.heads.start, group.heads.stop))
        out[where] = from_blocks(group_out, len(group.heads), q.shape[2], v.shape[3]).to(q.dtype)
        lse[where] = group_lse.view(len(group.heads), -1)[:, : q.shape[2]]
    return out, lse


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
    """Gradients by the same walk; scores are worked out again.

    Returns:
        (dq, dk, dv) in the dtypes and memory orders of q, k and v, and the gradient of KeyBias.bias or None.
    """
    dq, dk, dv = (empty_like_query(x, x.shape[3]) for x in (q, k, v))
    dbias = None
    if isinstance(modifier, KeyBias):
        dbias = torch.zeros(*q.shape[:2], k.shape[2], dtype=full_precision(q.dtype), device=q.device)
    pairs = _pairs_at_once(q, k, v) // 2
    for group in _groups(q, k, v, mask, scale, key_lengths, modifier):
        heads = (group.sample, slice(group.heads.start, group.heads.stop))
        kv_heads = (group.sample, slice(group.kv_heads.start, group.kv_heads.stop))
        sums = GroupGradients(
            group, grad_out[heads], None if grad_lse is None else grad_lse[heads], out[heads], lse[heads]
        )
        for stretches in chunks(group.visits, group.sample, group.heads, pairs):
            sums.add_rows(stretches)
        dq[heads] = from_blocks(sums.dq, len(group.heads), q.shape[2], q.shape[3]).to(q.dtype)
        dk[kv_heads] = from_blocks(sums.dk, len(group.kv_heads), k.shape[2], k.shape[3]).to(k.dtype)
        dv[kv_heads] = from_blocks(sums.dv, len(group.kv_heads), v.shape[2], v.shape[3]).to(v.dtype)
        if dbias is not None:
            dbias[heads] = sums.dbias.view(len(group.heads), -1)[:, : k.shape[2]]
    if dbias is None or not isinstance(modifier, KeyBias):
        return dq, dk, dv, None
    return dq, dk, dv, reduce_to_bias(dbias, modifier.bias).to(modifier.bias.dtype)


def _pairs_at_once(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Pairs in a chunk: what is fast here, but no more memory than half of q, k and v."""
    fast = CPU_PAIRS if q.device.type == "cpu" else DEVICE_PAIRS
    return max(SMALLEST_CHUNK, min(fast, (q.nbytes + k.nbytes + v.nbytes) // (2 * PAIR_BYTES)))


def _groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    scale: float,
    key_lengths: Tensor | None,
    modifier: Modifier | None,
) -> Iterator[Group]:
    lengths = (q.shape[2], k.shape[2])
    visits = dense_visits(lengths, DENSE_BLOCK, q.device) if mask is None else visits_of(mask)
    if 0 in (*lengths, q.shape[0], q.shape[1]):
        visits = dense_visits((lengths[0], 0), visits.block, q.device)
    dtype, workspace = compute_dtype(q.dtype, q.device), Workspace(q.device)
    limits = [k.shape[2]] * q.shape[0] if key_lengths is None else key_lengths.clamp(0, k.shape[2]).tolist()
    shared, step = q.shape[1] // k.shape[1], -(-k.shape[1] // GROUPS)
    for sample in range(q.shape[0]):
        for first in range(0, k.shape[1], step):
            kv_heads = range(first, min(first + step, k.shape[1]))
            heads = range(kv_heads.start * shared, kv_heads.stop * shared)
            yield Group(
                visits=visits,
                workspace=workspace,
                sample=sample,
                heads=heads,
                kv_heads=kv_heads,
                q=to_blocks(q[sample, heads.start : heads.stop], visits.block[0], dtype),
                k=to_blocks(k[sample, kv_heads.start : kv_heads.stop], visits.block[1], dtype),
                v=to_blocks(v[sample, kv_heads.start : kv_heads.stop], visits.block[1], dtype),
                scale=scale,
                length=limits[sample],
                kv_len=k.shape[2],
                modifier=modifier,
                features=q.shape[3],
                v_features=v.shape[3],
            )


# ---------------------------------------------------------------- forward


def _forward_group(group: Group, pairs: int) -> tuple[Tensor, Tensor]:
    """[rows, BQ * Dv] and [rows, BQ] of a group; rows that visit nothing stay 0 and -inf."""
    block_q = group.visits.block[0]
    out = torch.zeros(group.q.shape[0], block_q * group.v_features, dtype=group.q.dtype, device=group.q.device)
    lse = torch.full((group.q.shape[0], block_q), -torch.inf, dtype=group.wide, device=group.q.device)
    for stretches in chunks(group.visits, group.sample, group.heads, pairs):
        rows = stretches[0].rows
        q = group.rows_of(group.q, rows, group.features, "q")
        chunk_out, chunk_lse = _attend(group, stretches[0], q)
        for stretch in stretches[1:]:
            chunk_out, chunk_lse = _merge(chunk_out.to(group.wide), chunk_lse, *_attend(group, stretch, q))
        out.index_copy_(0, rows, chunk_out.to(out.dtype).flatten(1))
        lse.index_copy_(0, rows, chunk_lse)
    return out, lse


def _attend(group: Group, chunk: Chunk, q: Tensor) -> tuple[Tensor, Tensor]:
    """out [n, BQ, Dv] and lse [n, BQ] of one stretch."""
    ids = group.key_ids(chunk)
    k = group.keys_of(group.k, ids, q.shape[0], group.features, "keys")
    p, lse, empty = group.probabilities(group.scores(chunk, q, k)[0])
    v = group.keys_of(group.v, ids, q.shape[0], group.v_features, "keys")
    out = torch.bmm(group.narrow(p, "narrow"), v)
    return out.mul_(~empty.unsqueeze(-1)), lse


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over two sets of keys from the softmax over each."""
    lse = torch.logaddexp(lse_a, lse_b)
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    share_a, share_b = (torch.exp(part - safe).unsqueeze(-1) for part in (lse_a, lse_b))
    return out_a * share_a + out_b * share_b, lse


# ---------------------------------------------------------------- backward


class GroupGradients:
    """Sums of a group's gradients, in full precision, by blocks."""

    def __init__(self, group: Group, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> None:
        self.group = group
        block_q, block_k = group.visits.block
        self.grad_out = to_blocks(grad_out, block_q, group.q.dtype)
        self.lse = to_blocks(lse.unsqueeze(-1), block_q, group.wide)
        # d lse / d s is the softmax itself, so that its gradient joins the row sum that softmax subtracts.
        row_sum = (grad_out.to(group.wide) * out).sum(-1)
        row_sum = row_sum if grad_lse is None else row_sum - grad_lse
        self.row_sum = to_blocks(row_sum.unsqueeze(-1), block_q, group.wide)
        self.dq, self.dk, self.dv = (torch.zeros_like(x, dtype=group.wide) for x in (group.q, group.k, group.v))
        bias_rows = len(group.heads) * group.k_blocks if isinstance(group.modifier, KeyBias) else 0
        self.dbias = torch.zeros(bias_rows, block_k, dtype=group.wide, device=group.q.device)

    def add_rows(self, stretches: list[Chunk]) -> None:
        """Add what one chunk of rows contributes."""
        group, rows = self.group, stretches[0].rows
        q = group.rows_of(group.q, rows, group.features, "q")
        grad_out = group.rows_of(self.grad_out, rows, group.v_features, "grad_out")
        dq: Tensor | None = None
        for stretch in stretches:
            part = self._add_stretch(stretch, q, grad_out)
            dq = part.to(group.wide) if dq is None else dq.add_(part)
        assert dq is not None
        self.dq.index_copy_(0, rows, dq.flatten(1))

    def _add_stretch(self, chunk: Chunk, q: Tensor, grad_out: Tensor) -> Tensor:
        """Add to dk, dv and dbias; returns dq [n, BQ, D] of these rows."""
        group, rows = self.group, chunk.rows
        ids = group.key_ids(chunk)
        k = group.keys_of(group.k, ids, rows.shape[0], group.features, "keys")
        s, factor = group.scores(chunk, q, k)
        p, lse, empty = group.probabilities(s)
        p.mul_(self._share(chunk, lse, empty))
        v = group.keys_of(group.v, ids, rows.shape[0], group.v_features, "values")
        narrow_p = group.narrow(p, "narrow")
        self._add_blocks(self.dv, ids, torch.bmm(narrow_p.transpose(1, 2), grad_out))
        ds = self._score_gradient(chunk, p, grad_out, v)
        if self.dbias.numel():
            self.dbias.index_add_(0, group.bias_ids(chunk), ds.sum(1).view(-1, group.visits.block[1]))
        ds = ds.mul_(factor) if factor is not None else ds
        narrow_ds = group.narrow(ds, "narrow")
        self._add_blocks(self.dk, ids, torch.bmm(narrow_ds.transpose(1, 2), q).mul_(group.scale))
        return torch.bmm(narrow_ds, k).mul_(group.scale)

    def _share(self, chunk: Chunk, lse: Tensor, empty: Tensor) -> Tensor:
        """[n, BQ, 1] factor from the stretch's softmax to the row's: 0 for rows that see nothing here."""
        if chunk.only:
            return (~empty).to(lse.dtype).unsqueeze(-1)
        row_lse = self.lse.index_select(0, chunk.rows)
        return torch.exp(lse - row_lse.masked_fill(row_lse == -torch.inf, 0.0)).unsqueeze(-1)

    def _score_gradient(self, chunk: Chunk, p: Tensor, grad_out: Tensor, v: Tensor) -> Tensor:
        """p * (grad_out v^T - row sum), in place of p."""
        group = self.group
        product = group.workspace.get("product", tuple(p.shape), grad_out.dtype)
        torch.bmm(grad_out, v.transpose(1, 2), out=product)
        row_sum = self.row_sum.index_select(0, chunk.rows).unsqueeze(-1)
        dp = (
            product
            if product.dtype == p.dtype
            else group.workspace.get("scores", tuple(p.shape), p.dtype).copy_(product)
        )
        return p.mul_(dp.sub_(row_sum))

    @staticmethod
    def _add_blocks(sums: Tensor, ids: Tensor, part: Tensor) -> None:
        sums.index_add_(0, ids, part.reshape(ids.shape[0], -1).to(sums.dtype))
