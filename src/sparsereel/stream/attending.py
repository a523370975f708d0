"""A model's self-attention routed through a cache, for the time of one forward pass.

Two things change on the instance and are put back afterwards: `rope.forward` hands out tables that rotate rows and
columns but leave time alone, and every self-attention layer's processor announces a layer that asks the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsereel.families import diffusers_seam, find
from sparsereel.sparse_layer import Call
from sparsereel.stream.cache import KVCache


class CachedLayer:
    """Stands behind one layer's processor."""

    def __init__(self, number: int, cache: KVCache) -> None:
        self.number = number
        self.cache = cache

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """(1, heads, tokens, D) each, rotated in space only."""
        return self.cache.attend(self.number, q, k, v)


@contextmanager
def cached_attention(model: nn.Module, cache: KVCache) -> Iterator[None]:
    """Inside, the model's self-attention reads and writes `cache`; afterwards the model is as it was."""
    layers = self_attention(model)
    diffusers_seam.REGISTRATION.acquire()
    changed = []
    rope: Any = model.rope
    rope.forward = _spatial_tables(rope)
    try:
        for number, module in enumerate(layers):
            original = diffusers_seam.replace_processor(module, CachedLayer(number, cache), "dispatch")
            changed.append((module, original))
        yield
    finally:
        for module, original in changed:
            diffusers_seam.put_back_processor(module, original, module.processor)
        del rope.forward
        diffusers_seam.REGISTRATION.release()


def self_attention(model: nn.Module) -> list[Any]:
    """The self-attention modules in forward order."""
    family = find(model)
    assert family is not None
    return [module for _, module in family.self_attention(model)]


def time_frequencies(model: Any) -> Tensor:
    """(t_dim / 2,) float64, radians a latent frame, of a Wan transformer."""
    from sparsereel.extend.rope import plain_frequencies
    from sparsereel.extend.tables import WAN_BASE

    return plain_frequencies(model.rope.t_dim, WAN_BASE)


def _spatial_tables(rope: Any) -> Any:
    """A forward for `WanRotaryPosEmbed`: cos and sin (1, S, 1, D) that turn rows and columns, not time."""

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        sizes = zip(hidden_states.shape[2:], rope.patch_size, strict=True)
        frames, height, width = (size // patch for size, patch in sizes)
        splits = (rope.t_dim, rope.h_dim, rope.w_dim)
        tables = []
        for table, at_rest in ((rope.freqs_cos, 1.0), (rope.freqs_sin, 0.0)):
            time, rows, columns = table.split(splits, dim=1)
            still = torch.full((1, 1, 1, rope.t_dim), at_rest, dtype=time.dtype, device=time.device)
            parts = (still, rows[None, :height, None], columns[None, None, :width])
            grid = [part.expand(frames, height, width, -1) for part in parts]
            tables.append(torch.cat(grid, dim=-1).reshape(1, frames * height * width, 1, -1))
        return tables[0], tables[1]

    return forward
