"""What a plan would do on a model and a grid, without running the model: densities and attention FLOPs.

The model is built on the meta device from its config, so a 14B checkpoint costs nothing to look at.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sparsereel.families import find, orders_tokens
from sparsereel.files import replacing
from sparsereel.grid import TokenGrid
from sparsereel.kernel_choice import kernel_for
from sparsereel.patterns import Full, Pattern
from sparsereel.plan import AttentionPlan, LayerPlan
from sparsereel.token_order import Tile, best_tile, by_own_tile, mask_in_order, own_tile
from sparsereel_kernels import BlockMask
from sparsereel_kernels.cost import done_density, expected_share


@dataclass(frozen=True)
class HeadGroup:
    """Heads of one layer that do the same.

    Attributes:
        layer: number of the layer in forward order.
        heads: numbers of the heads.
        does: what they do, in short.
        density, token_density: shares of key blocks visited and of pairs allowed, mean over the steps.
        done: share of the pairs that the kernel here cannot leave out (`cost.done_density`), mean over the steps.
        flops: of the two matrix products of these heads in one forward pass, mean over the steps.
    """

    layer: int
    heads: tuple[int, ...]
    does: str
    density: float
    token_density: float
    done: float
    flops: float


@dataclass(frozen=True)
class Inspection:
    """A plan on a grid. `flops` and `dense_flops` are attention FLOPs of one forward pass."""

    plan: str
    grid: str
    tokens: int
    layers: int
    heads: int
    head_dim: int
    steps: int
    tile: tuple[int, int, int] | None
    groups: tuple[HeadGroup, ...]
    note: str

    @property
    def dense_flops(self) -> float:
        """Attention FLOPs of one dense forward pass."""
        return 4.0 * self.tokens**2 * self.head_dim * self.heads * self.layers

    @property
    def flops(self) -> float:
        """Attention FLOPs of one forward pass with the plan, mean over the steps."""
        return sum(group.flops for group in self.groups)

    @property
    def density(self) -> float:
        """Share of key blocks visited, mean over layers, heads and steps."""
        return self.flops / self.dense_flops

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "flops": self.flops, "dense_flops": self.dense_flops, "density": self.density}


@dataclass(frozen=True)
class Architecture:
    """What `inspect` needs of a model: its family, the names and heads of its self-attention layers, head_dim."""

    family: str
    component: str
    class_name: str
    layers: tuple[str, ...]
    heads: int
    head_dim: int


def architecture_of(folder: Path) -> Architecture:
    """The architecture of the first supported model in a diffusers pipeline folder, from its config alone.

    Raises:
        ValueError: no folder, no model of a known family in it.
    """
    import diffusers

    if not folder.is_dir():
        raise ValueError(f"the model folder {folder} does not exist")
    for config_file in sorted(folder.glob("*/config.json")):
        config = json.loads(config_file.read_text(encoding="utf-8"))
        model_class = getattr(diffusers, str(config.get("_class_name")), None)
        if model_class is None or not issubclass(model_class, nn.Module):
            continue
        with torch.device("meta"):
            model = model_class.from_config(config)
        if find(model) is not None:
            return _describe(model, config_file.parent.name)
    raise ValueError(f"{folder} holds no model of a known family")


def _describe(model: nn.Module, component: str) -> Architecture:
    family = find(model)
    if family is None or family.name == "stable_diffusion":
        raise ValueError(f"{type(model).__name__} has no single token grid, so it cannot be inspected without a run")
    layers = family.self_attention(model)
    module: Any = layers[0][1]
    heads = family.heads(module)
    names = tuple(name for name, _ in layers)
    return Architecture(family.name, component, type(model).__name__, names, heads, module.to_q.out_features // heads)


def inspect_plan(plan: AttentionPlan, grid: TokenGrid, model: Architecture, *, steps: int = 1) -> Inspection:
    """What `plan` does to `model` on `grid` in a run of `steps` steps.

    Raises:
        ValueError: the plan was made for another model.
    """
    plan.check_model(model.family, model.class_name, len(model.layers), model.heads)
    layers = plan.resolve(model.component, model.layers, [model.heads] * len(model.layers))
    schedule = plan.schedule
    note, short = "", grid.seq_len < schedule.min_tokens
    if short:
        note = f"all dense: {grid.seq_len} tokens are fewer than the plan's min_tokens {schedule.min_tokens}"
    elif any(layer.has_selectors for layer in layers):
        note = "selectors choose at run time: layers that hold any are counted as dense here"
    used = Counter(p for layer in layers for head in layer.heads for _, p in head if not isinstance(p, Full))
    every_call = not orders_tokens(model.family)
    kernel = backend_here(grid.seq_len, model.head_dim)
    tile = best_tile(used, grid, every_call=every_call, kernel=kernel) if used and not short else None
    groups: list[HeadGroup] = []
    full = 4.0 * grid.seq_len**2 * model.head_dim
    for layer in layers:
        for heads, does in _alike(layer):
            shares = _over_steps(plan, layer, heads[0], grid, tile, steps, model.head_dim, kernel, dense=short)
            groups.append(HeadGroup(layer.index, heads, does, *shares, flops=full * len(heads) * shares[0]))
    return Inspection(
        plan.describe(),
        str(grid),
        grid.seq_len,
        len(layers),
        model.heads,
        model.head_dim,
        steps,
        tile,
        tuple(groups),
        note,
    )


def _alike(layer: LayerPlan) -> list[tuple[tuple[int, ...], str]]:
    groups: dict[Any, list[int]] = {}
    for number, head in enumerate(layer.heads):
        # Heads of one pattern may still differ, such as shards of a strided pattern.
        own = tuple(
            (stretch, method.for_head(layer.index, number) if isinstance(method, Pattern) else method)
            for stretch, method in head
        )
        groups.setdefault(own, []).append(number)
    return [(tuple(heads), layer.describe_head(heads[0])) for heads in groups.values()]


def _over_steps(
    plan: AttentionPlan,
    layer: LayerPlan,
    head: int,
    grid: TokenGrid,
    tile: Tile | None,
    steps: int,
    head_dim: int,
    kernel: str,
    *,
    dense: bool,
) -> tuple[float, float, float]:
    """(density, token density, done), means over the steps."""
    shares = []
    for step in range(steps):
        # Selectors see q and k, which a look at the plan does not have: counted as dense, and said so.
        if dense or plan.schedule.dense_at(step, steps) or layer.has_selectors:
            shares.append((1.0, 1.0, 1.0))
            continue
        patterns = cast(tuple[Pattern, ...], layer.at(step, steps))
        each = tuple(pattern.for_head(layer.index, number) for number, pattern in enumerate(patterns))
        expected = 0.0
        for place, members in by_own_tile(each, grid, tile, kernel).items():
            mask = mask_in_order(tuple(each[number] for number in members), grid, place)
            expected += len(members) / len(each) * _expected_here(mask, kernel, head_dim)
        own = mask_in_order((each[head],), grid, own_tile(each[head], grid, tile, kernel))
        if own is None or expected > plan.schedule.max_density:
            shares.append((1.0, 1.0, 1.0))
        else:
            shares.append((own.density, own.token_density, done_density(own, kernel)))
    density, tokens, done = (sum(column) / steps for column in zip(*shares, strict=True))
    return density, tokens, done


#: what models are taken to run in; configs do not say
DTYPE = torch.bfloat16


def _device_here() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _expected_here(mask: BlockMask | None, kernel: str, head_dim: int) -> float:
    """Time over that of a dense call, on this machine, for a model in bf16."""
    return expected_share(mask, kernel, device_type=_device_here(), dtype=DTYPE, head_dim=head_dim)


def backend_here(tokens: int, head_dim: int = 64) -> str:
    """Name of the backend that would run a sparse call in bf16 on this machine."""
    return kernel_for("auto", _device_here(), DTYPE, tokens, head_dim=head_dim)


def plot(inspection: Inspection, path: Path) -> None:
    """A PNG: the density of every head of every layer.

    Raises:
        ValueError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    table = np.ones((inspection.layers, inspection.heads))
    for group in inspection.groups:
        table[group.layer, list(group.heads)] = group.density
    size = (max(4.5, 0.45 * inspection.heads + 2.5), max(3.0, 0.32 * inspection.layers + 1.6))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set(xlabel="head", ylabel="layer", title=f"density {inspection.density:.3f} on {inspection.grid}")
    axes.set_xticks(range(0, inspection.heads, max(1, inspection.heads // 12)))
    axes.set_yticks(range(0, inspection.layers, max(1, inspection.layers // 20)))
    if inspection.layers * inspection.heads <= 200:
        for (layer, head), value in np.ndenumerate(table):
            colour = "white" if value < 0.6 else "black"
            axes.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, label="share of key blocks visited")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
