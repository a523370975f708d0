"""Gradient checkpointing runs blocks of a model again in the backward pass. They must see the masks of the forward pass
that they repeat, whatever plan is in place by then, or gradients are silently wrong.

diffusers' models call `self._gradient_checkpointing_func(block, ...)`. While a model is sparsified that function is
wrapped, so that a block that runs again finds the choices of its own forward call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparsereel.families import diffusers_seam
from sparsereel.runtime import CallState, ModelRuntime
from sparsereel.sparse_layer import SparseLayer, in_backward

_FUNCTION = "_gradient_checkpointing_func"


class Checkpoints:
    """The checkpointed blocks of one sparsified model.

    Args:
        replaced: (attention module, its original processor, the layer that replaced it).
    """

    def __init__(
        self, model: nn.Module, runtime: ModelRuntime, replaced: list[tuple[nn.Module, Any, SparseLayer]]
    ) -> None:
        self.runtime = runtime
        self.replaced = replaced
        self.modules = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]

    def wrap(self, model: nn.Module, args: Any) -> None:
        """Forward pre-hook: users may switch checkpointing on at any time."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        for module in self.modules:
            function = vars(module).get(_FUNCTION)
            if module.gradient_checkpointing and function is not None and not isinstance(function, _Wrapped):
                setattr(module, _FUNCTION, _Wrapped(self, function))

    def unwrap(self) -> None:
        """Give every module its own function back."""
        for module in self.modules:
            function = vars(module).get(_FUNCTION)
            if isinstance(function, _Wrapped):
                setattr(module, _FUNCTION, function.original)

    @contextmanager
    def as_in(self, call: CallState) -> Iterator[None]:
        """Attention as it was in that forward call, also after `restore` or another plan."""
        outer = self.runtime.exchange(call)
        changed = [item for item in self.replaced if diffusers_seam.layer_of(item[0].processor) is not item[2]]
        present = [module.processor for module, _, _ in changed]
        diffusers_seam.REGISTRATION.acquire()
        try:
            for module, original, layer in changed:
                module.processor = diffusers_seam.announcing(original, layer, self.runtime.family.seam)
            yield
        finally:
            for (module, _, _), processor in zip(changed, present, strict=True):
                module.processor = processor
            diffusers_seam.REGISTRATION.release()
            self.runtime.exchange(outer)


class _Wrapped:
    """A model's checkpointing function whose blocks remember the forward call that they belong to."""

    def __init__(self, checkpoints: Checkpoints, original: Any) -> None:
        self.checkpoints = checkpoints
        self.original = original

    def __call__(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.original(block, *args, **kwargs)
        checkpoints, call = self.checkpoints, self.checkpoints.runtime.call_state()

        def run(*inputs: Any, **named: Any) -> Any:
            if not in_backward():
                return block(*inputs, **named)
            with checkpoints.as_in(call):
                return block(*inputs, **named)

        return self.original(run, *args, **kwargs)
