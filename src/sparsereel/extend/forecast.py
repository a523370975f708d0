"""What a clip will cost, before anything is loaded: tokens, FLOPs, seconds of attention, memory.

The pipeline is put together on the meta device from its configuration files, so that a 14B checkpoint costs nothing to
look at. FLOPs count a multiplication and an addition as two. Seconds come from the cost table that `sparsereel bench
cost` measures, for self-attention alone; without a table there are none. Memory is an estimate for denoising: all
weights, and what the largest pass holds at its peak (memory.py); decoding the clip is not in it.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsereel.extend.drive import choose, notes_of
from sparsereel.extend.memory import activations, available, check
from sparsereel.extend.passes import passes, window_share
from sparsereel.extend.regional import Box
from sparsereel.extend.sizes import Sizes
from sparsereel.families import models_of
from sparsereel.grid import TokenGrid
from sparsereel.inspection import architecture_of, backend_here, inspect_plan
from sparsereel.plan import AttentionPlan
from sparsereel_kernels import cost


@dataclass(frozen=True)
class Forecast:
    """One clip.

    Attributes:
        arguments: what to call the pipeline with.
        target, trained: frames, height, width; pixels.
        tokens, trained_tokens: length of the self-attention sequence.
        method: what is changed, in short.
        steps, forwards: denoising steps, and forward passes of the whole clip.
        density: share of pairs (of a plan: of key blocks) that self-attention visits.
        attention_flops, other_flops: of the clip: self-attention's two products, and all other matrix products.
        attention_seconds: of the clip, on this machine; None without a cost table.
        passes: of the model over any number of tokens, windows and second paths counted.
        memory: bytes while denoising, the weights among them.
        memory_per_token: bytes that a token more would add.
        free: bytes that the device has left; None = unknown.
        sizes: trained and wanted, as `extend` understood them.
        notes: what the user should know.
    """

    arguments: dict[str, int]
    target: tuple[int, int, int]
    trained: tuple[int, int, int]
    tokens: int
    trained_tokens: int
    method: str
    steps: int
    forwards: int
    passes: float
    density: float
    attention_flops: float
    other_flops: float
    attention_seconds: float | None
    memory: float
    memory_per_token: float
    free: float | None
    sizes: Sizes
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "sizes"}

    def check(self) -> None:
        """Refuse a clip that does not fit in memory.

        Raises:
            ValueError: it needs more than is free; the text names the largest size that fits.
        """
        check(self.sizes, self.memory, self.free, self.memory_per_token)


def forecast(
    folder: Path,
    pipeline_class: Any,
    sizes: dict[str, Any],
    method: str,
    plan: AttentionPlan | None,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    regions: tuple[tuple[str, Box], ...] = (),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Forecast:
    """What an extended clip of the pipeline in `folder` will cost.

    Args:
        pipeline_class: the class that will be called; None = the one that the folder names.
        sizes: frames, height, width as `extend` takes them.
        regions: prompts for boxes of the picture; what their cross-attention adds is not counted.

    Raises:
        ValueError: as `extend`; a folder that holds no pipeline of a known kind.
    """
    pipe = meta_pipeline(folder, pipeline_class)
    models = models_of(pipe)
    model = next(iter(models.values()))
    wanted, recipe = choose(pipe, models, sizes.get("frames"), sizes.get("height"), sizes.get("width"), method)
    recipe = recipe.with_regions(regions)
    defaults = inspect.signature(type(pipe).__call__).parameters
    steps = int(steps or defaults["num_inference_steps"].default)
    guidance = float(defaults["guidance_scale"].default if guidance is None else guidance)
    forwards = steps * (2 if guidance > 1 else 1)
    runs = passes(recipe, wanted, forwards)
    frames, height, width = wanted.target_tokens
    grid, architecture = TokenGrid(frames, height, width), architecture_of(folder)
    found = None if plan is None else inspect_plan(plan, grid, architecture, steps=steps)
    layers = len(architecture.layers)
    each = 4.0 * architecture.head_dim * architecture.heads * layers
    windows = {run: window_share(recipe, wanted, run.tokens, layers) if run.windowed else 1.0 for run in runs}
    # What is shorter than the plan asks for stays dense, such as the small clip that leads a large one.
    sparse = {run: found is not None and plan is not None and run.total >= plan.schedule.min_tokens for run in runs}
    density = {run: found.density if found is not None and sparse[run] else 1.0 for run in runs}
    pairs = sum(run.count * run.total**2 * density[run] * windows[run] for run in runs)
    whole = sum(run.count * run.total**2 for run in runs)
    fit = cost.find(torch.device(device).type, dtype, architecture.head_dim, backend_here(grid.seq_len))
    if fit is None:
        seconds = None
    else:
        dense = [(architecture.heads * layers, 1.0, 1.0)]
        shares = dense if found is None else [(len(g.heads), g.density, g.done) for g in found.groups]
        seconds = sum(
            run.count * heads * fit.seconds(run.total, blocks * windows[run], done * windows[run])
            for run in runs
            for heads, blocks, done in (shares if sparse[run] else dense)
        )
    largest = max(runs, key=lambda run: run.total)
    held = activations(model, pipe, wanted, largest.tokens, dtype, device)
    memory = _weights(folder, models, dtype) + held
    return Forecast(
        arguments=wanted.arguments,
        target=wanted.target,
        trained=wanted.trained,
        tokens=grid.seq_len,
        trained_tokens=_product(wanted.trained_tokens),
        method=recipe.describe(),
        steps=steps,
        forwards=forwards,
        passes=sum(run.count for run in runs),
        density=pairs / whole,
        attention_flops=each * pairs,
        other_flops=sum(run.count * _linear_flops(model, run.total) for run in runs),
        attention_seconds=seconds,
        memory=memory,
        memory_per_token=held / largest.total,
        free=available(device),
        sizes=wanted,
        notes=notes_of(models, wanted, recipe) + ((found.note,) if found is not None and found.note else ()),
    )


def meta_pipeline(folder: Path, pipeline_class: Any = None) -> Any:
    """A pipeline without weights, text encoder or scheduler: sizes and configurations only.

    Raises:
        ValueError: no model_index.json, or one that names a class which diffusers does not have.
    """
    import diffusers

    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ValueError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    index = json.loads(index_file.read_text(encoding="utf-8"))
    cls = pipeline_class or getattr(diffusers, str(index.get("_class_name")), None)
    if cls is None:
        raise ValueError(f"{index_file} names {index.get('_class_name')!r}, which diffusers does not have")
    components: dict[str, Any] = {}
    for name, entry in index.items():
        if name.startswith("_"):
            continue
        components[name] = _on_meta(folder / name, entry) if isinstance(entry, list) else entry
    known = inspect.signature(cls.__init__).parameters
    return cls(**{name: value for name, value in components.items() if name in known})


def _on_meta(folder: Path, entry: list[Any]) -> nn.Module | None:
    """A component that sizes depend on; None for the others."""
    import diffusers

    cls = getattr(diffusers, str(entry[1]), None)
    file = folder / "config.json"
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and file.is_file()):
        return None
    with torch.device("meta"):
        return cls.from_config(json.loads(file.read_text(encoding="utf-8")))  # type: ignore[attr-defined]


def _product(sizes: tuple[int, int, int]) -> int:
    return sizes[0] * sizes[1] * sizes[2]


def _linear_flops(model: nn.Module, tokens: int) -> float:
    """Of the layers that every video token passes in one forward; text and timesteps are few and left out."""
    text = (".attn2.to_k", ".attn2.to_v", "add_k_proj", "add_v_proj")
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "blocks." in name and not name.endswith(text):
            total += 2.0 * module.weight.numel() * tokens
    return total


def _weights(folder: Path, models: dict[str, nn.Module], dtype: torch.dtype) -> float:
    """Bytes: transformers in `dtype`, other components as they lie in the folder."""
    own = sum(p.numel() for model in models.values() for p in model.parameters()) * dtype.itemsize
    others = (file for file in folder.glob("*/*.safetensors") if file.parent.name not in models)
    return float(own + sum(file.stat().st_size for file in others))
