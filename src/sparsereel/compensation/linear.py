"""Linear attention over skipped blocks: the remainder that a few large blocks leave is of low rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsereel.compensation.base import Compensation, SparseCall
from sparsereel.compensation.pooled import pooled_attention
from sparsereel.patterns import arguments
from sparsereel.selectors.partition import numbers_at_once
from sparsereel.selectors.scores import block_sums
from sparsereel_kernels import merge_attention

FEATURES = ("softmax", "elu", "relu")


@dataclass(frozen=True, eq=False)
class Linear(Compensation):
    """Sparse + linear attention (SLA, arXiv 2509.24006), over the skipped blocks of each row of blocks.

        L_i = phi(q_i) H / (phi(q_i) Z),   H = sum_skipped phi(k)^T v,   Z = sum_skipped phi(k)

    Without training the two normalised branches are mixed by their mass, as SLA2 (arXiv 2602.12675) does with a
    learned ratio: that of the sparse branch is its log-sum-exp, that of the skipped blocks is estimated from mean keys.
    With a trained projection it is SLA's own form, sparse + proj(L), which is plain sparsity where the projection is 0.

    Args:
        feature: phi: "softmax" over channels (SLA's default), "elu" (+ 1) or "relu".
        projection: a safetensors file with `layers.<n>.weight` [Dv, Dv] and, if wanted, `layers.<n>.bias` [Dv] for
            every self-attention layer; None = training-free.

    Raises:
        ValueError: an unknown feature; at `sparsify`, a file that is missing or lacks a layer.
    """

    feature: str = "softmax"
    projection: str | None = None

    name: ClassVar[str] = "linear"
    needs_lse: ClassVar[bool] = True

    def check(self) -> None:
        arguments.one_of("feature", self.feature, FEATURES)
        if self.projection is not None and not isinstance(self.projection, str):
            raise ValueError(f"projection must be the path of a safetensors file, got {self.projection!r}")

    def check_model(self, layers: int) -> None:
        if self.projection is None:
            return
        weights = _weights(self.projection)
        missing = [n for n in range(layers) if f"layers.{n}.weight" not in weights]
        if missing:
            raise ValueError(f"{self.projection} has no layers.{missing[0]}.weight; the model has {layers} layers")

    def complete(self, call: SparseCall, out: Tensor, lse: Tensor | None) -> Tensor:
        assert lse is not None
        if not call.skips_anything:
            return out
        branch = linear_branch(call, self.feature)
        if self.projection is None:
            mass = pooled_attention(call, call.q * call.scale, call.k_means)[1]
            return merge_attention(out, lse, branch, mass)[0]
        weights = _weights(self.projection)
        weight, bias = (weights.get(f"layers.{call.layer}.{part}") for part in ("weight", "bias"))
        assert weight is not None
        moved = [None if x is None else x.to(branch) for x in (weight, bias)]
        added = F.linear(branch, *moved)  # type: ignore[arg-type]
        return (out + added * call.rows(call.skipped.any(-1, keepdim=True))).to(out.dtype)


def features(x: Tensor, feature: str) -> Tensor:
    """phi(x), fp32, not negative."""
    x = x.float()
    return x.softmax(-1) if feature == "softmax" else F.elu(x) + 1 if feature == "elu" else F.relu(x)


def linear_branch(call: SparseCall, feature: str = "softmax") -> Tensor:
    """fp32 [B, H, S, Dv]: linear attention of each query over the skipped blocks of its row; 0 where none are.

    Sums run over the skipped blocks themselves. Taking the kept ones off the sum of all, as SLA's kernel does, cancels
    badly where most are kept. Differentiable in q, k and v.
    """
    heads, size = call.q.shape[1], call.block[0]
    phi_k = features(call.k, feature)
    if call.valid_keys is not None:
        phi_k = phi_k * call.valid_keys[:, None, :, None]
    parts = [_head(call, phi_k, head, feature) for head in range(heads)]
    return torch.cat(parts, 1)[:, :, : call.skipped.shape[2] * size]


def _head(call: SparseCall, phi_k: Tensor, head: int, feature: str) -> Tensor:
    """fp32 [B, 1, S, Dv]; a head at a time, since a block's product is a matrix."""
    shared = head * call.k.shape[1] // call.q.shape[1]
    block, size, length = call.block[1], call.block[0], call.q.shape[2]
    keys, values = phi_k[:, shared], call.v[:, shared].float()
    if call.valid_keys is not None:
        values = values.masked_fill(~call.valid_keys[..., None], 0)
    fill = -keys.shape[1] % block
    blocks, contents = (F.pad(x, (0, 0, 0, fill)).unflatten(1, (-1, block)) for x in (keys, values))
    products = blocks.transpose(-1, -2) @ contents
    sums = block_sums(keys[:, None], block)[:, 0]
    skipped = call.skipped.expand(-1, call.q.shape[1], -1, -1)[:, head].float().expand(keys.shape[0], -1, -1)
    at_once = max(1, numbers_at_once(call.q) // (products.shape[-1] * products.shape[-2] * keys.shape[0]))
    outs = []
    for first in range(0, skipped.shape[1], at_once):
        rows = skipped[:, first : first + at_once]
        stop = min(length, (first + at_once) * size)
        phi_q = features(call.q[:, head, first * size : stop], feature)
        phi_q = F.pad(phi_q, (0, 0, 0, rows.shape[1] * size - phi_q.shape[1])).unflatten(1, (-1, size))
        total = phi_q @ (rows @ products.flatten(2)).unflatten(2, products.shape[2:])
        weight = (phi_q * (rows @ sums)[:, :, None]).sum(-1, keepdim=True)
        out = torch.where(weight > 0, total / weight.clamp(min=1e-30), 0.0)
        outs.append(out.flatten(1, 2)[:, : stop - first * size])
    return torch.cat(outs, 1)[:, None]


@lru_cache(maxsize=4)
def _weights(path: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise ValueError(f"the projection file {path} does not exist")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
