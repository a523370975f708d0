"""Forward: online softmax over a row's lists, full blocks first and unmasked, then the partial ones.

One program owns one tile of queries of one head, so nothing is added up between programs. Logits are kept in base 2:
s2 = log2(e) * scale * q k^T. A row's list has two stretches: *clean* entries, full blocks that lie wholly inside the
sample's keys, and *edge* entries: the partial blocks, and the last full block where the keys end inside it.
"""

# Arguments of kernels are tensors of the compiler, which have no types here.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    LN2,
    LOG2E,
    bias_of_keys,
    count_below,
    filled,
    frames_of_keys,
    frames_of_queries,
    head_offset,
    load_rows,
    logits,
    modified,
    place_of,
    product,
    scale_of_keys,
    store_rows,
    where_bits,
    wide,
    zeros,
)

# Sizes that change from call to call: a kernel for every divisor of theirs would be compiled again and again.
SIZES = ["batch", "heads", "group", "q_len", "kv_len", "mask_batch", "mask_heads", "max_full", "max_part", "table_size"]


@triton.jit
def key_limit(lengths_ptr, b, kv_len, S: tl.constexpr):
    """Keys that sample b sees."""
    limit = kv_len
    if S.LENGTHS:
        limit = tl.minimum(tl.maximum(tl.load(lengths_ptr + b).to(tl.int32), 0), kv_len)
    return limit


@triton.jit
def without_cut_block(index_ptr, full, BLOCK: tl.constexpr, limit, RAGGED: tl.constexpr):
    """`full` less the last block if it reaches over `limit`; 0 where tiles reach over the end of every block."""
    if RAGGED:
        clean = full * 0
    else:
        last = tl.load(index_ptr + full - 1, mask=full > 0, other=0)
        clean = full - ((full > 0) & (wide(last + 1) * BLOCK > limit)).to(tl.int32)
    return clean


@triton.jit
def stretches(lists, row, max_full, limit, S: tl.constexpr):
    """(clean, full, partial): entries of the clean stretch, of all full ones inside `limit`, and of partial ones."""
    part = limit * 0
    if S.DENSE:
        full = tl.cdiv(limit, S.BLOCK_K)
        clean = limit // S.BLOCK_K
    else:
        index_ptr = lists.full_index + wide(row) * max_full
        full = tl.load(lists.full_count + row)
        if S.PARTIAL:
            part = tl.load(lists.part_count + row)
        if S.LENGTHS:
            full = count_below(index_ptr, full, tl.cdiv(limit, S.BLOCK_K))
        clean = without_cut_block(index_ptr, full, S.BLOCK_K, limit, S.RAGGED_K)
    return clean, full, part


@triton.jit
def clean_entry(lists, row, n, max_full, S: tl.constexpr):
    """Key block of the n-th clean entry."""
    block = n
    if not S.DENSE:
        block = tl.load(lists.full_index + wide(row) * max_full + n)
    return block


@triton.jit
def edge_entry(lists, row, n, clean, part, max_full, max_part, S: tl.constexpr):
    """(block, tile, is_partial) of the n-th edge entry: partial blocks first, then the cut full ones."""
    is_partial = n < part
    tile = n * 0
    if S.DENSE:
        block = clean + n
    else:
        full_ptr = lists.full_index + wide(row) * max_full + clean + (n - part)
        block = tl.load(full_ptr, mask=n >= part, other=0)
        if S.PARTIAL:
            at = wide(row) * max_part + n
            block += tl.load(lists.part_index + at, mask=is_partial, other=0)
            tile = tl.load(lists.part_tile + at, mask=is_partial, other=0)
    return block, tile, is_partial


@triton.jit
def where_allowed(b_x, otherwise, edge, start, limit, S: tl.constexpr):
    """b_x [TILE_M, TILE_N] where an edge entry's tile allows the pair, else `otherwise`; `edge` as in `where_bits`."""
    offs_n = tl.arange(0, S.TILE_N)
    seen = start + offs_n < limit
    if S.RAGGED_K:
        seen = seen & (edge[4] + offs_n < S.BLOCK_K)
    b_x = tl.where(seen[None, :], b_x, otherwise)
    if S.PARTIAL:
        b_x = where_bits(b_x, otherwise, edge, S, False)
    return b_x


