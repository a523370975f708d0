"""What one sparsified model does at run time: which grid, which step, which mask, for each attention layer.

Which blocks a call visits is worked out in choosing.py. Eager calls ask for it in plain Python, compiled graphs through
the ops of compiled_ops.py.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from sparsereel import compiled_ops as compiled_ops  # its import makes the ops known to torch
from sparsereel.choosing import Request, choose, overhead, too_dear
from sparsereel.compensation.cached_residual import CachedResidual, Residuals
from sparsereel.extend.change import Where
from sparsereel.families.base import Family, OrderSource, layout_length, named
from sparsereel.families.diffusers_seam import blurs_queries, is_spread
from sparsereel.families.layout import Layout, decode, fixed
from sparsereel.kernel_choice import kernel_for
from sparsereel.launches import Choice, run_launches
from sparsereel.padding import bias_of, lengths_of
from sparsereel.patterns import Full
from sparsereel.plan import AttentionPlan
from sparsereel.plan_entries import Method
from sparsereel.sparse_layer import SparseLayer, in_backward
from sparsereel.step import StepInfo, StepSource, seed_of
from sparsereel.token_order import Tile, best_tile
from sparsereel_kernels import dispatch, run

if TYPE_CHECKING:
    from sparsereel.extend.change import Change
    from sparsereel.extend.extension import Extension
    from sparsereel.guidance.perturbation import Perturbing

logger = logging.getLogger("sparsereel")

#: reasons that are the plan's own wish: no warning
_DENSE_STEP = "dense step of the schedule"
_SMALL_CLIP = "a small clip, shorter than the plan's min_tokens, leads the large one"
_INTENDED = (_DENSE_STEP, _SMALL_CLIP, "the plan says full", "the compensation measures its residual")

#: sees every eager attention call: (layer, layout, step, q, k, v, key lengths, scale), tokens in the model's order
Observer = Callable[
    [
        SparseLayer,
        Layout,
        StepInfo | None,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor | None,
        float | None,
    ],
    None,
]

#: one forward call: layout, tile, what its layers chose
CallState = tuple[Layout | None, Tile | None, dict[SparseLayer, Choice | None]]


class ModelRuntime(OrderSource):
    """State of one sparsified model. Lives as long as its processors do; knows nothing of other models."""

    def __init__(
        self,
        model: torch.nn.Module,
        family: Family,
        component: str,
        plan: AttentionPlan,
        backend: str,
    ) -> None:
        # Not a decorator: it imports the compiler, which takes longer than all of `import sparsereel`.
        torch.compiler.assume_constant_result(ModelRuntime._tile_for)
        self.model_ref = weakref.ref(model)
        self.family = family
        self.component = component
        self.plan = plan
        self.backend = backend
        #: what `extend` asked for, if it was called
        self.extension: Extension | None = None
        #: dense calls run on what the layer had before, bit for bit
        self.dense_as_found = False
        #: time every eager attention call
        self.profile = False
        #: for recordings; None = nobody looks
        self.observer: Observer | None = None
        #: heads that a guider perturbs in this pass; None = none
        self.perturbing: Perturbing | None = None
        self.steps = StepSource()
        self.layers: list[SparseLayer] = []
        #: the modules of `layers`
        self.attentions: list[torch.nn.Module] = []
        # The call in progress.
        self.layout: Layout | None = None
        #: why the call in progress has no layout, where its family says so
        self.no_layout = ""
        self.tile: Tile | None = None
        self.chosen: dict[SparseLayer, Choice | None] = {}
        #: whether the family can put tokens in tile order; set when its hooks are installed
        self.orders_tokens = False
        #: whether calls may move their tokens by themselves; not where a process holds a part of them
        self._moves_calls = True
        #: numbers of the heads that this process holds in the call in progress, under context parallelism; None = all
        self.held_heads: range | None = None
        #: type of the device of the call in progress
        self._device_type = "cpu"
        self._tiles: dict[tuple[Layout, str], Tile | None] = {}
        self._layouts: dict[Layout, set[Layout]] = {}
        self._step: StepInfo | None = None
        self._step_known = False
        self._seed: int | None = None
        self._padding: tuple[torch.Tensor, int, torch.Tensor | None] | None = None
        self._announced: set[str] = set()
        #: what selectors remember, by layer, branch and geometry
        self.selections: dict[Any, Any] = {}
        #: what a compensation remembers, and the calls whose dense output it waits for
        self.residuals = Residuals({})
        self._to_measure: dict[SparseLayer, tuple[Any, int, Choice]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelRuntime:
        twin = object.__new__(ModelRuntime)
        memo[id(self)] = twin
        for key, value in vars(self).items():
            shared = key in ("model_ref", "family", "plan", "_padding")
            fresh = key in ("selections", "chosen", "_to_measure")
            setattr(twin, key, {} if fresh else value if shared else copy.deepcopy(value, memo))
        twin.residuals = Residuals({})
        copied = memo.get(id(self.model_ref()))
        twin.model_ref = self.model_ref if copied is None else weakref.ref(copied)
        return twin

    # -------------------------------------------------------------- hooks

    def before_forward(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook: note the grid of this call. Runs inside `torch.compile` too, so: shapes and ints only."""
        arguments = named(self.family.parameters, args, kwargs)
        found = self.family.layout(model, arguments)
        self.no_layout = found if isinstance(found, str) else ""
        layout = None if isinstance(found, str) else found
        self.layout = layout
        self._device_type = _device_type(arguments)
        spread = is_spread(model)
        if spread and (self.extension is not None or self.perturbing is not None):
            raise ValueError(
                "extended models and perturbed heads do not go with context parallelism; generate in one process"
            )
        # A process that holds a part of the tokens cannot put them all in order.
        self._moves_calls = not spread
        ordered = self.orders_tokens and layout is not None and not spread
        ordered = ordered and not any(map(blurs_queries, self.attentions))
        self.tile = self._tile_for(fixed(layout), self._device_type) if ordered and layout is not None else None
        if not torch.compiler.is_compiling():
            self._step_known = False
            self._seed = None
            self._padding = None
            self.chosen = {}
            for layer in self.layers:
                layer.reached = False

    def after_forward(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        """Forward hook: name layers that were meant to be sparse but never ran through us."""
        self.layout = None
        self.tile = None
        if torch.compiler.is_compiling():
            return
        self._padding = None
        missed = [layer.name for layer in self.layers if not layer.reached and not layer.tally.calls]
        if missed and len(missed) < len(self.layers):
            self._warn_missed(missed)

    def _warn_missed(self, missed: list[str]) -> None:
        key = "missed:" + ",".join(missed)
        if key not in self._announced:
            self._announced.add(key)
            shown = ", ".join(missed[:4]) + (f" and {len(missed) - 4} more" if len(missed) > 4 else "")
            logger.warning("%s: marked as replaced, but this forward did not reach it; it ran as it was", shown)

    def call_state(self) -> CallState:
        """The call in progress, for blocks that gradient checkpointing runs again later."""
        return self.layout, self.tile, self.chosen

    def exchange(self, state: CallState) -> CallState:
        """Take up a call of before; returns the state that it replaces."""
        outer = self.call_state()
        self.layout, self.tile, self.chosen = state
        return outer

    @contextmanager
    def holding(self, heads: range) -> Iterator[None]:
        """Calls inside the block hold these heads only, by their numbers in the model."""
        self.held_heads = heads
        try:
            yield
        finally:
            self.held_heads = None

    # -------------------------------------------------------------- geometry

    def layer_layout(self, length: int) -> Layout | None:
        """The layout of a layer with `length` tokens in the call in progress."""
        return None if self.layout is None else self.family.layer_layout(self.layout, length)

    def call_order(self, like: torch.Tensor, *, inverse: bool) -> torch.Tensor | None:
        if self.tile is None or self.layout is None:
            return None
        return torch.ops.sparsereel.token_order(like, list(self.layout), list(self.tile), inverse)

    def _tile_for(self, layout: Layout, device_type: str) -> Tile | None:
        key = (layout, device_type)
        if key not in self._tiles:
            grid = decode(layout)
            enough = grid.seq_len >= self.plan.schedule.min_tokens
            kernel = self.kernel_of_order(grid.seq_len, device_type)
            every_call = not self.orders_tokens
            self._tiles[key] = best_tile(self.methods(), grid, every_call=every_call, kernel=kernel) if enough else None
        return self._tiles[key]

    def kernel_of_order(self, tokens: int, device_type: str) -> str:
        """The kernel that tokens are put in order for; every call of a device has the same, whatever its dtype."""
        return kernel_for(self.backend, device_type, torch.float32, tokens)

    def methods(self) -> Counter[Method]:
        """How many heads of how many layers follow each pattern or selector at some step."""
        heads = [head for layer in self.layers for head in layer.plan.heads]
        return Counter(method for head in heads for _, method in head if not isinstance(method, Full))

    def change(self, layer: SparseLayer, layout: Layout, device: torch.device) -> Change | None:
        """What an extension changes in a call of this layer; None where it changes nothing."""
        if self.extension is None:
            return None
        if self.layout is not None:
            self._layouts.setdefault(self.layout, set()).add(layout)
        where = Where(layer.name, layer.index, layout, self.layout or layout, self.tile_of(layout), device)
        return self.extension.change(where, self)

    @property
    def layouts_seen(self) -> set[Layout]:
        """Layouts of the layers that ran so far in any call of this size; U-Nets have one a level."""
        return self._layouts.get(self.layout, set()) if self.layout is not None else set()

    def may_change(self, layout: Layout) -> bool:
        """Whether an extension may change attention in the call in progress."""
        return self.extension is not None and self.extension.touches_attention(self.layout or layout)

    def tile_of(self, layout: Layout) -> Tile | None:
        """The token order of a layer with this layout in the call in progress; None = grid order."""
        return self.tile if layout == self.layout else None

    def may_move(self, layout: Layout, *, padded: bool) -> bool:
        """Whether calls with this layout may put their own tokens, or those of some heads, in another order.

        Not where a process holds a part of them, or an output is kept for other calls.

        Args:
            padded: key lengths differ between samples; they must not cut what is moved.
        """
        compensation = self.plan.compensation
        if not self._moves_calls or (compensation is not None and compensation.remembers):
            return False
        if not padded:
            return True
        grid = decode(layout)
        return grid.video_start + grid.video_len < grid.seq_len

    def call_tile(self, layout: Layout, *, padded: bool = False) -> Tile | None:
        """The order that a call with this layout puts its own tokens in, where its family does not once a forward."""
        if self.orders_tokens or not self.may_move(layout, padded=padded):
            return None
        return self._tile_for(fixed(layout), self._device_type)

    # -------------------------------------------------------------- choice

    def step(self) -> StepInfo | None:
        """The step in progress; looked up once a forward where the hook runs eagerly."""
        model = self.model_ref()
        if model is None:
            return None
        if not self._step_known:
            self._step = self.steps.current(model)
            self._step_known = True
        return self._step

    def seed(self) -> int:
        """Seed of the generator that the pipeline in progress draws from; looked up once a forward."""
        model = self.model_ref()
        if self._seed is None and model is not None:
            self._seed = seed_of(model)
        return self._seed or 0

    def select(
        self,
        layer: SparseLayer,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        key_lengths: torch.Tensor | None = None,
        scale: float | None = None,
        *,
        one_mask: bool = False,
    ) -> Choice | None:
        """What this call of `layer` runs, or None for dense; counted and, when new, announced.

        Args:
            one_mask: the caller takes one mask and no launches with orders of their own.
        """
        if in_backward():
            return self.repeat(layer)
        self._to_measure.pop(layer, None)
        step, reason = self._sparse_step(layer, layout)
        choice = None
        if step is not None:
            asked = self._request(layer, layout, step, step.index, q, k, key_lengths, scale)
            choice = choose(self, replace(asked, one_mask=one_mask))
            reason = "the plan says full" if choice is None else too_dear(self, choice, q, overhead(self, asked))
            if choice is not None and not reason:
                choice, reason = self._with_residual(asked, choice)
        elif reason == _DENSE_STEP:
            self._prepare_residual(layer, layout, q, k, key_lengths, scale)
        if choice is None or reason:
            layer.count_dense(reason)
            return None
        layer.count_sparse(choice)
        return choice

    def select_padded(
        self,
        layer: SparseLayer,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        key_lengths: torch.Tensor | None,
        scale: float | None,
        bias: Any,
    ) -> Choice | None:
        """`select`, for a call whose padding may be a bias: means of blocks would hold keys that nobody may see."""
        if bias is not None and self.plan.compensation is not None and not in_backward():
            layer.count_dense("a compensation does not go with a padding mask whose kept keys are no prefix")
            return None
        return self.select(layer, layout, q, k, key_lengths, scale)

    def _request(
        self,
        layer: SparseLayer,
        layout: Layout,
        step: StepInfo,
        planned: int,
        q: torch.Tensor,
        k: torch.Tensor,
        key_lengths: torch.Tensor | None,
        scale: float | None,
    ) -> Request:
        """This call at this step, doing what the plan says for step `planned`."""
        methods = layer.plan.at(planned, step.total)
        if self.held_heads is not None:
            methods = tuple(methods[head] for head in self.held_heads)
        counts = layer.has_selectors or (self.plan.compensation is not None and self.plan.compensation.remembers)
        branch = layer.branch_at(step) if counts else ""
        return Request(layer, methods, layout, step, q, k, key_lengths, scale, branch)

    def _with_residual(self, asked: Request, choice: Choice) -> tuple[Choice | None, str]:
        """The choice with what its compensation remembers; None and the reason where that has to be measured first."""
        method = self.plan.compensation
        if not isinstance(method, CachedResidual):
            return choice, ""
        residual = self.residuals.at(asked.key, asked.step.index, method.every)
        if residual is not None:
            return replace(choice, residual=residual), ""
        self._to_measure[asked.layer] = (asked.key, asked.step.index, choice)
        return None, "the compensation measures its residual"

    def _prepare_residual(
        self,
        layer: SparseLayer,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        key_lengths: torch.Tensor | None,
        scale: float | None,
    ) -> None:
        """At the last dense step before sparse ones: note what the next step would skip, to be measured here."""
        step, schedule = self.step(), self.plan.schedule
        if not isinstance(self.plan.compensation, CachedResidual) or step is None:
            return
        if step.index + 1 >= step.total or schedule.dense_at(step.index + 1, step.total):
            return
        asked = self._request(layer, layout, step, step.index + 1, q, k, key_lengths, scale)
        choice = choose(self, asked)
        if choice is not None and not too_dear(self, choice, q, overhead(self, asked)):
            self._to_measure[layer] = (asked.key, step.index, choice)

    def measure(self, layer: SparseLayer, q: Any, k: Any, v: Any, dense: torch.Tensor, options: dict[str, Any]) -> None:
        """A dense call is done: where a compensation waits for it, remember what sparsity would have lost."""
        waiting = self._to_measure.pop(layer, None)
        if waiting is not None:
            key, step, choice = waiting
            with torch.no_grad():
                self.residuals.hold(key, step, dense, run_launches(q, k, v, choice, **options))

    def repeat(self, layer: SparseLayer) -> Choice | None:
        """The choice of a call that gradient checkpointing runs again: the one that its first run saw."""
        return self.chosen.get(layer, layer.last_choice)

    def _sparse_step(self, layer: SparseLayer, layout: Layout) -> tuple[StepInfo | None, str]:
        """The step, where the schedule allows sparsity; else None and the reason."""
        schedule = self.plan.schedule
        if layer.plan.uniform_full:
            return None, "the plan says full"
        tokens = layout_length(layout)
        if tokens < schedule.min_tokens:
            if self.extension is not None and self.extension.is_led_by(self.layout):
                return None, _SMALL_CLIP
            return None, f"{tokens} tokens are fewer than the plan's min_tokens {schedule.min_tokens}"
        step = self.step()
        if step is None:
            remembers = self.plan.compensation is not None and self.plan.compensation.remembers
            if schedule.needs_step or layer.plan.needs_step or remembers:
                return None, "the denoising step is unknown and the plan depends on it"
            return StepInfo(0, 1), ""
        if schedule.dense_at(step.index, step.total):
            return None, _DENSE_STEP
        return step, ""

    def kernel(self, q: torch.Tensor, block: tuple[int, int] | None) -> str:
        """Name of the backend that will run a call with this q (B, H, S, D)."""
        problem = run.problem_of(q, q, q, None, None, None, run.Wants())
        return dispatch.choose(self.backend, replace(problem, block=block), None).name

    def own_dense(self, q: torch.Tensor) -> bool:
        """Whether dense calls run on our kernel: on a CPU whose native kernels are there, which beat torch's own."""
        if self.dense_as_found or self.backend not in ("auto", "cpu"):
            return False
        if q.device.type != "cpu" or torch.is_grad_enabled():
            return False
        return self.kernel(q, None) == "cpu"

    def key_padding(self, attn_mask: torch.Tensor | None) -> tuple[torch.Tensor | None, Any]:
        """(key_lengths, modifier) for a key-padding mask (B, 1, 1, keys); worked out once for all layers of a call."""
        if attn_mask is None:
            return None, None
        # A compiled graph may be handed the same tensor with other values.
        version = -1 if attn_mask.is_inference() else attn_mask._version
        if self._padding is None or self._padding[0] is not attn_mask or self._padding[1] != version:
            self._padding = (attn_mask, version, lengths_of(attn_mask))
        lengths = self._padding[2]
        return (lengths, None) if lengths is not None else (None, bias_of(attn_mask))

    def announce(self, reason: str, layer: str) -> None:
        """Say once why something stays dense."""
        if reason in self._announced:
            return
        self._announced.add(reason)
        level = logging.DEBUG if reason in _INTENDED else logging.WARNING
        logger.log(level, "%s.%s stays dense: %s", self.component, layer, reason)


def _device_type(arguments: Mapping[str, Any]) -> str:
    """Where a model's call runs."""
    for value in arguments.values():
        if isinstance(value, torch.Tensor):
            return value.device.type
    return "cpu"
