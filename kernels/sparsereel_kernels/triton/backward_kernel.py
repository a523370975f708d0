"""Backward: two passes that work the probabilities out again, without atomics.

With p = exp(s - lse), dp = grad_out v^T and delta = sum_d(grad_out * out) - grad_lse, the gradient of a logit is
ds = p * (dp - delta). `query_gradient_kernel` owns a tile of queries and walks the lists of forward;
`key_gradient_kernel` owns a tile of keys and walks the transposed lists of every query head that shares it, with
logits transposed ([keys, queries]) so that both of its sums are plain products.
"""

# Arguments of kernels are tensors of the compiler, which have no types here.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from .forward_kernel import SIZES, clean_entry, edge_entry, key_limit, stretches, where_allowed, without_cut_block
from .primitives import (
    LOG2E,
    bias_of_keys,
    filled,
    frames_of_keys,
    frames_of_queries,
    head_offset,
    load_rows,
    modified,
    place_of,
    product,
    store_rows,
    where_bits,
    wide,
    zeros,
)


@triton.jit(do_not_specialize=["heads", "q_len"])
def delta_kernel(out, grad_out, grad_lse_ptr, delta_ptr, heads, q_len, S: tl.constexpr):
    """delta = sum_d(grad_out * out) - grad_lse of one tile of queries."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(q_len, S.TILE_M)
    first = (pid % tiles) * S.TILE_M
    h = (pid // tiles) % heads
    b = pid // (tiles * heads)
    offs_m = first + tl.arange(0, S.TILE_M)
    base, grad_base = head_offset(out, b, h, S), head_offset(grad_out, b, h, S)
    b_out = load_rows(out, base, b, h, first, q_len, S.TILE_M, S.DV, S.V_WIDTH, True, False, S)
    b_do = load_rows(grad_out, grad_base, b, h, first, q_len, S.TILE_M, S.DV, S.V_WIDTH, True, False, S)
    delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    at = (wide(b) * heads + h) * q_len + offs_m
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + at, mask=offs_m < q_len, other=0.0)
    tl.store(delta_ptr + at, delta, mask=offs_m < q_len)


@triton.jit
def load_lse(lse_ptr, base, offs_m, ok):
    """lse in base 2; rows that see nothing, and those outside, get +inf: their probabilities become 0."""
    lse = tl.load(lse_ptr + base + offs_m, mask=ok, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def probabilities(b_s, scale, lse, modifying, frame_q, frame_k, bias, table_size, S: tl.constexpr):
    """p and the modifier's factor; lse, frames and bias are already expanded to the orientation of b_s."""
    b_s, factor = modified(b_s * scale, modifying, frame_q, frame_k, bias, table_size, S)
    return tl.exp2(b_s - lse), factor


# ---------------------------------------------------------------- queries


