"""From tensors to launches: views, lists, the choice of tiles, and what each kernel is called with.

A `Launch` is a kernel with everything that it is called with. Building one and running it are apart, so that
compile_check.py compiles for any GPU exactly what would be launched there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..layout import empty_like_query
from ..modifiers import FrameDecay, KeyBias, Modifier, bias_as_4d, modifier_name, reduce_to_bias
from . import backward_kernel, configs, forward_kernel
from .lists import Rows, dense_rows, key_rows, query_rows
from .primitives import Modifying, Scales, Shape, View
from .quantise import mean_key, shift_of, smoothed, to_bytes

if TYPE_CHECKING:
    from ..block_mask import BlockMask

LOG2E = 1.4426950408889634
LARGEST_TILE = 256
# 32-bit offsets inside a tile must hold its rows.
LARGEST_TOKEN_STRIDE = (2**31 - 1) // LARGEST_TILE - 256
ROWS_OF_SIMPLE_KERNELS = 32
# The smallest depth of a product of bytes.
DEPTH_OF_BYTES = 32
# A list is cut when the launch has fewer programs than the device runs at once, into parts of so many tiles at least.
LARGEST_SPLIT, TILES_OF_A_PART = 16, 8


@dataclass(frozen=True)
class Target:
    """Where kernels run: `device` as tuned configurations name it, a key of configs.TABLE, and its processors."""

    device: str
    architecture: str
    processors: int


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel, its grid (one number), arguments, and what it is compiled for."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    shape: Shape
    config: configs.Config

    @property
    def options(self) -> dict[str, int]:
        """Compiler options."""
        return {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}

    def run(self) -> None:
        """Compile on first use, and launch."""
        if self.programs:
            self.kernel[(self.programs,)](*self.arguments, S=self.shape, **self.options)


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call of `sparse_attention`, and where it runs.

    `descriptors`: load through TMA descriptors where configuration, device and tensors allow it.
    `pinned`: configurations by kernel that are taken in place of the stored ones.
    `precision`: of fp32 products, "ieee" or "tf32"; None reads torch's setting.
    `int8`: forward multiplies queries and keys as bytes (quantise.py).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: BlockMask | None
    scale: float
    key_lengths: Tensor | None
    modifier: Modifier | None
    target: Target
    descriptors: bool = True
    pinned: Mapping[str, configs.Config] = field(default_factory=dict)
    precision: str | None = None
    int8: bool = False

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs the kernels."""
        return not hasattr(forward_kernel.forward_kernel, "device_caches")

    @property
    def product_precision(self) -> str:
        """fp32 products: exact as by default, tf32 after torch.set_float32_matmul_precision("high")."""
        if self.interpreted:
            return "interpreter"
        if self.precision is not None:
            return self.precision
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"

    def config(self, kernel: str) -> configs.Config:
        """Tiles of one kernel, fitted to this call's blocks."""
        if kernel in self.pinned:
            return configs.fitted(self.pinned[kernel], self.block)
        bits = self.q.element_size() * 8
        return configs.choose(self.target.device, self.target.architecture, kernel, bits, self.width, self.block)

    @property
    def block(self) -> tuple[int, int]:
        """The mask's block; of a dense call, the largest tile that its lengths ask for."""
        if self.mask is not None:
            return self.mask.BLOCK_SIZE
        q_len, kv_len = (min(triton.next_power_of_2(x.shape[2]), LARGEST_TILE) for x in (self.q, self.k))
        return q_len, kv_len

    @property
    def width(self) -> int:
        """The larger padded head dim."""
        return max(padded(self.q.shape[3]), padded(self.v.shape[3]))

    def shape(self, config: configs.Config, step: int, streamed: tuple[Tensor, Tensor]) -> Shape:
        """Compile-time constants; `streamed` is what the kernel's loop loads, perhaps through descriptors."""
        tiles = (config.tile_m, config.tile_n)
        tma = self.descriptors and config.tma and self.target.architecture in configs.WITH_TMA
        block = tiles if self.mask is None else self.mask.BLOCK_SIZE
        features, v_features = self.q.shape[3], self.v.shape[3]
        width = max(padded(features), DEPTH_OF_BYTES if self.int8 else 0)
        tma = tma and (width == features or not self.int8)
        return Shape(
            *block,
            *tiles,
            features,
            v_features,
            width,
            padded(v_features),
            DENSE=self.mask is None,
            PARTIAL=self.mask is not None and self.mask.has_partial,
            LENGTHS=self.key_lengths is not None,
            WORD=next(word for word in (32, 16, 8) if block[1] % word == 0 and config.tile_n % word == 0),
            MODIFIER=modifier_name(self.modifier) or "none",
            POSITIVE=self.scale >= 0,
            TMA=tma and all(map(describable, streamed)),
            PRECISION=self.product_precision,
            STEP=step,
            INT8=self.int8,
        )

    def sizes(self, rows: Rows) -> tuple[int, ...]:
        """The kernels' SIZES."""
        batch, heads, q_len, _ = self.q.shape
        table = self.modifier.table.numel() if isinstance(self.modifier, FrameDecay) else 1
        group = heads // self.k.shape[1]
        return batch, heads, group, q_len, self.k.shape[2], *rows.sizes, table

    def modifying(self) -> Modifying:
        """The modifier as the kernels take it."""
        if isinstance(self.modifier, FrameDecay):
            of_q, of_k = self.modifier.frame_of_q.contiguous(), self.modifier.frame_of_k.contiguous()
            return Modifying(of_q, of_k, self.modifier.table.contiguous(), None, 0, 0)
        if isinstance(self.modifier, KeyBias):
            bias = bias_as_4d(self.modifier.bias.detach().contiguous())[:, :, 0]
            return Modifying(None, None, None, bias, *(stride(bias, dim) for dim in (0, 1)))
        return Modifying(None, None, None, None, 0, 0)


