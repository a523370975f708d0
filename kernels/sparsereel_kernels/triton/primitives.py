"""Pieces that the kernels share: what a launch hands over, where tiles lie, loads, the packed bits, the modifiers.

Names: `_ptr` a pointer, `b_` a tile in registers, `offs_` offsets, capitals for compile-time sizes. A *block* is the
mask's unit, a *tile* the kernel's; a block is walked in one or more tiles of its own, so that a tile never reaches
into the next block's part of the lists.

Offsets. Sample, head and first row of a tile are multiplied by their strides in 64 bits; inside a tile 32 bits are
enough (the launcher copies tensors whose token stride would make them overflow).
"""

# Arguments of kernels are tensors of the compiler, which have no types here.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class View(NamedTuple):
    """A tensor [B, H, S, D] with unit stride in D: its address and strides (in steps)."""

    ptr: Any
    batch: Any
    head: Any
    token: Any


class Lists(NamedTuple):
    """Full and partial entries of every row of blocks. `order`: the rows from the dearest to the cheapest."""

    order: Any
    full_count: Any
    full_index: Any
    part_count: Any
    part_index: Any
    part_tile: Any
    bits: Any


class Modifying(NamedTuple):
    """The modifier's tensors (None where it has none) and the strides of the bias (0 where it is shared)."""

    frame_of_q: Any
    frame_of_k: Any
    table: Any
    bias: Any
    bias_batch: Any
    bias_head: Any


class Scales(NamedTuple):
    """What the bytes of quantised queries and keys stand for: [B, H, tiles] fp32, a factor for every tile of rows."""

    q: Any
    k: Any


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for.

    Attributes:
        BLOCK_Q, BLOCK_K: the mask's block (of a dense call: the tile).
        TILE_M, TILE_N: queries and keys of a tile, powers of two.
        D, DV: features of q and k, and of v.
        WIDTH, V_WIDTH: the same, padded to powers of two.
        DENSE: no mask. PARTIAL: the mask has partial blocks. LENGTHS: keys are cut per sample.
        WORD: bits of a word of the packed tiles.
        MODIFIER: "none", "frame_decay" or "key_bias".
        POSITIVE: the scale is at least 0.
        TMA: keys and values (backward over keys: queries and gradients) come through descriptors.
        PRECISION: of products of fp32: "ieee" or "tf32"; "interpreter" where Triton's interpreter runs the kernel,
            which cannot multiply bf16.
        STEP: elements that strides are counted in, so that the compiler knows their common factor.
        SPLITS: parts into which a row's list is cut.
        INT8: q and k are int8 with a scale a tile; forward only.
    """

    BLOCK_Q: int
    BLOCK_K: int
    TILE_M: int
    TILE_N: int
    D: int
    DV: int
    WIDTH: int
    V_WIDTH: int
    DENSE: bool
    PARTIAL: bool
    LENGTHS: bool
    WORD: int
    MODIFIER: str
    POSITIVE: bool
    TMA: bool
    PRECISION: str
    STEP: int
    SPLITS: int = 1
    INT8: bool = False

    @property
    def TILES_Q(self) -> int:
        """Tiles of a query block."""
        return -(-self.BLOCK_Q // self.TILE_M)

    @property
    def TILES_K(self) -> int:
        """Tiles of a key block."""
        return -(-self.BLOCK_K // self.TILE_N)

    @property
    def RAGGED_Q(self) -> bool:
        """Whether the last tile of a query block reaches over its end."""
        return self.BLOCK_Q % self.TILE_M != 0

    @property
    def RAGGED_K(self) -> bool:
        """Whether the last tile of a key block reaches over its end."""
        return self.BLOCK_K % self.TILE_N != 0

    @property
    def WORDS(self) -> int:
        """Words in a row of a packed tile."""
        return self.BLOCK_K // self.WORD


# ---------------------------------------------------------------- where things lie


@triton.jit
def wide(x):
    return tl.cast(x, tl.int64)


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """fp32 [ROWS, COLUMNS]. (Triton 3.5 takes members of S as a shape only through such arguments.)"""
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def filled(ROWS: tl.constexpr, VALUE: tl.constexpr):
    """fp32 [ROWS]."""
    return tl.full([ROWS], VALUE, tl.float32)


@triton.jit
def head_offset(view, b, h, S: tl.constexpr):
    """Where head h of sample b begins, in elements, 64 bits."""
    return (wide(b) * view.batch + wide(h) * view.head) * S.STEP


@triton.jit
def place_of(unit, order_ptr, units, blocks, mask_heads, heads):
    """(sample, head, block) of a unit of work: rows of the mask in their order, once for every head that shares it."""
    repeat = unit // units
    row = unit % units
    if order_ptr is not None:
        row = tl.load(order_ptr + row)
    shared = heads // mask_heads
    h = (row // blocks) % mask_heads + repeat % shared
    b = row // (blocks * mask_heads) + repeat // shared
    return b, h, row % blocks


@triton.jit
def count_below(index_ptr, count, bound):
    """How many of `count` ascending indices are below `bound`: lists are cut at a sample's key length."""
    low = count * 0
    high = count
    while low < high:
        middle = (low + high) // 2
        if tl.load(index_ptr + middle) < bound:
            low = middle + 1
        else:
            high = middle
    return low


