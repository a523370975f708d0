"""What every candidate would do to the heads of one attention call, on a sample of the queries.

For sampled queries the scores against all keys are computed once, in fp32 and a few heads at a time: numbers grow with
samples x tokens, never with the square of the tokens. From the softmax P of those scores and a pattern's rows M,

    dense  o  = P v            recall = sum(P M)
    sparse o' = (P M) v / recall        error = |o' - o|^2 summed over the sampled queries, energy = |o|^2 likewise

Selectors are run as they would be run, kernel and all, and their output is compared at the same queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce

import torch
from torch import Tensor

from sparsereel.grid import Permutation, TokenGrid
from sparsereel.patterns import AllOf, AnyOf, Full, KeepSinks, Pattern, Sink, Skip
from sparsereel.patterns.layout import Tokens
from sparsereel.plan_entries import Method
from sparsereel.selectors import SelectionContext, Selector
from sparsereel.token_order import BLOCK
from sparsereel_kernels import BlockMask, sparse_attention

#: queries looked at in one call of one layer
SAMPLES = 96
#: scores held at once
MOST_NUMBERS = 2**24
#: rows and columns of the attention picture of a head
CELLS = 32
#: columns of `Sums.shares`
SHARES = ("own_frame", "near", "first_frame", "same_place")
_GOLDEN = 0.6180339887498949


@dataclass
class Sums:
    """Sums over the sampled queries of one or more calls, fp64. H heads, C candidates.

    Attributes:
        error: [H, C] squared distance to the dense output.
        energy: [H] squared length of the dense output.
        recall: [H, C] attention mass kept.
        shares: [H, 4] attention mass by place, columns as SHARES.
        entropy: [H] of the attention of a query over the logarithm of its keys: 0 = one key, 1 = all alike.
        picture: [H, CELLS, CELLS] attention mass by parts of the sequence, queries x keys, each CELLS-th in grid order.
        density, token_density: [H, C] of what selectors chose, times `calls`; 0 for patterns, whose density is known.
        queries: [1] sampled queries, over samples of the batch.
        calls: [1] attention calls.
    """

    error: Tensor
    energy: Tensor
    recall: Tensor
    shares: Tensor
    entropy: Tensor
    picture: Tensor
    density: Tensor
    token_density: Tensor
    queries: Tensor
    calls: Tensor

    @classmethod
    def zeros(cls, heads: int, candidates: int) -> Sums:
        """Nothing seen yet."""
        wide = [(heads, candidates), (heads,), (heads, candidates), (heads, len(SHARES))]
        wide += [(heads,), (heads, CELLS, CELLS)]
        shapes = [*wide, (heads, candidates), (heads, candidates), (1,), (1,)]
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, other: Sums) -> None:
        """Add the sums of another call, in place."""
        for field in fields(self):
            getattr(self, field.name).add_(getattr(other, field.name))


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention call as the model made it.

    Args:
        q, k, v: [B, H, S, D], [B, Hkv, S, D], [B, Hkv, S, Dv], tokens in grid order.
        lengths: [B] keys that are not padding; None = all.
        scale: of the scores; None = D**-0.5.
        order: the order of tokens that selectors are to see; None = grid order.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grid: TokenGrid
    layer: int = 0
    step: int = 0
    steps: int = 1
    lengths: Tensor | None = None
    scale: float | None = None
    order: Permutation | None = None
    backend: str = "auto"


class RowMasks:
    """Rows of patterns' token masks at sampled queries, kept while grid and queries stay the same."""

    def __init__(self) -> None:
        self._key: tuple[TokenGrid, int, torch.device] | None = None
        self._rows: dict[Pattern, Tensor] = {}
        self._shares: Tensor | None = None

    def rows(self, pattern: Pattern, call: AttentionCall, queries: Tensor) -> Tensor:
        """bool [n, S], or [H, n, S] where heads differ."""
        self._renew(call, queries)
        heads = [pattern.for_head(call.layer, head) for head in range(call.q.shape[1])]
        if all(head == heads[0] for head in heads):
            return self._one(heads[0], call, queries)
        return torch.stack([self._one(head, call, queries) for head in heads])

    def places(self, call: AttentionCall, queries: Tensor) -> Tensor:
        """float [4, n, S]: which keys count for each of SHARES."""
        self._renew(call, queries)
        if self._shares is None:
            q, k = _pair(call.grid, queries)
            near = ((q.t - k.t).abs() <= 1) & ((q.h - k.h).abs() <= 1) & ((q.w - k.w).abs() <= 1)
            video = ~(q.outside | k.outside)
            found = torch.stack([q.t == k.t, near, (k.t == 0).expand_as(near), q.place == k.place]) & video
            self._shares = found.float().to(call.q.device)
        return self._shares

    def _renew(self, call: AttentionCall, queries: Tensor) -> None:
        key = (call.grid, hash(tuple(queries.tolist())), call.q.device)
        if key != self._key:
            self._key, self._rows, self._shares = key, {}, None

    def _one(self, pattern: Pattern, call: AttentionCall, queries: Tensor) -> Tensor:
        if pattern not in self._rows:
            q, k = _pair(call.grid, queries)
            rows = token_rows(pattern, call.grid, q, k).expand(len(queries), call.grid.seq_len)
            self._rows[pattern] = rows.to(call.q.device)
        return self._rows[pattern]


