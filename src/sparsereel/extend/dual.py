"""FreeSwim's second path (arXiv 2511.14712): text is asked with a view of the whole, its answer kept for some steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sparsereel.families.base import by_suffix
from sparsereel.step import StepInfo

if TYPE_CHECKING:
    from sparsereel.extend.extension import Extension
    from sparsereel.runtime import ModelRuntime


@dataclass(frozen=True)
class DualPath:
    """Windows alone draw the subject once in each; the cross-attention of an unwindowed pass says where it belongs.

    On guide steps the model runs twice on the same latents: first whole, whose cross-attention outputs are kept block
    by block, then in windows, where they take the place of the windowed ones. Other steps use what was kept. Steps
    after `until` are windowed only. With `every` = 1 every call has its whole pass, as in the authors' uncached form;
    with more, only the first call of a step has one (the prompt's), as in their cached form.

    Args:
        every: steps from one guide step to the next; the authors' 2 to 5. Fewer is slower.
        until: share of the steps that have the second path; the authors' 40 of 50.
        offload: keep the outputs on the CPU: a block's are tokens x width, which for a 1080p clip of Wan is half a
            gigabyte each.

    Raises:
        ValueError: every below 1, until outside [0, 1].
    """

    every: int = 5
    until: float = 0.8
    offload: bool = False

    name: ClassVar[str] = "dual path"

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.until <= 1:
            raise ValueError(f"the dual path needs every >= 1 and until in [0, 1], got {self.every} and {self.until}")

    def install(self, model: nn.Module, extension: Extension, runtime: ModelRuntime) -> list[Any]:
        """Put both passes in the place of the model's forward; returns handles with `.remove()`.

        Raises:
            ValueError: no window, without which both paths are the same; a model without cross-attention.
        """
        if extension.recipe.window is None:
            raise ValueError("the dual path goes with a window, without which both paths are the same")
        layers = [module for name, module in by_suffix(model, [".attn2"]) if name.startswith("blocks.")]
        if not layers:
            raise ValueError(f"{type(model).__name__} has no cross-attention for the dual path")
        return [TwoPasses(self, model, layers, extension, runtime)]


class TwoPasses:
    """Stands in for the forward of one model."""

    def __init__(
        self, dual: DualPath, model: Any, layers: list[nn.Module], extension: Extension, runtime: ModelRuntime
    ) -> None:
        self.dual = dual
        self.model = model
        self.extension = extension
        self.runtime = runtime
        #: kept outputs by number of the call at a step, one a block
        self.kept: dict[int, list[Tensor]] = {}
        self.recording: list[Tensor] | None = None
        self.replaying: list[Tensor] | None = None
        self._step: StepInfo | None = None
        self._call = 0
        self._inside = False
        #: what others had set on the instance, such as hooks that move weights
        self.found = vars(model).get("forward")
        model.forward = self.forward
        self.handles = [layer.register_forward_hook(self.cross_attended) for layer in layers]

    def remove(self) -> None:
        """Leave the instance as it was."""
        for handle in self.handles:
            handle.remove()
        self.kept.clear()
        if self.found is None:
            vars(self.model).pop("forward", None)
        else:
            self.model.forward = self.found

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        if self.found is not None:
            return self.found(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)

    def cross_attended(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """After a block's cross-attention: keep it, or put what was kept in its place."""
        if self.recording is not None:
            self.recording.append(output.cpu() if self.dual.offload else output)
        elif self.replaying:
            return self.replaying.pop(0).to(output.device)
        return None

    # Several passes, which the step decides on: nothing that a graph could hold.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whole and windowed where the call is an extended one."""
        layout = self.runtime.layout
        tokens = None if layout is None else (layout[1], layout[2], layout[3])
        if self._inside or tokens is None or not self.extension.concerns(tokens):
            return self.plain(*args, **kwargs)
        step = self.runtime.step()
        number = self._number(step)
        if step is None or step.index >= step.total * self.dual.until or (number and self.dual.every > 1):
            self.kept.pop(number, None)
            return self.plain(*args, **kwargs)
        if step.index % self.dual.every == 0 or number not in self.kept:
            self.kept[number] = self._whole(args, kwargs)
        self.replaying = list(self.kept[number])
        try:
            return self.plain(*args, **kwargs)
        finally:
            self.replaying = None

    def _whole(self, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
        """Cross-attention outputs of a pass without the window."""
        kept: list[Tensor] = []
        call = self.runtime.call_state()
        self._inside, self.recording, self.extension.whole = True, kept, True
        try:
            self.model(*args, **kwargs)
        finally:
            self._inside, self.recording, self.extension.whole = False, None, False
            # The windowed pass goes on in the call that the whole one was made from.
            self.runtime.exchange(call)
        return kept

    def _number(self, step: StepInfo | None) -> int:
        """Which call of a step this is; guidance branches are calls of their own, in a fixed order."""
        if step is None or step != self._step:
            if step is None or (self._step is not None and step.index < self._step.index):
                self.kept.clear()
            self._step, self._call = step, -1
        self._call += 1
        return self._call