# ---------------------------------------------------------------- loads and products


@triton.jit
def row_ptrs(view, base, start, TILE: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr):
    """Addresses [TILE, WIDTH] of the rows from `start` on; `base` is `head_offset`."""
    offs_row = tl.arange(0, TILE)[:, None] * (view.token * S.STEP)
    return view.ptr + (base + wide(start) * view.token * S.STEP) + (offs_row + tl.arange(0, WIDTH)[None, :])


@triton.jit
def load_rows(view, base, b, h, start, end, TILE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
              CUT: tl.constexpr, TMA: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """Rows start .. start + TILE of one head, [TILE, WIDTH], 0 past `end` (looked at only if CUT) and past D.

    With TMA, `view` is a descriptor, which fills what lies outside the tensor with 0 itself.
    """
    if TMA:
        b_x = view.load([b, h, start, 0]).reshape(TILE, WIDTH)
    else:
        ptrs = row_ptrs(view, base, start, TILE, WIDTH, S)
        inside = (tl.arange(0, WIDTH) < D)[None, :]
        if CUT:
            inside = inside & (start + tl.arange(0, TILE) < end)[:, None]
        if CUT or D < WIDTH:
            b_x = tl.load(ptrs, mask=inside, other=0.0)
        else:
            b_x = tl.load(ptrs)
    return b_x


@triton.jit
def store_rows(view, base, start, b_x, ok, TILE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
               S: tl.constexpr):  # fmt: skip
    """Store [TILE, WIDTH] from row `start` on, where `ok` [TILE] and the feature is below D."""
    ptrs = row_ptrs(view, base, start, TILE, WIDTH, S)
    tl.store(ptrs, b_x.to(view.ptr.dtype.element_ty), mask=ok[:, None] & (tl.arange(0, WIDTH) < D)[None, :])


@triton.jit
def product(b_x, b_y, acc, S: tl.constexpr):
    """acc + b_x b_y, added in fp32. `acc` None starts from 0."""
    if S.PRECISION == "interpreter":
        b_z = tl.dot(b_x.to(tl.float32), b_y.to(tl.float32), acc, input_precision="ieee")
    else:
        b_z = tl.dot(b_x, b_y, acc, input_precision=S.PRECISION)
    return b_z


@triton.jit
def logits(b_q, b_k, S: tl.constexpr):
    """b_q b_k^T, [TILE_M, TILE_N] fp32; of bytes, exactly, in int32."""
    if S.INT8 and S.PRECISION != "interpreter":
        b_s = tl.dot(b_q, tl.trans(b_k), out_dtype=tl.int32).to(tl.float32)
    else:
        b_s = product(b_q, tl.trans(b_k), None, S)
    return b_s


@triton.jit
def scale_of_keys(scales_ptr, start, scale, S: tl.constexpr):
    """`scale` times what the bytes of the tile of keys from `start` on stand for; `scale` itself without INT8."""
    if S.INT8:
        scale = scale * tl.load(scales_ptr + (start // S.BLOCK_K) * S.TILES_K + (start % S.BLOCK_K) // S.TILE_N)
    return scale


# ---------------------------------------------------------------- partial blocks


@triton.jit
def where_bits(b_x, otherwise, edge, S: tl.constexpr, FLIPPED: tl.constexpr):
    """b_x [TILE_M, TILE_N] ([TILE_N, TILE_M] if FLIPPED) where the packed bits allow the pair, else `otherwise`.

    `edge`: (bits, tile, is_partial, row, first_column); `row` [TILE_M] is counted from the block's first query,
    `first_column` from its first key. Entries that are not partial allow everything. A thread reads one word for each
    of its rows and shifts it, so that bits cost as many loads as there are words; words are applied one by one, so
    that no tile of words fills the registers.
    """
    bits_ptr, tile, is_partial, row, first_column = edge
    axis: tl.constexpr = 0 if FLIPPED else 1
    offs_column = tl.expand_dims(tl.arange(0, S.TILE_N), 1 - axis)
    ptrs = bits_ptr + wide(tile) * (S.BLOCK_Q * S.WORDS) + row * S.WORDS + first_column // S.WORD
    words: tl.constexpr = S.TILE_N // S.WORD
    for n in tl.static_range(words):
        there = (row < S.BLOCK_Q) & is_partial & (first_column // S.WORD + n < S.WORDS)
        word = tl.expand_dims(tl.load(ptrs + n, mask=there, other=-1).to(tl.int32), axis)
        allowed = ((word >> (offs_column % S.WORD)) & 1) != 0
        if S.TILE_N > S.WORD:
            allowed = allowed | (offs_column // S.WORD != n)
        b_x = tl.where(allowed, b_x, otherwise)
    return b_x


# ---------------------------------------------------------------- modifiers


@triton.jit
def decay_of(modifying, frame_q, frame_k, table_size):
    """FrameDecay's factor of positive logits, by broadcasting `frame_q` against `frame_k`; 1 where either is text."""
    distance = tl.minimum(tl.abs(frame_q - frame_k), table_size - 1)
    text = (frame_q < 0) | (frame_k < 0)
    return tl.load(modifying.table + distance, mask=~text, other=1.0)


@triton.jit
def frames_of_queries(modifying, offs_row, q_len, S: tl.constexpr):
    """Frame of each query, -1 past the end; meaningless where there is no FrameDecay."""
    frame = offs_row
    if S.MODIFIER == "frame_decay":
        frame = tl.load(modifying.frame_of_q + offs_row, mask=offs_row < q_len, other=-1)
    return frame


@triton.jit
def frames_of_keys(modifying, offs_column, kv_len, S: tl.constexpr):
    """Frame of each key, -1 past the end; meaningless where there is no FrameDecay."""
    frame = offs_column
    if S.MODIFIER == "frame_decay":
        frame = tl.load(modifying.frame_of_k + offs_column, mask=offs_column < kv_len, other=-1)
    return frame


@triton.jit
def bias_of_keys(modifying, b, h, offs_column, kv_len, S: tl.constexpr):
    """KeyBias of each key times log2(e), 0 past the end; meaningless where there is no KeyBias."""
    bias = offs_column
    if S.MODIFIER == "key_bias":
        base = modifying.bias + (wide(b) * modifying.bias_batch + wide(h) * modifying.bias_head)
        bias = tl.load(base + offs_column, mask=offs_column < kv_len, other=0.0) * LOG2E
    return bias


@triton.jit
def modified(b_s, modifying, frame_q, frame_k, bias, table_size, S: tl.constexpr):
    """Logits (base 2) after the modifier, and the factor that reached them (1 but for FrameDecay).

    frame_q, frame_k and bias are already expanded to the orientation of b_s.
    """
    factor = 1.0
    if S.MODIFIER == "frame_decay":
        factor = tl.where(b_s > 0, decay_of(modifying, frame_q, frame_k, table_size), 1.0)
        b_s = b_s * factor
    elif S.MODIFIER == "key_bias":
        b_s = b_s + bias
    return b_s, factor
