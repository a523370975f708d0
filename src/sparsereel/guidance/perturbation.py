"""SoftPAG: the attention of chosen heads is drawn towards the identity (HeadHunter and SoftPAG, arXiv 2506.10978).

For a head with attention map A, output O = A V and strength u in [0, 1]

    A' = (1 - u) A + u I        so        A' V = (1 - u) O + u V

No map is needed: the head's output is mixed with its values. u = 1 on all heads of a layer is perturbed-attention
guidance (PAG), whatever kernel computed O.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsereel.families.layout import Layout, decode
from sparsereel.inject import injection_of, is_sparsified, restore, sparsify
from sparsereel.patterns import Full
from sparsereel.plan import AttentionPlan

ROWS = ("image", "all")


@dataclass(frozen=True, init=False)
class HeadPerturbation:
    """Which heads are perturbed, and how much.

    Args:
        heads: numbers of heads by self-attention layer: its number in forward order (int or digits) or module name.
        strength: u; 0 changes nothing, 1 makes a head return its values.
        rows: "image" perturbs the tokens of the video or image; "all" those of the text too, as diffusers' guiders do
            on models with joint text.

    Raises:
        ValueError: a strength outside [0, 1], unknown rows, a head that is no number from 0.
    """

    heads: tuple[tuple[int | str, tuple[int, ...]], ...]
    strength: float
    rows: str

    def __init__(self, heads: Mapping[Any, Sequence[int]], strength: float = 1.0, rows: str = "image") -> None:
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
            raise ValueError(f"strength must lie in [0, 1], got {strength!r}")
        if rows not in ROWS:
            raise ValueError(f"rows must be one of {', '.join(ROWS)}, got {rows!r}")
        table: dict[int | str, set[int]] = {}
        for layer, numbers in dict(heads).items():
            if isinstance(numbers, (str, int)) or any(type(n) is not int or n < 0 for n in numbers):
                raise ValueError(f"heads of layer {layer!r} must be a list of numbers from 0, got {numbers!r}")
            key = int(layer) if str(layer).isdigit() else str(layer)
            table.setdefault(key, set()).update(numbers)
        order = sorted(table, key=lambda key: (isinstance(key, str), key))
        object.__setattr__(self, "heads", tuple((key, tuple(sorted(table[key]))) for key in order if table[key]))
        object.__setattr__(self, "strength", float(strength))
        object.__setattr__(self, "rows", rows)

    def table(self) -> dict[str, list[int]]:
        """`heads` as JSON has it."""
        return {str(layer): list(numbers) for layer, numbers in self.heads}

    @property
    def count(self) -> int:
        """Number of heads."""
        return sum(len(numbers) for _, numbers in self.heads)


class Perturbing:
    """A perturbation on one sparsified model: what `SparseLayer` applies to its output."""

    def __init__(self, perturbation: HeadPerturbation, runtime: Any) -> None:
        self.strength = perturbation.strength
        self.rows = perturbation.rows
        by_name = {layer.name: layer for layer in runtime.layers} | {layer.index: layer for layer in runtime.layers}
        plans = {layer.index: len(layer.plan.heads) for layer in runtime.layers}
        self.heads: dict[int, list[int]] = {}
        for key, numbers in perturbation.heads:
            if key not in by_name:
                raise ValueError(f"there is no replaced self-attention layer {key!r}; numbers: {_ranges(plans)}")
            layer = by_name[key]
            if numbers and numbers[-1] >= plans[layer.index]:
                raise ValueError(f"layer {key!r} has heads 0 to {plans[layer.index] - 1}, got {numbers[-1]}")
            self.heads.setdefault(layer.index, []).extend(numbers)

    def apply(self, out: torch.Tensor, v: torch.Tensor, layer: int, layout: Layout | None) -> torch.Tensor:
        """Mix the output of a layer's chosen heads with their values.

        Args:
            out: [B, H, S, Dv]; not changed in place.
            v: [B, Hkv, S, Dv].
            layout: where the tokens lie; None = unknown.

        Raises:
            ValueError: image rows are asked for and the layout is unknown.
        """
        heads = self.heads.get(layer)
        if not heads or not self.strength:
            return out
        rows = slice(None)
        if self.rows == "image":
            if layout is None:
                raise ValueError(f"it is not known which tokens of layer {layer} are text; use rows='all'")
            grid = decode(layout)
            rows = slice(grid.video_start, grid.video_start + grid.frames * grid.frame_len)
        of_value = [head * v.shape[1] // out.shape[1] for head in heads]
        mixed = out.clone()
        mixed[:, heads, rows] = torch.lerp(out[:, heads, rows], v[:, of_value, rows].to(out.dtype), self.strength)
        return mixed


def _ranges(layers: Mapping[int, int]) -> str:
    return f"{min(layers)} to {max(layers)}" if layers else "none"


@contextmanager
def perturbed(model: nn.Module, perturbation: HeadPerturbation) -> Iterator[None]:
    """Forward passes of a transformer or U-Net inside the block run with perturbed heads.

    A model that is not sparsified runs dense, on its own attention; one that is, as its plan says.

    Raises:
        ValueError: an unknown model, a layer or head that it does not have.
    """
    own = not is_sparsified(model)
    if own:
        sparsify(model, AttentionPlan.uniform(Full()))
    try:
        runtime = injection_of(model).runtime
        runtime.dense_as_found = runtime.dense_as_found or own
        runtime.perturbing = Perturbing(perturbation, runtime)
        try:
            yield
        finally:
            runtime.perturbing = None
    finally:
        if own:
            restore(model)