def padded(features: int) -> int:
    """Features of a tile: a power of two, at least 16 (the smallest depth of a product)."""
    return max(16, triton.next_power_of_2(features))


def stride(x: Tensor, dim: int) -> int:
    """The stride, 0 where it is never used: fewer kernels are compiled then."""
    return x.stride(dim) if x.shape[dim] > 1 else 0


def common_step(*tensors: Tensor) -> int:
    """8 where it divides every stride (16 bytes of fp16), else 1."""
    return 8 if all(stride(x, dim) % 8 == 0 for x in tensors for dim in range(3)) else 1


def view(x: Tensor, step: int) -> View:
    """Address and strides."""
    return View(x, *(stride(x, dim) // step for dim in range(3)))


def described(x: Tensor, step: int, tile: int, shape: Shape) -> View | TensorDescriptor:
    """The same, or in its place a descriptor of tiles of `tile` rows, if the shape says so."""
    if not shape.TMA:
        return view(x, step)
    # Strides of dimensions of size 1 are never used, but must be aligned like the others.
    strides = [x.stride(dim) if x.shape[dim] > 1 else 16 for dim in range(3)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, tile, x.shape[3]])


def describable(x: Tensor) -> bool:
    """Whether a descriptor can hold `x`: D a power of two from 16 on, address and strides in units of 16 bytes."""
    aligned = all(stride(x, dim) * x.element_size() % 16 == 0 for dim in range(3))
    # A stride of 0 (an expanded dimension) is left to plain pointers.
    spread = all(x.stride(dim) > 0 for dim in range(3) if x.shape[dim] > 1)
    return aligned and spread and x.data_ptr() % 16 == 0 and padded(x.shape[3]) == x.shape[3]


def within_offsets(x: Tensor) -> Tensor:
    """`x`, copied where tokens lie so far apart that offsets inside a tile would pass 32 bits."""
    return x if stride(x, 2) <= LARGEST_TOKEN_STRIDE else x.contiguous()


# ---------------------------------------------------------------- forward


def split_count(call: Call, rows: Rows, programs: int, tiles_of_block: int) -> int:
    """Parts into which lists are cut: more than 1 only where the launch would leave most processors idle."""
    # The longest list is known without reading the device.
    tiles = rows.longest * tiles_of_block
    free = call.target.processors // max(1, programs)
    return max(1, min(LARGEST_SPLIT, free, tiles // TILES_OF_A_PART))


def forward_launches(call: Call, out: Tensor, lse: Tensor) -> Iterator[Launch]:
    """The launches that fill out and lse, in order."""
    q, k, v = map(within_offsets, (call.q, call.k, call.v))
    config = call.config("forward")
    scales = Scales(None, None)
    if call.int8:
        q, k, scales = quantised(call, q, k, config)
    shape = call.shape(config, common_step(q, k, v, out), (k, v))
    tiles = (shape.TILE_M, shape.TILE_N)
    lengths = (q.shape[2], k.shape[2])
    rows = dense_rows(lengths, tiles) if call.mask is None else query_rows(call.mask, shape.WORD)
    batch, heads = q.shape[:2]
    programs = batch * heads * rows.blocks * shape.TILES_Q
    splits = split_count(call, rows, programs, shape.TILES_K)
    part, part_lse = out, lse
    if splits > 1:
        shape = replace(shape, SPLITS=splits, STEP=common_step(q, k, v, part := parts_of(out, splits)))
        part_lse = lse.new_empty(splits * batch, *lse.shape[1:])
    arguments = (
        view(q, shape.STEP),
        described(k, shape.STEP, shape.TILE_N, shape),
        described(v, shape.STEP, shape.TILE_N, shape),
        view(part, shape.STEP),
        part_lse,
        scales,
        rows.lists,
        call.key_lengths,
        call.modifying(),
        call.scale * LOG2E,
        *call.sizes(rows),
    )
    yield Launch(forward_kernel.forward_kernel, programs * splits, arguments, shape, config)
    if splits > 1:
        yield merge_launch(part, part_lse, out, lse, shape)


def quantised(call: Call, q: Tensor, k: Tensor, config: configs.Config) -> tuple[Tensor, Tensor, Scales]:
    """Queries and smoothed keys as bytes, and the scales of the tiles that the kernel will walk."""
    tiles = (config.tile_m, config.tile_n)
    block = tiles if call.mask is None else call.mask.BLOCK_SIZE
    k = smoothed(k, mean_key(k, call.key_lengths), call.key_lengths)
    (q, of_q), (k, of_k) = (to_bytes(x, block[n], tiles[n]) for n, x in enumerate((q, k)))
    return q, k, Scales(of_q, of_k)


def parts_of(out: Tensor, splits: int) -> Tensor:
    """fp32 room for the parts' results, one after the other as further samples."""
    return out.new_empty(splits * out.shape[0], *out.shape[1:], dtype=torch.float32)


def merge_launch(part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, shape: Shape) -> Launch:
    """The launch that joins the parts."""
    config = configs.Config(ROWS_OF_SIMPLE_KERNELS, 16, 4, 1)
    shape = replace(shape, STEP=common_step(part, out), TILE_M=ROWS_OF_SIMPLE_KERNELS)
    batch, heads, q_len = lse.shape
    programs = batch * heads * triton.cdiv(q_len, shape.TILE_M)
    arguments = (view(part, shape.STEP), part_lse, view(out, shape.STEP), lse, batch, heads, q_len)
    return Launch(forward_kernel.merge_kernel, programs, arguments, shape, config)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out and lse."""
    out = empty_like_query(call.q, call.v.shape[3])
    lse = call.q.new_empty(call.q.shape[:3], dtype=torch.float32)
    if call.k.shape[2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(call.q):
        for launch in forward_launches(call, out, lse):
            launch.run()
        if call.int8:
            lse += shift_of(call.q, mean_key(call.k, call.key_lengths), call.scale)
    return out, lse


# ---------------------------------------------------------------- backward


@dataclass(frozen=True, eq=False)
class Given:
    """What backward starts from: the gradients of the results, and the results; delta is worked out first."""

    grad_out: Tensor
    grad_lse: Tensor | None
    out: Tensor
    lse: Tensor
    delta: Tensor


@dataclass(frozen=True, eq=False)
class Gradients:
    """What backward fills: like q, k and v, and fp32 [B, H, Skv] for a bias."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None


def backward_launches(call: Call, given: Given, found: Gradients) -> Iterator[Launch]:
    """The launches that fill delta and then the gradients, in order."""
    q, k, v, grad_out, out = map(within_offsets, (call.q, call.k, call.v, given.grad_out, given.out))
    call, given = replace(call, q=q, k=k, v=v), replace(given, grad_out=grad_out, out=out)
    yield _delta_launch(call, given)
    yield _query_launch(call, given, found)
    yield _key_launch(call, given, found)


def _delta_launch(call: Call, given: Given) -> Launch:
    config = configs.Config(ROWS_OF_SIMPLE_KERNELS, 16, 4, 1)
    step = common_step(given.out, given.grad_out)
    batch, heads, q_len = given.lse.shape
    programs = batch * heads * triton.cdiv(q_len, config.tile_m)
    arguments = (view(given.out, step), view(given.grad_out, step), given.grad_lse, given.delta, heads, q_len)
    shape = replace(call.shape(config, step, (call.k, call.v)), TILE_M=config.tile_m)
    return Launch(backward_kernel.delta_kernel, programs, arguments, shape, config)


def _query_launch(call: Call, given: Given, found: Gradients) -> Launch:
    config = call.config("queries")
    tensors = (call.q, call.k, call.v, given.grad_out, found.dq)
    shape = call.shape(config, common_step(*tensors), (call.k, call.v))
    lengths, tiles = (call.q.shape[2], call.k.shape[2]), (shape.TILE_M, shape.TILE_N)
    rows = dense_rows(lengths, tiles) if call.mask is None else query_rows(call.mask, shape.WORD)
    batch, heads = call.q.shape[:2]
    arguments = (
        view(call.q, shape.STEP),
        described(call.k, shape.STEP, shape.TILE_N, shape),
        described(call.v, shape.STEP, shape.TILE_N, shape),
        view(given.grad_out, shape.STEP),
        view(found.dq, shape.STEP),
        given.lse,
        given.delta,
        rows.lists,
        call.key_lengths,
        call.modifying(),
        call.scale * LOG2E,
        call.scale,
        *call.sizes(rows),
    )
    programs = batch * heads * rows.blocks * shape.TILES_Q
    return Launch(backward_kernel.query_gradient_kernel, programs, arguments, shape, config)


def _key_launch(call: Call, given: Given, found: Gradients) -> Launch:
    config = call.config("keys")
    tensors = (call.q, call.k, call.v, given.grad_out, found.dk, found.dv)
    shape = call.shape(config, common_step(*tensors), (call.q, given.grad_out))
    lengths, tiles = (call.k.shape[2], call.q.shape[2]), (shape.TILE_N, shape.TILE_M)
    batch, kv_heads = call.k.shape[:2]
    rows = dense_rows(lengths, tiles) if call.mask is None else key_rows(call.mask, shape.WORD, kv_heads)
    arguments = (
        described(call.q, shape.STEP, shape.TILE_M, shape),
        view(call.k, shape.STEP),
        view(call.v, shape.STEP),
        described(given.grad_out, shape.STEP, shape.TILE_M, shape),
        view(found.dk, shape.STEP),
        view(found.dv, shape.STEP),
        found.dbias,
        given.lse,
        given.delta,
        rows.lists,
        call.key_lengths,
        call.modifying(),
        call.scale * LOG2E,
        call.scale,
        *call.sizes(rows),
    )
    programs = batch * kv_heads * rows.blocks * shape.TILES_K
    return Launch(backward_kernel.key_gradient_kernel, programs, arguments, shape, config)


def backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and the bias' gradient (None without a KeyBias)."""
    q, k, v = call.q, call.k, call.v
    dq, dk, dv = (empty_like_query(x, x.shape[3]) for x in (q, k, v))
    bias = call.modifier.bias if isinstance(call.modifier, KeyBias) else None
    dbias = None if bias is None else q.new_zeros(*q.shape[:2], k.shape[2], dtype=torch.float32)
    if 0 in (q.shape[2], k.shape[2]):
        dq.zero_(), dk.zero_(), dv.zero_()
    else:
        grad_lse = None if grad_lse is None else grad_lse.to(torch.float32).contiguous()
        given = Given(grad_out.to(q.dtype), grad_lse, out, lse.contiguous(), torch.empty_like(lse.contiguous()))
        with torch.cuda.device_of(q):
            for launch in backward_launches(call, given, Gradients(dq, dk, dv, dbias)):
                launch.run()
    return dq, dk, dv, None if dbias is None or bias is None else reduce_to_bias(dbias, bias)