@triton.jit
def query_gradient_of_tile(acc, b_q, b_do, lse, delta, k, v, bases, b, h, kv_h, start, limit, scale, edge,
                           modifying, frame_q, kv_len, table_size, EDGE: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """acc plus one tile of keys' part of dq / scale."""
    b_k = load_rows(k, bases[0], b, kv_h, start, limit, S.TILE_N, S.D, S.WIDTH, EDGE, S.TMA, S)
    b_v = load_rows(v, bases[1], b, kv_h, start, limit, S.TILE_N, S.DV, S.V_WIDTH, EDGE, S.TMA, S)
    offs_n = start + tl.arange(0, S.TILE_N)
    if EDGE and S.LENGTHS and S.TMA:
        # Padded keys and values may hold anything, also NaN, which a weight of 0 would let through.
        b_k = tl.where((offs_n < limit)[:, None], b_k, 0.0)
        b_v = tl.where((offs_n < limit)[:, None], b_v, 0.0)
    b_s = product(b_q, tl.trans(b_k), None, S)  # [TILE_M, TILE_N]
    frame_k = frames_of_keys(modifying, offs_n, kv_len, S)[None, :]
    bias = bias_of_keys(modifying, b, h, offs_n, kv_len, S)[None, :]
    b_p, factor = probabilities(b_s, scale, lse[:, None], modifying, frame_q[:, None], frame_k, bias, table_size, S)
    if EDGE:
        b_p = where_allowed(b_p, 0.0, edge, start, limit, S)
    b_dp = product(b_do, tl.trans(b_v), None, S)
    b_ds = b_p * (b_dp - delta[:, None]) * factor
    return product(b_ds.to(b_k.dtype), b_k, acc, S)


@triton.jit(do_not_specialize=[*SIZES, "q_blocks"])
def query_gradient_kernel(q, k, v, grad_out, dq, lse_ptr, delta_ptr, lists, lengths_ptr, modifying, scale,
                          natural_scale, batch, heads, group, q_len, kv_len, q_blocks, mask_batch, mask_heads,
                          max_full, max_part, table_size, S: tl.constexpr):  # fmt: skip
    """dq of one tile of queries."""
    unit = tl.program_id(0)
    b, h, i = place_of(unit // S.TILES_Q, lists.order, mask_batch * mask_heads * q_blocks, q_blocks, mask_heads, heads)
    kv_h = h // group
    row = (tl.minimum(b, mask_batch - 1) * mask_heads + tl.minimum(h, mask_heads - 1)) * q_blocks + i
    row_in_block = (unit % S.TILES_Q) * S.TILE_M + tl.arange(0, S.TILE_M)
    first = i * S.BLOCK_Q + (unit % S.TILES_Q) * S.TILE_M
    offs_m = first + tl.arange(0, S.TILE_M)
    ok = (row_in_block < S.BLOCK_Q) & (offs_m < q_len)
    limit = key_limit(lengths_ptr, b, kv_len, S)
    b_q = load_rows(q, head_offset(q, b, h, S), b, h, first, q_len, S.TILE_M, S.D, S.WIDTH, True, False, S)
    grad_base = head_offset(grad_out, b, h, S)
    b_do = load_rows(grad_out, grad_base, b, h, first, q_len, S.TILE_M, S.DV, S.V_WIDTH, True, False, S)
    row_base = (wide(b) * heads + h) * q_len
    lse = load_lse(lse_ptr, row_base, offs_m, ok)
    delta = tl.load(delta_ptr + row_base + offs_m, mask=ok, other=0.0)
    frame_q = frames_of_queries(modifying, offs_m, q_len, S)
    bases = (0, 0) if S.TMA else (head_offset(k, b, kv_h, S), head_offset(v, b, kv_h, S))
    acc = zeros(S.TILE_M, S.WIDTH)
    clean, full, part = stretches(lists, row, max_full, limit, S)
    for t in tl.range(0, clean * S.TILES_K):
        start = clean_entry(lists, row, t // S.TILES_K, max_full, S) * S.BLOCK_K + (t % S.TILES_K) * S.TILE_N
        acc = query_gradient_of_tile(acc, b_q, b_do, lse, delta, k, v, bases, b, h, kv_h, start, limit, scale, None,
                                     modifying, frame_q, kv_len, table_size, False, S)  # fmt: skip
    for t in tl.range(0, (part + full - clean) * S.TILES_K):
        j, tile, is_partial = edge_entry(lists, row, t // S.TILES_K, clean, part, max_full, max_part, S)
        first_column = (t % S.TILES_K) * S.TILE_N
        start = j * S.BLOCK_K + first_column
        edge = (lists.bits, tile, is_partial, row_in_block, first_column)
        acc = query_gradient_of_tile(acc, b_q, b_do, lse, delta, k, v, bases, b, h, kv_h, start, limit, scale, edge,
                                     modifying, frame_q, kv_len, table_size, True, S)  # fmt: skip
    store_rows(dq, head_offset(dq, b, h, S), first, acc * natural_scale, ok, S.TILE_M, S.D, S.WIDTH, S)


# ---------------------------------------------------------------- keys


@triton.jit
def query_stretches(lists, row, max_full, q_len, S: tl.constexpr):
    """(clean, full, partial): as `stretches`, of a key block's list of query blocks."""
    part = q_len * 0
    if S.DENSE:
        full = tl.cdiv(q_len, S.BLOCK_Q)
        clean = q_len // S.BLOCK_Q
    else:
        full = tl.load(lists.full_count + row)
        if S.PARTIAL:
            part = tl.load(lists.part_count + row)
        clean = without_cut_block(lists.full_index + wide(row) * max_full, full, S.BLOCK_Q, q_len, S.RAGGED_Q)
    return clean, full, part


@triton.jit
def key_gradients_of_tile(state, b_k, b_v, q, grad_out, bases, b, h, start, ok, lse_ptr, delta_ptr, row_base, q_len,
                          scale, edge, modifying, frame_k, bias, table_size, EDGE: tl.constexpr,
                          S: tl.constexpr):  # fmt: skip
    """(dk / scale, dv, dbias) plus one tile of queries' part; logits are [TILE_N, TILE_M]."""
    dk, dv, dbias = state
    offs_m = start + tl.arange(0, S.TILE_M)
    b_q = load_rows(q, bases[0], b, h, start, q_len, S.TILE_M, S.D, S.WIDTH, EDGE, S.TMA, S)
    b_do = load_rows(grad_out, bases[1], b, h, start, q_len, S.TILE_M, S.DV, S.V_WIDTH, EDGE, S.TMA, S)
    lse = load_lse(lse_ptr, row_base, offs_m, ok)[None, :]
    delta = tl.load(delta_ptr + row_base + offs_m, mask=ok, other=0.0)[None, :]
    b_s = product(b_k, tl.trans(b_q), None, S)
    frame_q = frames_of_queries(modifying, offs_m, q_len, S)[None, :]
    b_p, factor = probabilities(b_s, scale, lse, modifying, frame_q, frame_k[:, None], bias[:, None], table_size, S)
    if EDGE and S.PARTIAL:
        b_p = where_bits(b_p, 0.0, edge, S, True)
    dv = product(b_p.to(b_do.dtype), b_do, dv, S)
    b_dp = product(b_v, tl.trans(b_do), None, S)
    b_ds = b_p * (b_dp - delta)
    if S.MODIFIER == "key_bias":
        dbias += tl.sum(b_ds, 1)
    dk = product((b_ds * factor).to(b_q.dtype), b_q, dk, S)
    return dk, dv, dbias


@triton.jit
def key_gradients_of_head(state, b_k, b_v, q, grad_out, b, h, row, lists, lse_ptr, delta_ptr, heads, q_len, scale,
                          first_column, modifying, frame_k, bias, max_full, max_part, table_size,
                          S: tl.constexpr):  # fmt: skip
    """(dk / scale, dv, dbias) plus the part of all queries of one head."""
    dk, dv, dbias = state
    bases = (0, 0) if S.TMA else (head_offset(q, b, h, S), head_offset(grad_out, b, h, S))
    row_base = (wide(b) * heads + h) * q_len
    clean, full, part = query_stretches(lists, row, max_full, q_len, S)
    for t in tl.range(0, clean * S.TILES_Q):
        start = clean_entry(lists, row, t // S.TILES_Q, max_full, S) * S.BLOCK_Q + (t % S.TILES_Q) * S.TILE_M
        ok = start + tl.arange(0, S.TILE_M) < q_len
        dk, dv, dbias = key_gradients_of_tile(
            (dk, dv, dbias), b_k, b_v, q, grad_out, bases, b, h, start, ok, lse_ptr, delta_ptr, row_base, q_len,
            scale, None, modifying, frame_k, bias, table_size, False, S)  # fmt: skip
    for t in tl.range(0, (part + full - clean) * S.TILES_Q):
        i, tile, is_partial = edge_entry(lists, row, t // S.TILES_Q, clean, part, max_full, max_part, S)
        row_in_block = (t % S.TILES_Q) * S.TILE_M + tl.arange(0, S.TILE_M)
        start = i * S.BLOCK_Q + (t % S.TILES_Q) * S.TILE_M
        ok = (row_in_block < S.BLOCK_Q) & (i * S.BLOCK_Q + row_in_block < q_len)
        edge = (lists.bits, tile, is_partial, row_in_block, first_column)
        dk, dv, dbias = key_gradients_of_tile(
            (dk, dv, dbias), b_k, b_v, q, grad_out, bases, b, h, start, ok, lse_ptr, delta_ptr, row_base, q_len,
            scale, edge, modifying, frame_k, bias, table_size, True, S)  # fmt: skip
    return dk, dv, dbias


@triton.jit(do_not_specialize=[*SIZES, "k_blocks"])
def key_gradient_kernel(q, k, v, grad_out, dk, dv, dbias_ptr, lse_ptr, delta_ptr, lists, lengths_ptr, modifying, scale,
                        natural_scale, batch, heads, group, q_len, kv_len, k_blocks, mask_batch, mask_heads, max_full,
                        max_part, table_size, S: tl.constexpr):  # fmt: skip
    """dk and dv of one tile of keys, and the bias' gradient by query head."""
    unit = tl.program_id(0)
    # Rows of work are those of the mask, or one for every `group` of its heads.
    mask_groups = tl.where(mask_heads == 1, 1, heads // group)
    units = mask_batch * mask_groups * k_blocks
    b, kv_h, j = place_of(unit // S.TILES_K, lists.order, units, k_blocks, mask_groups, heads // group)
    first_column = (unit % S.TILES_K) * S.TILE_N
    start = j * S.BLOCK_K + first_column
    offs_n = start + tl.arange(0, S.TILE_N)
    limit = key_limit(lengths_ptr, b, kv_len, S)
    in_block = (first_column + tl.arange(0, S.TILE_N) < S.BLOCK_K) & (offs_n < kv_len)
    seen = (offs_n < limit)[:, None]
    b_k = load_rows(k, head_offset(k, b, kv_h, S), b, kv_h, start, limit, S.TILE_N, S.D, S.WIDTH, True, False, S)
    b_v = load_rows(v, head_offset(v, b, kv_h, S), b, kv_h, start, limit, S.TILE_N, S.DV, S.V_WIDTH, True, False, S)
    frame_k = frames_of_keys(modifying, offs_n, kv_len, S)
    acc_k = zeros(S.TILE_N, S.WIDTH)
    acc_v = zeros(S.TILE_N, S.V_WIDTH)
    for n in tl.range(0, group):
        h = kv_h * group + n
        row = (tl.minimum(b, mask_batch - 1) * mask_heads + tl.minimum(h, mask_heads - 1)) * k_blocks + j
        bias = bias_of_keys(modifying, b, h, offs_n, kv_len, S)
        acc_k, acc_v, acc_bias = key_gradients_of_head(
            (acc_k, acc_v, filled(S.TILE_N, 0.0)), b_k, b_v, q, grad_out, b, h, row, lists, lse_ptr,
            delta_ptr, heads, q_len, scale, first_column, modifying, frame_k, bias, max_full, max_part, table_size,
            S)  # fmt: skip
        if S.MODIFIER == "key_bias":
            at = (wide(b) * heads + h) * kv_len + offs_n
            tl.store(dbias_ptr + at, tl.where(offs_n < limit, acc_bias, 0.0), mask=in_block)
    # A key that the sample does not see may have collected anything: its logits were not masked above.
    acc_k = tl.where(seen, acc_k * natural_scale, 0.0)
    store_rows(dk, head_offset(dk, b, kv_h, S), start, acc_k, in_block, S.TILE_N, S.D, S.WIDTH, S)
    acc_v = tl.where(seen, acc_v, 0.0)
    store_rows(dv, head_offset(dv, b, kv_h, S), start, acc_v, in_block, S.TILE_N, S.DV, S.V_WIDTH, S)
