"""Looking on while a pipeline runs dense: every attention call, and what a model is made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparsereel.extend.extension import video_of
from sparsereel.families import find, models_of
from sparsereel.families.layout import Layout
from sparsereel.generation import Request
from sparsereel.inject import extension_of, injection_of, sparsified
from sparsereel.patterns import Full
from sparsereel.plan import AttentionPlan, ModelSpec
from sparsereel.step import StepInfo

if TYPE_CHECKING:
    from sparsereel.runtime import ModelRuntime

#: (component, layer number, layout, step, q, k, v, key lengths, scale)
Watcher = Callable[..., None]


class _Seen(Exception):
    """Thrown through a pipeline once a whole forward pass was seen."""


@dataclass(frozen=True)
class LayerFacts:
    """One attention layer of a component."""

    name: str
    layout: Layout
    heads: int
    head_dim: int


@dataclass(frozen=True)
class ModelFacts:
    """What a search has to know of a pipeline before it begins.

    Attributes:
        spec: what the plan is for.
        layers: by component and number of the layer, in forward order.
        steps: denoising steps of a run.
        ordered: whether the family puts tokens in tile order once a forward; elsewhere every call does.
        dtype, device_type: of attention.
        extended: what `extend` does, in short; empty where it was not called.
        fingerprint: of classes, configs, some weights and what `extend` does; recordings of another model are not taken
            up.
        led: whether a small result that is made first leads the run. Steps are then those of the large run, which may
            be fewer than asked for, and calls of the small one stay dense.
    """

    spec: ModelSpec
    layers: dict[tuple[str, int], LayerFacts]
    steps: int
    ordered: bool
    dtype: torch.dtype
    device_type: str
    extended: str
    fingerprint: str
    led: bool = False

    def geometry(self) -> list[list[int]]:
        """The distinct layouts of the layers, for calibration data."""
        return [list(layout) for layout in dict.fromkeys(layer.layout for layer in self.layers.values())]


@contextmanager
def watched(pipe: Any, watcher: Watcher, backend: str = "auto") -> Iterator[None]:
    """Runs inside are dense and show every eager self-attention call to `watcher`; of an extended model those of the
    size that was asked for."""
    with sparsified(pipe, AttentionPlan.uniform(Full()), backend=backend):
        for component, model in models_of(pipe).items():
            runtime = injection_of(model).runtime
            runtime.observer = _named(component, watcher, runtime)
        yield


def _named(component: str, watcher: Watcher, runtime: ModelRuntime) -> Callable[..., None]:
    def see(layer: Any, layout: Layout, step: StepInfo | None, *tensors: Any) -> None:
        # Of the whole call: layers may lie on coarser grids.
        tokens = None if runtime.layout is None else video_of(runtime.layout)
        extension = runtime.extension
        if extension is None or tokens is None or extension.sizes.matches(tokens):
            watcher(component, layer.index, layout, step, *tensors)

    return see


def run(pipe: Any, request: Request, output: str = "latent") -> torch.Tensor:
    """One call of the pipeline; its latents, or with output "np" its frames, as one tensor."""
    generator = torch.Generator("cpu").manual_seed(request.seed)
    with torch.inference_mode():
        result = pipe(request.prompt, generator=generator, output_type=output, **request.arguments())
    frames = result.frames if hasattr(result, "frames") else result.images
    return torch.as_tensor(frames).float().cpu().clone()


def look(pipe: Any, request: Request, backend: str) -> ModelFacts:
    """Run one forward pass of the pipeline and note its layers, grids and number of steps.

    Raises:
        ValueError: nothing that can be replaced ran, or the step is unknown.
    """
    layers: dict[tuple[str, int], LayerFacts] = {}
    seen: list[tuple[int, torch.dtype, str]] = []
    names = {(c, i): name for c, m in models_of(pipe).items() for i, name in enumerate(_layer_names(m))}

    def note(component: str, layer: int, layout: Layout, step: StepInfo | None, q: Any, *rest: Any) -> None:
        if (component, layer) in layers:
            raise _Seen
        if step is None:
            raise ValueError("the denoising step is unknown here, so choices cannot be made step by step")
        layers[component, layer] = LayerFacts(names[component, layer], layout, q.shape[1], q.shape[3])
        seen.append((step.total, q.dtype, q.device.type))

    try:
        with watched(pipe, note, backend):
            run(pipe, request)
    except _Seen:
        pass
    if not seen:
        raise ValueError("no self-attention layer of this pipeline can be replaced; `report` says why")
    total, dtype, device = seen[0]
    models = models_of(pipe)
    _add_twins(layers, models)
    ordered = all(family.orders_tokens for family in map(find, models.values()) if family)
    extension = extension_of(next(iter(models.values())))
    extended = "" if extension is None else extension.recipe.describe()
    led = extension is not None and extension.recipe.guide is not None
    return ModelFacts(_spec(models), layers, total, ordered, dtype, device, extended, fingerprint(models), led)


def _add_twins(layers: dict[tuple[str, int], LayerFacts], models: dict[str, torch.nn.Module]) -> None:
    """A second transformer, for later steps, has not run yet: it is like the first where class and layers are."""
    seen = {component for component, _ in layers}
    first = next(iter(layers))[0]
    for component, model in models.items():
        alike = type(model) is type(models[first]) and len(_layer_names(model)) == len(_layer_names(models[first]))
        if component not in seen and alike:
            layers |= {(component, n): facts for (name, n), facts in list(layers.items()) if name == first}


def _layer_names(model: torch.nn.Module) -> list[str]:
    family = find(model)
    return [] if family is None else [name for name, _ in family.self_attention(model)]


def _spec(models: dict[str, torch.nn.Module]) -> ModelSpec:
    """What all models have in common."""
    found = []
    for model in models.values():
        family = find(model)
        assert family is not None
        layers = family.self_attention(model)
        heads = {family.heads(module) for _, module in layers}
        found.append((family.name, type(model).__name__, len(layers), heads.pop() if len(heads) == 1 else None))
    family_name, class_name, count, heads_each = (
        values[0] if len(set(values)) == 1 else None for values in zip(*found, strict=True)
    )
    return ModelSpec(str(family_name or "any"), class_name, count, heads_each)


def fingerprint(models: dict[str, torch.nn.Module]) -> str:
    """Hash of classes, configs, the first attention weights, and what `extend` changes."""
    digest = hashlib.sha256()
    for name, model in sorted(models.items()):
        config = {k: v for k, v in dict(getattr(model, "config", {})).items() if not k.startswith("_")}
        digest.update(json.dumps([name, type(model).__name__, config], sort_keys=True, default=str).encode())
        extension = extension_of(model)
        if extension is not None:
            digest.update(repr((extension.sizes, extension.recipe)).encode())
        weights = next((p for key, p in model.named_parameters() if "attn" in key and p.ndim == 2), None)
        if weights is not None:
            digest.update(weights.detach()[:64].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
