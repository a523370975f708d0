"""Tensors of a few heads cut into blocks, and the scores of gathered blocks: the arithmetic of the torch backend."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .bits import octet_table
from .layout import full_precision
from .modifiers import FrameDecay, KeyBias, Modifier
from .visits import Chunk, Visits

# A frame number beyond all others that still leaves room to subtract two of its kind.
FAR = 1 << 29


class Workspace:
    """Buffers that are used again from chunk to chunk: fresh large ones cost more in page faults than in arithmetic."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor; the one that was given out last under `name` becomes invalid."""
        size = 1
        for n in shape:
            size *= n
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype, device=self.device)
        return buffer[:size].view(shape)


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Type of the matrix products: the input's, but fp32 where this CPU has no fast products for it."""
    if device.type != "cpu" or dtype in (torch.float32, torch.float64):
        return dtype
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    probe = getattr(torch.ops.mkldnn, name, None)
    return dtype if probe is not None and probe() else torch.float32


def to_blocks(x: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """[H, S, D] to [H * blocks, block * D] in `dtype`, zeros past the end; a view where nothing must be moved."""
    pad = -x.shape[1] % block
    padded = F.pad(x, (0, 0, 0, pad)) if pad else x
    return padded.to(dtype).reshape(-1, block * x.shape[2])


def from_blocks(blocks: Tensor, heads: int, length: int, features: int) -> Tensor:
    """[H * blocks, block * D] back to [H, S, D]."""
    return blocks.view(heads, -1, features)[:, :length]


@dataclass(eq=False)
class Group:
    """Query heads of one sample with the key heads they share, cut into blocks.

    Attributes:
        sample, heads, kv_heads: which part of the call this is.
        q, k, v: [heads * blocks, block * features] in the type of the matrix products.
        length: keys past it are not seen.
    """

    visits: Visits
    workspace: Workspace
    sample: int
    heads: range
    kv_heads: range
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    length: int
    kv_len: int
    modifier: Modifier | None
    features: int
    v_features: int
    wide: torch.dtype = field(init=False)
    octets: Tensor = field(init=False)
    q_frames: Tensor = field(init=False)
    k_frames: Tensor = field(init=False)
    excess: Tensor = field(init=False)
    key_bias: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.wide = full_precision(self.q.dtype)
        # Added to scores: 0 where a bit is set, -inf where not. Filling through a bool mask is ten times slower.
        allowed = octet_table(self.q.device)
        self.octets = torch.zeros(256, 8, dtype=self.wide, device=self.q.device).masked_fill_(~allowed, -torch.inf)
        if isinstance(self.modifier, FrameDecay):
            self._set_up_decay(self.modifier)
        elif isinstance(self.modifier, KeyBias):
            self.key_bias = _pad_blocks(self._own_bias(self.modifier.bias), self.visits.block[1], 0).flatten(0, 1)

    @property
    def q_blocks(self) -> int:
        """Query blocks of a head."""
        return self.visits.total.shape[-1]

    @property
    def k_blocks(self) -> int:
        """Key blocks of a head."""
        return -(-self.kv_len // self.visits.block[1])

    def _set_up_decay(self, decay: FrameDecay) -> None:
        """Frames by block, and by distance what FrameDecay adds to a positive logit, relative to it.

        Text lies so far from everything that its distance is cut to the last entry, which adds nothing.
        """
        largest = [int(x.max()) if x.numel() else 0 for x in (decay.frame_of_q, decay.frame_of_k)]
        distances = torch.arange(max(0, *largest) + 1, device=decay.table.device)
        excess = decay.table[distances.clamp(max=decay.table.shape[0] - 1)].to(self.wide) - 1
        self.excess = F.pad(excess, (0, 1))
        for name, frames, block, far in (
            ("q_frames", decay.frame_of_q, self.visits.block[0], FAR),
            ("k_frames", decay.frame_of_k, self.visits.block[1], -FAR),
        ):
            setattr(self, name, _pad_blocks(frames.masked_fill(frames < 0, far), block, far))

    def _own_bias(self, bias: Tensor) -> Tensor:
        """[len(heads), Skv] of this group's heads."""
        shaped = bias[(None,) * (3 - bias.ndim)] if bias.ndim != 2 else bias[:, None]
        own = shaped[self.sample if shaped.shape[0] > 1 else 0].to(self.wide)
        return own[self.heads.start : self.heads.stop] if own.shape[0] > 1 else own.expand(len(self.heads), -1)

    # ------------------------------------------------------------ gathering

    def rows_of(self, blocks: Tensor, rows: Tensor, features: int, name: str) -> Tensor:
        """[n, BQ, features] of some rows."""
        shape = (rows.shape[0], self.visits.block[0], features)
        found = self.workspace.get(name, (shape[0], shape[1] * features), blocks.dtype)
        return torch.index_select(blocks, 0, rows, out=found).view(shape)

    def key_ids(self, chunk: Chunk) -> Tensor:
        """[n * w] rows of `k` and `v` that a chunk visits."""
        head = chunk.rows // self.q_blocks // (len(self.heads) // len(self.kv_heads))
        return (head[:, None] * self.k_blocks + chunk.index).flatten()

    def keys_of(self, blocks: Tensor, ids: Tensor, rows: int, features: int, name: str) -> Tensor:
        """[n, w * BK, features] of the key blocks that some rows visit."""
        found = self.workspace.get(name, (ids.shape[0], blocks.shape[1]), blocks.dtype)
        return torch.index_select(blocks, 0, ids, out=found).view(rows, -1, features)

    # ------------------------------------------------------------ scores

    def scores(self, chunk: Chunk, q: Tensor, k: Tensor, *, keep_factor: bool = False) -> tuple[Tensor, Tensor | None]:
        """[n, BQ, w * BK] logits in full precision, -inf where not allowed.

        With `keep_factor` also what FrameDecay multiplied each of them by; None without FrameDecay.
        """
        shape = (q.shape[0], q.shape[1], k.shape[1])
        product = self.workspace.get("product", shape, q.dtype)
        torch.baddbmm(product, q, k.transpose(1, 2), beta=0, alpha=self.scale, out=product)
        s = self.widen(product, "scores")
        factor = None
        if isinstance(self.modifier, FrameDecay):
            factor = self._decay(chunk, s, keep_factor)
        elif isinstance(self.modifier, KeyBias):
            s.add_(self._bias_of(chunk).unsqueeze(1))
        if chunk.bits_from < chunk.index.shape[1]:
            s[:, :, chunk.bits_from * self.visits.block[1] :].add_(self._tile_bias(chunk))
        if self.length < self.k_blocks * self.visits.block[1]:
            self._hide_end(chunk, s)
        return s, factor

    def bias_ids(self, chunk: Chunk) -> Tensor:
        """[n * w] rows of a [len(heads) * key blocks, BK] table."""
        return ((chunk.rows // self.q_blocks)[:, None] * self.k_blocks + chunk.index).flatten()

    def _bias_of(self, chunk: Chunk) -> Tensor:
        return self.key_bias[self.bias_ids(chunk)].view(chunk.rows.shape[0], -1)

    def _decay(self, chunk: Chunk, s: Tensor, keep_factor: bool) -> Tensor | None:
        """Apply FrameDecay to `s`: s + max(s, 0) * excess. Selecting with bool masks is several times slower."""
        f = self.q_frames[chunk.rows % self.q_blocks].unsqueeze(2)
        g = self.k_frames[chunk.index].flatten(1).unsqueeze(1)
        distance = self.workspace.get("distance", tuple(s.shape), torch.int32)
        torch.sub(f, g, out=distance).abs_().clamp_(max=self.excess.shape[0] - 1)
        excess = self.workspace.get("excess", (s.numel(),), self.wide)
        excess = torch.index_select(self.excess, 0, distance.flatten(), out=excess).view(s.shape)
        positive = torch.clamp(s, min=0, out=self.workspace.get("positive", tuple(s.shape), self.wide))
        s.addcmul_(positive, excess)
        return positive.sign_().mul_(excess).add_(1.0) if keep_factor else None

    def _tile_bias(self, chunk: Chunk) -> Tensor:
        """[n, BQ, columns] of 0 and -inf for the columns that carry bits."""
        octets = self.visits.bits[chunk.tile[:, chunk.bits_from :]].transpose(1, 2).flatten()
        found = self.workspace.get("tiles", (octets.shape[0], 8), self.wide)
        torch.index_select(self.octets, 0, octets.to(torch.int32), out=found)
        return found.view(chunk.rows.shape[0], self.visits.block[0], -1)

    def _hide_end(self, chunk: Chunk, s: Tensor) -> None:
        """Hide keys at or past this sample's length, also zeros that fill up the last block."""
        block = self.visits.block[1]
        within = torch.arange(block, device=s.device)
        hidden = (chunk.index.unsqueeze(-1) * block + within >= self.length).flatten(1)
        ends = torch.zeros(hidden.shape, dtype=self.wide, device=s.device).masked_fill_(hidden, -torch.inf)
        s.add_(ends.unsqueeze(1))

    def probabilities(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax of the scores, its lse [n, BQ], and which rows see nothing (their probabilities mean nothing)."""
        top = s.amax(-1)
        empty = top == -torch.inf
        # A row of -inf would give NaN; one finite score makes it harmless until its result is thrown away.
        s[:, :, 0].masked_fill_(empty, 0.0)
        p = torch.softmax(s, -1, out=self.workspace.get("probabilities", tuple(s.shape), self.wide))
        # The largest probability is exp(top - lse).
        lse = torch.where(empty, -torch.inf, top - p.amax(-1).log_())
        return p, lse, empty

    def widen(self, x: Tensor, name: str) -> Tensor:
        """`x` in full precision."""
        return x if x.dtype == self.wide else self.workspace.get(name, tuple(x.shape), self.wide).copy_(x)

    def seen(self, empty: Tensor, dtype: torch.dtype) -> Tensor:
        """[n, BQ, 1] of 1, and 0 for rows that see nothing."""
        return (~empty).to(dtype).unsqueeze(-1)

    def narrow(self, x: Tensor, name: str) -> Tensor:
        """`x` in the type of the matrix products."""
        return x if x.dtype == self.q.dtype else self.workspace.get(name, tuple(x.shape), self.q.dtype).copy_(x)


def _pad_blocks(x: Tensor, block: int, value: int) -> Tensor:
    """[..., S] to [..., blocks, block]."""
    padded = F.pad(x, (0, -x.shape[-1] % block), value=value)
    return padded.unflatten(-1, (padded.shape[-1] // block, block))