@triton.jit
def softmax_step(b_s, peak, total):
    """Weights of one tile of logits under the new row maximum, that maximum, the sum, and how the old sum shrinks."""
    new_peak = tl.maximum(peak, tl.max(b_s, 1))
    # A row that has seen no key yet has the maximum -inf, and -inf - -inf is NaN.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    b_p = tl.exp2(b_s - base[:, None])
    shrink = tl.exp2(peak - base)
    return b_p, new_peak, total * shrink + tl.sum(b_p, 1), shrink


@triton.jit
def plain_softmax_step(b_s, scale, peak, total, S: tl.constexpr):
    """The same for unscaled logits of a clean tile without modifier: the scale goes into the exponential's FMA."""
    tile_peak = tl.max(b_s, 1) if S.POSITIVE else tl.min(b_s, 1)
    new_peak = tl.maximum(peak, tile_peak * scale)
    b_p = tl.exp2(b_s * scale - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    return b_p, new_peak, total * shrink + tl.sum(b_p, 1), shrink


@triton.jit
def attend_to_tile(state, b_q, k, v, bases, k_scales, b, h, kv_h, start, limit, scale, edge, modifying, frame_q,
                   kv_len, table_size, EDGE: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """One tile of keys: the new (acc, peak, total). `edge`: as in `where_bits`, of an edge entry."""
    acc, peak, total = state
    b_k = load_rows(k, bases[0], b, kv_h, start, limit, S.TILE_N, S.D, S.WIDTH, EDGE, S.TMA, S)
    b_s = logits(b_q, b_k, S)
    scale = scale_of_keys(k_scales, start, scale, S)
    if EDGE or S.MODIFIER != "none":
        offs_n = start + tl.arange(0, S.TILE_N)
        frame_k = frames_of_keys(modifying, offs_n, kv_len, S)
        bias = bias_of_keys(modifying, b, h, offs_n, kv_len, S)
        b_s, _ = modified(b_s * scale, modifying, frame_q[:, None], frame_k[None, :], bias[None, :], table_size, S)
        if EDGE:
            # Looked up after the product, so that it holds no registers meanwhile.
            b_s = where_allowed(b_s, float("-inf"), edge, start, limit, S)
        b_p, peak, total, shrink = softmax_step(b_s, peak, total)
    else:
        b_p, peak, total, shrink = plain_softmax_step(b_s, scale, peak, total, S)
    b_v = load_rows(v, bases[1], b, kv_h, start, limit, S.TILE_N, S.DV, S.V_WIDTH, EDGE, S.TMA, S)
    if EDGE and S.LENGTHS and S.TMA:
        # Padded values may hold anything, also NaN, which a weight of 0 would let through.
        b_v = tl.where((start + tl.arange(0, S.TILE_N) < limit)[:, None], b_v, 0.0)
    acc = product(b_p.to(b_v.dtype), b_v, acc * shrink[:, None], S)
    return acc, peak, total


@triton.jit(do_not_specialize=[*SIZES, "q_blocks"])
def forward_kernel(q, k, v, out, lse_ptr, scales, lists, lengths_ptr, modifying, scale, batch, heads, group, q_len,
                   kv_len, q_blocks, mask_batch, mask_heads, max_full, max_part, table_size,
                   S: tl.constexpr):  # fmt: skip
    """out and lse of one tile of queries (of one part of its list if SPLITS > 1; merge_kernel then joins the parts)."""
    pid = tl.program_id(0)
    split = pid % S.SPLITS
    unit = pid // S.SPLITS
    b, h, i = place_of(unit // S.TILES_Q, lists.order, mask_batch * mask_heads * q_blocks, q_blocks, mask_heads, heads)
    kv_h = h // group
    row = (tl.minimum(b, mask_batch - 1) * mask_heads + tl.minimum(h, mask_heads - 1)) * q_blocks + i
    row_in_block = (unit % S.TILES_Q) * S.TILE_M + tl.arange(0, S.TILE_M)
    first = i * S.BLOCK_Q + (unit % S.TILES_Q) * S.TILE_M
    offs_m = first + tl.arange(0, S.TILE_M)
    limit = key_limit(lengths_ptr, b, kv_len, S)
    b_q = load_rows(q, head_offset(q, b, h, S), b, h, first, q_len, S.TILE_M, S.D, S.WIDTH, True, False, S)
    frame_q = frames_of_queries(modifying, offs_m, q_len, S)
    bases = (0, 0) if S.TMA else (head_offset(k, b, kv_h, S), head_offset(v, b, kv_h, S))
    k_scales = scales.k
    if S.INT8:
        at_q = (wide(b) * heads + h) * (q_blocks * S.TILES_Q) + i * S.TILES_Q + unit % S.TILES_Q
        scale = scale * tl.load(scales.q + at_q)
        k_scales += (wide(b) * (heads // group) + kv_h) * (tl.cdiv(kv_len, S.BLOCK_K) * S.TILES_K)
    acc = zeros(S.TILE_M, S.V_WIDTH)
    peak = filled(S.TILE_M, float("-inf"))
    total = filled(S.TILE_M, 0.0)
    clean, full, part = stretches(lists, row, max_full, limit, S)
    tiles = clean * S.TILES_K
    for t in tl.range(tiles * split // S.SPLITS, tiles * (split + 1) // S.SPLITS):
        start = clean_entry(lists, row, t // S.TILES_K, max_full, S) * S.BLOCK_K + (t % S.TILES_K) * S.TILE_N
        acc, peak, total = attend_to_tile((acc, peak, total), b_q, k, v, bases, k_scales, b, h, kv_h, start, limit,
                                          scale, None, modifying, frame_q, kv_len, table_size, False, S)  # fmt: skip
    tiles = (part + full - clean) * S.TILES_K
    for t in tl.range(tiles * split // S.SPLITS, tiles * (split + 1) // S.SPLITS):
        j, tile, is_partial = edge_entry(lists, row, t // S.TILES_K, clean, part, max_full, max_part, S)
        first_column = (t % S.TILES_K) * S.TILE_N
        start = j * S.BLOCK_K + first_column
        edge = (lists.bits, tile, is_partial, row_in_block, first_column)
        acc, peak, total = attend_to_tile((acc, peak, total), b_q, k, v, bases, k_scales, b, h, kv_h, start, limit,
                                          scale, edge, modifying, frame_q, kv_len, table_size, True, S)  # fmt: skip
    seen = total > 0
    b_out = tl.where(seen[:, None], acc / tl.where(seen, total, 1.0)[:, None], 0.0)
    b_lse = tl.where(seen, (peak + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))
    ok = (row_in_block < S.BLOCK_Q) & (offs_m < q_len)
    # Parts lie one after the other as further samples.
    at = b + split * batch
    store_rows(out, head_offset(out, at, h, S), first, b_out, ok, S.TILE_M, S.DV, S.V_WIDTH, S)
    tl.store(lse_ptr + (wide(at) * heads + h) * q_len + offs_m, b_lse, mask=ok)


@triton.jit(do_not_specialize=["batch", "heads", "q_len"])
def merge_kernel(parts, part_lse_ptr, out, lse_ptr, batch, heads, q_len, S: tl.constexpr):
    """Joins the parts of rows whose lists were cut: softmax over all keys from the softmax over each part's."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(q_len, S.TILE_M)
    first = (pid % tiles) * S.TILE_M
    h = (pid // tiles) % heads
    b = pid // (tiles * heads)
    offs_m = first + tl.arange(0, S.TILE_M)
    ok = offs_m < q_len
    acc = zeros(S.TILE_M, S.V_WIDTH)
    peak = filled(S.TILE_M, float("-inf"))
    total = filled(S.TILE_M, 0.0)
    for part in tl.range(0, S.SPLITS):
        at = b + part * batch
        b_lse = tl.load(part_lse_ptr + (wide(at) * heads + h) * q_len + offs_m, mask=ok, other=float("-inf")) * LOG2E
        b_part = load_rows(
            parts, head_offset(parts, at, h, S), at, h, first, q_len, S.TILE_M, S.DV, S.V_WIDTH, True, False, S
        )
        new_peak = tl.maximum(peak, b_lse)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight, shrink = tl.exp2(b_lse - base), tl.exp2(peak - base)
        acc = acc * shrink[:, None] + b_part * weight[:, None]
        total = total * shrink + weight
        peak = new_peak
    seen = total > 0
    b_out = tl.where(seen[:, None], acc / tl.where(seen, total, 1.0)[:, None], 0.0)
    b_lse = tl.where(seen, (peak + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))
    store_rows(out, head_offset(out, b, h, S), first, b_out, ok, S.TILE_M, S.DV, S.V_WIDTH, S)
    tl.store(lse_ptr + (wide(b) * heads + h) * q_len + offs_m, b_lse, mask=ok)
