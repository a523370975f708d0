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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .gathered import Group, Workspace, compute_dtype, from_blocks, to_blocks
from .layout import empty_like_query, full_precision
from .modifiers import KeyBias, Modifier, reduce_to_bias
from .visits import Chunk, Visits, chunks, dense_visits, visits_of

if TYPE_CHECKING:
    from .block_mask import BlockMask
    from .problem import Problem

GROUPS = 4
DENSE_BLOCK = (256, 128)
# Pairs of tokens in a chunk: large enough to keep Python out of the way, small enough for the last-level cache.
CPU_PAIRS, DEVICE_PAIRS = 1 << 20, 1 << 24
SMALLEST_CHUNK = 1 << 18
# Bytes that a pair of a chunk needs, at most; chunks may take this share of the memory of q, k and v.
FORWARD_BYTES, FORWARD_SHARE = 16, 1.0
BACKWARD_BYTES, BACKWARD_SHARE = 24, 0.4


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
    call = Call(q, k, v, _visits(q, k, mask), scale, key_lengths, modifier)
    out = empty_like_query(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=full_precision(q.dtype))
    for sample, kv_heads in call.parts():
        _forward_part(call, sample, kv_heads, out, lse)
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
    call = Call(q, k, v, _visits(q, k, mask), scale, key_lengths, modifier)
    bias = modifier.bias if isinstance(modifier, KeyBias) else None
    dq, dk, dv = (empty_like_query(x, x.shape[3]) for x in (q, k, v))
    dbias = None if bias is None else q.new_zeros(*q.shape[:2], k.shape[2], dtype=full_precision(q.dtype))
    found = Gradients(dq, dk, dv, dbias)
    for sample, kv_heads in call.parts():
        _backward_part(call, sample, kv_heads, (grad_out, grad_lse, out, lse), found)
    if bias is not None and dbias is not None:
        dbias = reduce_to_bias(dbias, bias).to(bias.dtype)
    return dq, dk, dv, dbias


def _visits(q: Tensor, k: Tensor, mask: BlockMask | None) -> Visits:
    """The lists to walk; with no tokens or heads on one side, those of rows that visit nothing."""
    if 0 in (*q.shape[:3], k.shape[2]):
        return dense_visits((q.shape[2], 0), DENSE_BLOCK, q.device)
    return dense_visits((q.shape[2], k.shape[2]), DENSE_BLOCK, q.device) if mask is None else visits_of(mask)


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call, and its cut into groups of heads."""

    q: Tensor
    k: Tensor
    v: Tensor
    visits: Visits
    scale: float
    key_lengths: Tensor | None
    modifier: Modifier | None
    workspace: Workspace = field(init=False)
    dtype: torch.dtype = field(init=False)
    limits: list[int] = field(init=False)

    def __post_init__(self) -> None:
        keys, lengths = self.k.shape[2], self.key_lengths
        limits = [keys] * self.q.shape[0] if lengths is None else lengths.clamp(0, keys).tolist()
        object.__setattr__(self, "workspace", Workspace(self.q.device))
        object.__setattr__(self, "dtype", compute_dtype(self.q.dtype, self.q.device))
        object.__setattr__(self, "limits", limits)

    def parts(self) -> Iterator[tuple[int, range]]:
        """(sample, key heads) of every group."""
        kv_heads = self.k.shape[1]
        step = -(-kv_heads // GROUPS)
        for sample in range(self.q.shape[0]):
            for first in range(0, kv_heads, step):
                yield sample, range(first, min(first + step, kv_heads))

    def query_heads(self, kv_heads: range) -> range:
        """The query heads that share these key heads."""
        shared = self.q.shape[1] // self.k.shape[1]
        return range(kv_heads.start * shared, kv_heads.stop * shared)

    def group(self, sample: int, kv_heads: range) -> Group:
        """Blocks of one group's heads."""
        heads, (block_q, block_k) = self.query_heads(kv_heads), self.visits.block
        return Group(
            visits=self.visits,
            workspace=self.workspace,
            sample=sample,
            heads=heads,
            kv_heads=kv_heads,
            q=to_blocks(self.q[sample, heads.start : heads.stop], block_q, self.dtype),
            k=to_blocks(self.k[sample, kv_heads.start : kv_heads.stop], block_k, self.dtype),
            v=to_blocks(self.v[sample, kv_heads.start : kv_heads.stop], block_k, self.dtype),
            scale=self.scale,
            length=self.limits[sample],
            kv_len=self.k.shape[2],
            modifier=self.modifier,
            features=self.q.shape[3],
            v_features=self.v.shape[3],
        )

    def pairs_at_once(self, pair_bytes: int, share: float) -> int:
        """Pairs in a chunk: what is fast here, but no more memory than a share of that of q, k and v."""
        fast = CPU_PAIRS if self.q.device.type == "cpu" else DEVICE_PAIRS
        size = self.q.nbytes + self.k.nbytes + self.v.nbytes
        return max(SMALLEST_CHUNK, min(fast, int(share * size / pair_bytes)))


# ---------------------------------------------------------------- forward


