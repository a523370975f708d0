"""`sparsify`, `restore`, `report`: put a plan into a diffusers pipeline, take it out again, and say what ran."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsereel.checkpointing import Checkpoints
from sparsereel.families import Family, diffusers_seam, find, models_of
from sparsereel.patterns.base import Pattern
from sparsereel.plan import AttentionPlan
from sparsereel.presets import resolve_plan
from sparsereel.report import LayerReport, Report
from sparsereel.runtime import ModelRuntime
from sparsereel.search import transfer
from sparsereel.selectors.base import Selector
from sparsereel.sparse_layer import SparseLayer

if TYPE_CHECKING:
    from sparsereel.extend.extension import Extension

_ATTRIBUTE = "_sparsereel_injection"
_ON_PIPELINE = "_sparsereel_extension"

PlanLike = str | Path | AttentionPlan | Pattern | Selector


class Injection:
    """All that was changed on one model, so that it can be undone. Stored on the model, so copies take theirs along."""

    def __init__(self, model: nn.Module, family: Family, component: str, plan: AttentionPlan, backend: str) -> None:
        self.runtime = ModelRuntime(model, family, component, plan, backend)
        #: (attention module, its original processor, the one put in its place)
        self.replaced: list[tuple[nn.Module, Any, Any]] = []
        self.skipped: dict[str, str] = {}
        self.handles: list[Any] = []
        self.checkpoints: Checkpoints | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Injection:
        twin = object.__new__(Injection)
        memo[id(self)] = twin
        twin._register()
        vars(twin).update({k: copy.deepcopy(v, memo) for k, v in vars(self).items() if k != "_forget"})
        return twin

    def _register(self) -> None:
        diffusers_seam.REGISTRATION.acquire()
        # For a model that is thrown away and was never restored.
        self._forget = weakref.finalize(self, diffusers_seam.REGISTRATION.forget)
        self._forget.atexit = False

    def install(self, model: nn.Module) -> None:
        """Replace processors and add hooks; on any error everything is put back."""
        self._register()
        try:
            self._install(model)
        except BaseException:
            self.remove(model)
            raise
        setattr(model, _ATTRIBUTE, self)

    def _install(self, model: nn.Module) -> None:
        runtime, family = self.runtime, self.runtime.family
        layers = family.self_attention(model)
        heads = [family.heads(module) for _, module in layers]
        plans = runtime.plan.resolve(runtime.component, [name for name, _ in layers], heads)
        for index, ((name, module), plan) in enumerate(zip(layers, plans, strict=True)):
            processor = type(module.processor).__name__
            if processor not in family.processors:
                self.skipped[name] = f"attention processor {processor} is not understood"
                continue
            layer = SparseLayer(runtime, name, index, plan)
            runtime.layers.append(layer)
            runtime.attentions.append(module)
            original = diffusers_seam.replace_processor(module, layer, family.seam)
            self.replaced.append((module, original, module.processor))
        self.checkpoints = Checkpoints(model, runtime, [(m, o, p.sparsereel_layer) for m, o, p in self.replaced])
        self.handles.append(model.register_forward_pre_hook(self.checkpoints.wrap, prepend=True))
        self.handles.append(model.register_forward_pre_hook(runtime.before_forward, prepend=True, with_kwargs=True))
        self.handles += transfer.watch(model, runtime)
        self.handles.append(model.register_forward_hook(runtime.after_forward, always_call=True))
        if any(not layer.plan.uniform_full for layer in runtime.layers):
            order_hooks = family.install_order(model, runtime)
            runtime.orders_tokens = bool(order_hooks)
            self.handles += order_hooks

    def extend(self, model: nn.Module, extension: Extension) -> None:
        """Let an extension change this model's calls until `restore`.

        Raises:
            ValueError: the extension does not go with this model or plan; nothing is changed then.
        """
        extension.check_methods(self.runtime.methods(), self.runtime.plan.compensation)
        self.handles += extension.install(model, self.runtime)
        self.runtime.extension = extension

    def remove(self, model: nn.Module) -> None:
        """Put every processor back and remove every hook."""
        for module, original, announcer in self.replaced:
            diffusers_seam.put_back_processor(module, original, announcer)
        for handle in self.handles:
            handle.remove()
        if self.checkpoints is not None:
            self.checkpoints.unwrap()
        self.runtime.steps.close()
        self.runtime.selections.clear()
        self.runtime.residuals.held.clear()
        self.replaced.clear()
        self.handles.clear()
        if _ATTRIBUTE in vars(model):
            delattr(model, _ATTRIBUTE)
        if self._forget.detach():
            diffusers_seam.REGISTRATION.release()


def sparsify(pipe_or_model: Any, plan: PlanLike, *, backend: str = "auto") -> Report:
    """Make a diffusers pipeline (or one of its models) compute its self-attention as `plan` says.

    The pipeline is then called as before; `restore` brings back the untouched original, bit for bit. A second call
    replaces the plan. Layers that are not understood stay dense and are named in the report.

    Args:
        pipe_or_model: a diffusers pipeline, or a transformer / U-Net of a known family (compiled or not). The plan
            belongs to the model: pipelines that share it share the plan.
        plan: a preset name, the path of a plan file, an `AttentionPlan`, or a `Pattern` or `Selector` (then used for
            every self-attention head at every step).
        backend: kernel to run on, "auto" or a name that `sparsereel doctor` lists.

    Returns:
        The report: every self-attention layer, replaced or why not.

    Raises:
        ValueError: unknown plan, backend or model; a plan for another model; the text says what is allowed.
    """
    resolved = resolve_plan(plan)
    models = models_of(pipe_or_model)
    _check_backend(backend)
    diffusers_seam.check_versions()
    _check_plan(resolved, models)
    installed: list[nn.Module] = []
    try:
        for component, model in models.items():
            # What `extend` asked for outlives a change of plan.
            extension = extension_of(model)
            _remove(model)
            if _inject(pipe_or_model, model, component, resolved, backend, extension):
                installed.append(model)
    except BaseException:
        for model in installed:
            _remove(model)
        raise
    return report(pipe_or_model)


def restore(pipe_or_model: Any) -> None:
    """Bring back the original attention, and the attention backend that the user had set; harmless when untouched.

    Raises:
        ValueError: neither a diffusers pipeline nor a model of a known family.
    """
    for model in models_of(pipe_or_model).values():
        _remove(model)
    # What `extend` changed around the model; on_pipeline.py imports more than `import sparsereel` should.
    held = vars(pipe_or_model).pop(_ON_PIPELINE, None)
    if held is not None:
        held.remove()


@contextmanager
def sparsified(pipe_or_model: Any, plan: PlanLike, *, backend: str = "auto") -> Iterator[Report]:
    """`sparsify` for the length of a `with` block.

    Afterwards, also after exceptions and Ctrl-C, what was in force before is in force again: another plan, what
    `extend` asked for, or nothing. A `restore` inside the block is final.
    """
    before = {component: getattr(model, _ATTRIBUTE, None) for component, model in models_of(pipe_or_model).items()}
    result = sparsify(pipe_or_model, plan, backend=backend)
    try:
        yield result
    finally:
        _put_back(pipe_or_model, before)


def _put_back(pipe_or_model: Any, before: dict[str, Injection | None]) -> None:
    """Bring the injections of before back, by component; their reports begin anew."""
    models = models_of(pipe_or_model)
    if all(one is None for one in before.values()) or not any(map(is_sparsified, models.values())):
        restore(pipe_or_model)
        return
    for component, model in models.items():
        _remove(model)
        one = before.get(component)
        if one is None:
            continue
        runtime = one.runtime
        _inject(pipe_or_model, model, component, runtime.plan, runtime.backend, runtime.extension)
        injection_of(model).runtime.dense_as_found = runtime.dense_as_found


def _inject(
    owner: Any, model: nn.Module, component: str, plan: AttentionPlan, backend: str, extension: Extension | None
) -> bool:
    """Put a plan on an untouched model of `owner`, a pipeline or the model; False for a family that is not known."""
    family = find(model)
    if family is None:
        return False
    injection = Injection(model, family, component, plan, backend)
    injection.install(model)
    try:
        if extension is not None:
            injection.extend(model, extension)
        if not isinstance(owner, nn.Module):
            injection.runtime.steps.register(owner)
    except BaseException:
        injection.remove(model)
        raise
    return True


def report(pipe_or_model: Any, *, profile: bool = False) -> Report:
    """What runs in every self-attention layer, and what ran since `sparsify`.

    Args:
        pipe_or_model: as given to `sparsify`.
        profile: from now on also time every attention call (this synchronises a GPU each time); the seconds stand in
            later reports.

    Raises:
        ValueError: nothing here is sparsified.
    """
    models = models_of(pipe_or_model)
    injections = {c: getattr(m, _ATTRIBUTE) for c, m in models.items() if hasattr(m, _ATTRIBUTE)}
    if not injections:
        raise ValueError("nothing to report: sparsify has not been called on this pipeline or model")
    rows: list[LayerReport] = []
    for component, injection in injections.items():
        if profile:
            injection.runtime.profile = True
        rows += _rows(component, models[component], injection)
    plan = next(iter(injections.values())).runtime.plan
    return Report(plan=plan.describe(), layers=tuple(rows))


def is_sparsified(model: nn.Module) -> bool:
    """Whether `sparsify` (or `extend`) is in force on this model."""
    return isinstance(getattr(model, _ATTRIBUTE, None), Injection)


def injection_of(model: nn.Module) -> Injection:
    """What `sparsify` put on a model.

    Raises:
        ValueError: the model is not sparsified.
    """
    injection = getattr(model, _ATTRIBUTE, None)
    if not isinstance(injection, Injection):
        raise ValueError(f"{type(model).__name__} is not sparsified")
    return injection


def extension_of(model: nn.Module) -> Extension | None:
    """What `extend` asked of a model; None where it was not called."""
    injection = getattr(model, _ATTRIBUTE, None)
    return None if injection is None else injection.runtime.extension


def _rows(component: str, model: nn.Module, injection: Injection) -> list[LayerReport]:
    prefix = f"{component}."
    layers = {layer.name: layer for layer in injection.runtime.layers}
    rows = []
    for name, module in injection.runtime.family.self_attention(model):
        layer = layers.get(name)
        if layer is None:
            rows.append(LayerReport(prefix + name, replaced=False, reason=injection.skipped.get(name, "not replaced")))
        elif not diffusers_seam.is_replaced(module.processor):
            reason = f"its processor was exchanged for {type(module.processor).__name__} after sparsify"
            rows.append(LayerReport(prefix + name, replaced=False, reason=reason))
        else:
            rows.append(_row(prefix, layer))
    return rows


def _row(prefix: str, layer: SparseLayer) -> LayerReport:
    tally = layer.tally
    calls = tally.calls
    reasons = sorted(tally.dense_reasons.items(), key=lambda item: -item[1])
    return LayerReport(
        name=prefix + layer.name,
        replaced=True,
        reason="; ".join(f"{n} dense: {reason}" for reason, n in reasons),
        pattern=layer.plan.describe(),
        density=tally.density / calls if calls else None,
        token_density=tally.token_density / calls if calls else None,
        backend=tally.backend,
        calls=calls,
        dense_calls=calls - tally.sparse_calls,
        seconds=tally.seconds if layer.runtime.profile else None,
    )


def _check_backend(backend: str) -> None:
    from sparsereel_kernels.dispatch import BACKENDS

    names = ["auto", *(entry.name for entry in BACKENDS)]
    if backend not in names:
        raise ValueError(f"unknown backend {backend!r}; allowed: {', '.join(names)}")


def _check_plan(plan: AttentionPlan, models: dict[str, nn.Module]) -> None:
    """Refuse a plan that was made for another model before anything is touched."""
    for component, model in models.items():
        family = find(model)
        if family is None:
            continue
        layers = family.self_attention(model)
        heads = [family.heads(module) for _, module in layers]
        plan.check_model(family.name, type(model).__name__, len(layers), heads[0] if heads else 0)
        plan.resolve(component, [name for name, _ in layers], heads)
        if plan.compensation is not None:
            plan.compensation.check_model(len(layers))


def _remove(model: nn.Module) -> None:
    injection = getattr(model, _ATTRIBUTE, None)
    if injection is not None:
        injection.remove(model)