def token_rows(pattern: Pattern, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
    """Rows of `pattern.token_mask` for some queries: bool of the broadcast shape of q [n, 1] and k [1, S]."""
    if isinstance(pattern, KeepSinks):
        inner = pattern.pattern if grid.frames == 1 else pattern.pattern | Sink(pattern.frames)
        return token_rows(inner, grid, q, k)
    if isinstance(pattern, AnyOf):
        return reduce(torch.logical_or, (token_rows(part, grid, q, k) for part in pattern.parts))
    if isinstance(pattern, AllOf):
        rows = reduce(torch.logical_and, (token_rows(part, grid, q, k) for part in pattern.parts))
        # A query left without any key sees itself.
        return rows | (~rows.any(1, keepdim=True) & (q.index == k.index) & ~k.outside)
    return pattern.allowed(grid, q, k) | q.outside | k.outside


def _pair(grid: TokenGrid, queries: Tensor) -> tuple[Tokens, Tokens]:
    tokens = Tokens.of(grid)
    return tokens.map(lambda x: x[queries][:, None]), tokens.map(lambda x: x[None])


def sampled_queries(tokens: int, count: int, turn: int = 0) -> Tensor:
    """`count` token numbers spread evenly without a period (multiples of the golden ratio); other ones each `turn`."""
    if count >= tokens:
        return torch.arange(tokens)
    numbers = (torch.arange(count, dtype=torch.float64) + turn * count) * _GOLDEN
    return ((numbers % 1.0) * tokens).long().unique()


@torch.no_grad()
def measure(call: AttentionCall, candidates: Sequence[Method], masks: RowMasks, samples: int = SAMPLES) -> Sums:
    """Sums of one call for every candidate.

    Args:
        samples: how many queries to look at; more is steadier and slower.
    """
    batch, heads, tokens, _ = call.q.shape
    queries = sampled_queries(tokens, samples, call.step)
    sums = Sums.zeros(heads, len(candidates))
    sums.calls += 1
    outputs = [_selected(call, m, queries, c, sums) if isinstance(m, Selector) else None for c, m in _list(candidates)]
    chunk = max(1, MOST_NUMBERS // (len(queries) * tokens))
    for sample in range(batch):
        length = tokens if call.lengths is None else int(call.lengths[sample])
        valid = queries[queries < length]
        sums.queries += len(valid)
        kept = queries < length
        for first in range(0, heads, chunk):
            part = slice(first, min(heads, first + chunk))
            _compare(call, candidates, masks, outputs, queries, kept, sample, length, part, sums)
    return sums


def _list(candidates: Sequence[Method]) -> list[tuple[int, Method]]:
    return list(enumerate(candidates))


def _compare(
    call: AttentionCall,
    candidates: Sequence[Method],
    masks: RowMasks,
    outputs: Sequence[tuple[Tensor, Tensor] | None],
    queries: Tensor,
    kept: Tensor,
    sample: int,
    length: int,
    part: slice,
    sums: Sums,
) -> None:
    heads = list(range(call.q.shape[1]))[part]
    shared = [head * call.k.shape[1] // call.q.shape[1] for head in heads]
    device = call.q.device
    kept = kept.to(device)
    q = call.q[sample, heads][:, queries.to(device)].float()
    k, v = call.k[sample, shared].float(), call.v[sample, shared].float()
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    logits = q @ k.transpose(1, 2) * scale
    logits[:, :, length:] = float("-inf")
    lse = logits.logsumexp(-1)
    p = torch.exp(logits - lse[..., None])
    dense = p @ v
    weight = kept.float()[None, :, None]
    sums.energy[part] += _sum(dense.square() * weight)
    places = masks.places(call, queries)
    sums.shares[part] += torch.stack([_sum(p * place * weight) for place in places], 1)
    sums.entropy[part] += _sum(torch.special.entr(p).sum(-1, keepdim=True) * weight) / math.log(max(length, 2))
    sums.picture[part] += _pooled(p * weight, queries)
    for number, method in _list(candidates):
        if isinstance(method, Full):
            sums.recall[part, number] += kept.sum().double().cpu()
            continue
        if isinstance(method, Skip):
            sums.error[part, number] += _sum(dense.square() * weight)
            continue
        chosen = outputs[number]
        if chosen is not None:
            sparse = chosen[0][sample, heads].float()
            mass = torch.exp(chosen[1][sample, heads].float() - lse)
        else:
            rows = masks.rows(method, call, queries)  # type: ignore[arg-type]
            held = p * (rows[part] if rows.ndim == 3 else rows)
            mass = held.sum(-1)
            sparse = (held @ v) / mass.clamp_min(1e-30)[..., None]
        sums.error[part, number] += _sum((sparse - dense).square() * weight)
        sums.recall[part, number] += _sum(mass[..., None] * weight)


def _pooled(p: Tensor, queries: Tensor) -> Tensor:
    """[H, n, S] attention of sampled queries, added up in CELLS x CELLS parts of the sequence; fp64 on the CPU."""
    tokens = p.shape[-1]
    keys = (torch.arange(tokens, device=p.device) * CELLS) // tokens
    rows = ((queries * CELLS) // tokens).to(p.device)
    by_key = p.new_zeros(*p.shape[:2], CELLS).index_add_(2, keys, p)
    return p.new_zeros(len(p), CELLS, CELLS).index_add_(1, rows, by_key).double().cpu()


def _sum(x: Tensor) -> Tensor:
    """[H, n, ...] summed for each head, fp64 on the CPU."""
    return x.flatten(1).sum(1, dtype=torch.float64).cpu()


def _selected(
    call: AttentionCall, selector: Selector, queries: Tensor, number: int, sums: Sums
) -> tuple[Tensor, Tensor]:
    """Output [B, H, n, Dv] and lse [B, H, n] of a selector at the sampled queries; notes what it visits."""
    q, k, v, places = call.q, call.k, call.v, queries.to(call.q.device)
    if call.order is not None:
        indices = call.order.indices.to(q.device)
        q, k, v = q[:, :, indices], k[:, :, indices], v[:, :, indices]
        places = call.order.inverse.indices.to(q.device)[places]
    context = SelectionContext(
        grid=call.grid,
        block=BLOCK,
        scale=call.scale,
        layer=call.layer,
        step=call.step,
        steps=call.steps,
        key_lengths=call.lengths,
        order=call.order,
    )
    selection = selector(q, k, context)
    options = {"scale": call.scale, "key_lengths": call.lengths, "backend": call.backend}
    out, lse = sparse_attention(*selection.arrange(q, k, v), selection.mask, return_lse=True, **options)  # type: ignore[call-overload]
    out, lse = selection.restore(out), selection.restore(lse[..., None])[..., 0]
    _note_density(selection.mask, number, sums)
    return out[:, :, places], lse[:, :, places]


def _note_density(mask: BlockMask, number: int, sums: Sums) -> None:
    heads = int(mask.kv_num_blocks.shape[1])
    for head in range(sums.density.shape[0]):
        own = mask.head(head) if heads > 1 else mask
        sums.density[head, number] += own.density
        sums.token_density[head, number] += own.token_density