def _forward_part(call: Call, sample: int, kv_heads: range, out: Tensor, lse: Tensor) -> None:
    """Write out and lse of one group's heads; rows that visit nothing get 0 and -inf."""
    group = call.group(sample, kv_heads)
    block_q, rows = group.visits.block[0], group.q.shape[0]
    out_blocks = torch.zeros(rows, block_q * group.v_features, dtype=group.q.dtype, device=group.q.device)
    lse_blocks = torch.full((rows, block_q), -torch.inf, dtype=group.wide, device=group.q.device)
    for stretches in chunks(group.visits, sample, group.heads, call.pairs_at_once(FORWARD_BYTES, FORWARD_SHARE)):
        rows_of_chunk = stretches[0].rows
        chunk_out, chunk_lse = _attend_row(group, stretches)
        out_blocks.index_copy_(0, rows_of_chunk, chunk_out.to(out_blocks.dtype).flatten(1))
        lse_blocks.index_copy_(0, rows_of_chunk, chunk_lse)
    heads = slice(group.heads.start, group.heads.stop)
    out[sample, heads] = from_blocks(out_blocks, len(group.heads), out.shape[2], out.shape[3])
    lse[sample, heads] = lse_blocks.view(len(group.heads), -1)[:, : lse.shape[2]]


def _attend_row(group: Group, stretches: list[Chunk]) -> tuple[Tensor, Tensor]:
    """out [n, BQ, Dv] and lse [n, BQ] of a chunk's rows over all stretches of their lists."""
    q = group.rows_of(group.q, stretches[0].rows, group.features, "q")
    out, lse = _attend(group, stretches[0], q)
    for stretch in stretches[1:]:
        out, lse = _merge(out.to(group.wide), lse, *_attend(group, stretch, q))
    return out, lse


def _attend(group: Group, chunk: Chunk, q: Tensor) -> tuple[Tensor, Tensor]:
    """out [n, BQ, Dv] and lse [n, BQ] of one stretch."""
    ids = group.key_ids(chunk)
    k = group.keys_of(group.k, ids, q.shape[0], group.features, "keys")
    p, lse, empty = group.probabilities(group.scores(chunk, q, k)[0])
    v = group.keys_of(group.v, ids, q.shape[0], group.v_features, "keys")
    out = torch.bmm(group.narrow(p, "narrow"), v)
    return out.mul_(group.seen(empty, out.dtype)), lse


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over two sets of keys from the softmax over each."""
    lse = torch.logaddexp(lse_a, lse_b)
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    share_a, share_b = (torch.exp(part - safe).unsqueeze(-1) for part in (lse_a, lse_b))
    return out_a * share_a + out_b * share_b, lse


# ---------------------------------------------------------------- backward


@dataclass(frozen=True, eq=False)
class Gradients:
    """What backward fills: like q, k and v, and [B, H, Skv] sums for the bias."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None


def _backward_part(
    call: Call, sample: int, kv_heads: range, given: tuple[Tensor, Tensor | None, Tensor, Tensor], found: Gradients
) -> None:
    """Write the gradients of one group's heads; `given` is (grad_out, grad_lse, out, lse)."""
    group = call.group(sample, kv_heads)
    heads, shared = (sample, slice(group.heads.start, group.heads.stop)), (sample, slice(kv_heads.start, kv_heads.stop))
    grad_out, grad_lse, out, lse = given
    sums = GroupGradients(group, grad_out[heads], None if grad_lse is None else grad_lse[heads], out[heads], lse[heads])
    for stretches in chunks(group.visits, sample, group.heads, call.pairs_at_once(BACKWARD_BYTES, BACKWARD_SHARE)):
        sums.add_rows(stretches)
    for target, where, blocks in (
        (found.dq, heads, sums.dq),
        (found.dk, shared, sums.dk),
        (found.dv, shared, sums.dv),
    ):
        part = target[where]
        part.copy_(from_blocks(blocks, part.shape[0], part.shape[1], part.shape[2]))
    if found.dbias is not None:
        found.dbias[heads] = sums.dbias.view(len(group.heads), -1)[:, : call.k.shape[2]]


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
        # A chunk holds all of its rows' lists: dq is complete at once, dk and dv are summed over chunks.
        self.dq = torch.zeros_like(group.q)
        self.dk, self.dv = torch.zeros_like(group.k, dtype=group.wide), torch.zeros_like(group.v, dtype=group.wide)
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
            dq = part if dq is None else dq.to(group.wide).add_(part)
        assert dq is not None
        self.dq.index_copy_(0, rows, dq.flatten(1).to(self.dq.dtype))

    def _add_stretch(self, chunk: Chunk, q: Tensor, grad_out: Tensor) -> Tensor:
        """Add to dk, dv and dbias; returns dq [n, BQ, D] of these rows."""
        group, rows = self.group, chunk.rows
        ids = group.key_ids(chunk)
        k = group.keys_of(group.k, ids, rows.shape[0], group.features, "keys")
        s, factor = group.scores(chunk, q, k, keep_factor=True)
        p, lse, empty = group.probabilities(s)
        if not chunk.only or bool(empty.any()):
            p.mul_(self._share(chunk, lse, empty))
        v = group.keys_of(group.v, ids, rows.shape[0], group.v_features, "values")
        narrow_p = group.narrow(p, "narrow")
        self._add_blocks(self.dv, ids, torch.bmm(narrow_p.transpose(1, 2), grad_out))
        ds = self._score_gradient(chunk, p, grad_out, v)
        if self.dbias.numel():
            self.dbias.index_add_(0, group.bias_ids(chunk), ds.sum(1).view(-1, group.visits.block[1]))
        ds = ds if factor is None else ds.mul_(factor)
        narrow_ds = group.narrow(ds, "narrow")
        self._add_blocks(self.dk, ids, torch.bmm(narrow_ds.transpose(1, 2), q).mul_(group.scale))
        return torch.bmm(narrow_ds, k).mul_(group.scale)

    def _share(self, chunk: Chunk, lse: Tensor, empty: Tensor) -> Tensor:
        """[n, BQ, 1] factor from the stretch's softmax to the row's: 0 for rows that see nothing here."""
        if chunk.only:
            return self.group.seen(empty, lse.dtype)
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
