"""What one sparsified model does at run time: which grid, which step, which mask, for each attention layer.

Eager calls choose their mask in plain Python. Inside `torch.compile` the choice is the custom op `select_mask`, which
runs when the graph runs (the step lives in the scheduler, out of the graph's sight) and returns the name of an
immutable mask; so one compiled block serves every layer, step and plan.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sparsereel.compensation.cached_residual import CachedResidual, Residuals
from sparsereel.extend.change import Where
from sparsereel.families.base import Family, OrderSource, layout_length, named
from sparsereel.families.diffusers_seam import blurs_queries
from sparsereel.families.layout import Layout, decode, fixed
from sparsereel.grid import Permutation
from sparsereel.launches import Choice, Launch, run_launches
from sparsereel.padding import bias_of, lengths_of
from sparsereel.patterns import Full
from sparsereel.patterns.base import Pattern
from sparsereel.plan import AttentionPlan
from sparsereel.plan_entries import Method
from sparsereel.selectors import SelectionContext, Selector, refreshing
from sparsereel.selectors.refresh import served_steps
from sparsereel.sparse_layer import LAYERS, SparseLayer, in_backward, one_modifier
from sparsereel.step import StepInfo, StepSource, seed_of
from sparsereel.token_order import BLOCK, MASKS, Tile, best_tile, outside_video, tile_order
from sparsereel_kernels import dispatch, run, sparse_attention
from sparsereel_kernels.attention import mask_name
from sparsereel_kernels.cost import expected_share

if TYPE_CHECKING:
    from sparsereel.extend.change import Change
    from sparsereel.extend.extension import Extension
    from sparsereel.guidance.perturbation import Perturbing

logger = logging.getLogger("sparsereel")

#: seconds of an operation of a selector over those of dense attention, on a CPU (benchmarks/selection.py: SparseD's
#: exact probe is half of the operations of a dense call and takes twice its time)
SELECTING = 4.0

#: reasons that are the plan's own wish: no warning
_DENSE_STEP = "dense step of the schedule"
_INTENDED = (_DENSE_STEP, "the plan says full", "the compensation measures its residual")


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
        self._tiles: dict[Layout, Tile | None] = {}
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
        ordered = self.orders_tokens and layout is not None and not any(map(blurs_queries, self.attentions))
        self.tile = self._tile_for(fixed(layout)) if ordered and layout is not None else None
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

    # -------------------------------------------------------------- geometry

    def layer_layout(self, length: int) -> Layout | None:
        """The layout of a layer with `length` tokens in the call in progress."""
        return None if self.layout is None else self.family.layer_layout(self.layout, length)

    def call_order(self, like: torch.Tensor, *, inverse: bool) -> torch.Tensor | None:
        if self.tile is None or self.layout is None:
            return None
        return torch.ops.sparsereel.token_order(like, list(self.layout), list(self.tile), inverse)

    def _tile_for(self, layout: Layout) -> Tile | None:
        if layout not in self._tiles:
            grid = decode(layout)
            enough = grid.seq_len >= self.plan.schedule.min_tokens
            self._tiles[layout] = best_tile(self.methods(), grid) if enough else None
        return self._tiles[layout]

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
    ) -> Choice | None:
        """What this call of `layer` runs, or None for dense; counted and, when new, announced."""
        if in_backward():
            return self.repeat(layer)
        self._to_measure.pop(layer, None)
        step, reason = self._sparse_step(layer, layout)
        choice = None
        if step is not None:
            asked = self._request(layer, layout, step, step.index, q, k, key_lengths, scale)
            choice = self._choose(asked)
            overhead = self._overhead(asked)
            reason = "the plan says full" if choice is None else self._too_dear(choice, q, overhead)
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
    ) -> _Request:
        """This call at this step, doing what the plan says for step `planned`."""
        methods = layer.plan.at(planned, step.total)
        counts = layer.has_selectors or (self.plan.compensation is not None and self.plan.compensation.remembers)
        branch = layer.branch_at(step) if counts else ""
        return _Request(layer, methods, layout, step, q, k, key_lengths, scale, branch)

    def _with_residual(self, asked: _Request, choice: Choice) -> tuple[Choice | None, str]:
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
        choice = self._choose(asked)
        if choice is not None and not self._too_dear(choice, q, self._overhead(asked)):
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

    def _choose(self, asked: _Request) -> Choice | None:
        """Launches for all heads; None where every head is full."""
        static = {h: m for h, m in enumerate(asked.methods) if isinstance(m, Pattern)}
        chosen: dict[Selector, list[int]] = {}
        for head, method in enumerate(asked.methods):
            if isinstance(method, Selector):
                chosen.setdefault(method, []).append(head)
        heads = len(asked.methods)
        tile = self.tile_of(asked.layout)
        order = None if tile is None else tile_order(asked.layout, tile)
        launches: list[Launch] = []
        if static:
            patterns = tuple(p.for_head(asked.layer.index, head) for head, p in static.items())
            change = self.change(asked.layer, asked.layout, asked.q.device)
            if change is not None:
                patterns = tuple(change.within(p) for p in patterns)
            grid = decode(asked.layout)
            mask = MASKS.get(patterns, grid, block=BLOCK, device=asked.q.device, layer=asked.layer.index, order=order)
            if mask is None and not chosen:
                return None
            launches.append(Launch(tuple(static) if chosen else None, mask))
        for selector, numbers in chosen.items():
            everyone = len(numbers) == heads
            launches.append(self._selected(asked, selector, None if everyone else tuple(numbers), order))
        choice = Choice.of(launches, heads)
        compensation = self.plan.compensation
        if compensation is None:
            return choice
        isolated = outside_video(asked.layout, tile).to(asked.q.device)
        return replace(choice, compensation=compensation, isolated=isolated, layer=asked.layer.index)

    def _selected(
        self, asked: _Request, selector: Selector, heads: tuple[int, ...] | None, order: Permutation | None
    ) -> Launch:
        q, k = asked.q, asked.k
        if heads is not None:
            shared = [head * k.shape[1] // q.shape[1] for head in heads]
            q, k = q[:, list(heads)], k[:, shared]
        context = SelectionContext(
            grid=decode(asked.layout),
            block=BLOCK,
            scale=asked.scale,
            layer=asked.layer.index,
            step=asked.step.index,
            steps=asked.step.total,
            branch=asked.branch,
            key_lengths=asked.key_lengths,
            order=order,
            heads=heads,
            state=self.selections,
        )
        selection = refreshing(selector, q, k, context)
        return Launch(heads, selection.mask, selection)

    def _overhead(self, asked: _Request) -> float:
        """What choosing blocks costs a call, as a share of a dense call, spread over the calls that it serves."""
        chosen = Counter(method for method in asked.methods if isinstance(method, Selector))
        if not chosen or self.plan.schedule.max_density >= 1:
            return 0.0
        grid, head_dim = decode(asked.layout), asked.q.shape[-1]
        dense = 4.0 * grid.seq_len**2 * head_dim * len(asked.methods)
        spent = (
            m.cost(grid, BLOCK, heads, head_dim) / served_steps(m, asked.step.total) for m, heads in chosen.items()
        )
        return SELECTING * sum(spent) / dense

    def _too_dear(self, choice: Choice, q: torch.Tensor, overhead: float) -> str:
        """Why a choice is not worth running; empty where it is."""
        limit = self.plan.schedule.max_density
        if choice.density + overhead <= limit:
            return ""
        kernel = self.kernel(q, BLOCK)
        kind: dict[str, Any] = {"device_type": q.device.type, "dtype": q.dtype, "head_dim": q.shape[-1]}
        heads = [q.shape[1] if launch.heads is None else len(launch.heads) for launch in choice.launches]
        shares = [expected_share(launch.mask, kernel, **kind) for launch in choice.launches]
        share = sum(n * s for n, s in zip(heads, shares, strict=True)) / sum(heads)
        if share + overhead <= limit:
            return ""
        choosing = f" and choosing blocks {overhead:.2f}" if overhead else ""
        text = f"density {choice.density:.2f} (of tokens {choice.token_density:.2f}) costs {share:.2f}{choosing}"
        return f"{text} of a dense call, above the plan's max_density {limit:g}"

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


@dataclass(frozen=True, eq=False)
class _Request:
    """One call of a layer at a step where it may be sparse."""

    layer: SparseLayer
    methods: tuple[Method, ...]
    layout: Layout
    step: StepInfo
    q: torch.Tensor
    k: torch.Tensor
    key_lengths: torch.Tensor | None
    scale: float | None
    branch: str

    @property
    def key(self) -> Any:
        """What residuals are kept for."""
        return self.layer.index, self.branch, self.layout, tuple(self.q.shape)


# ------------------------------------------------------------------ ops that run when a compiled graph runs
#
# No hook has said there that a new forward began: the step is looked up at every call.


def _layer_of(slot: torch.Tensor) -> SparseLayer:
    layer = LAYERS.get(int(slot))
    if layer is None:
        raise RuntimeError("a compiled graph asks for a sparse layer that no longer exists; compile the model again")
    layer.runtime._step_known = False
    return layer


# It changes nothing; an op without results and effects would be dropped from the graph.
@torch.library.custom_op("sparsereel::note_dense", mutates_args=("slot",))
def note_dense(slot: torch.Tensor, reason: str) -> None:
    """A call of layer `slot` was left as it was."""
    layer = _layer_of(slot)
    if not in_backward():
        layer.count_dense(reason)


@note_dense.register_fake
def _(slot: torch.Tensor, reason: str) -> None:
    return None


@torch.library.custom_op("sparsereel::select_mask", mutates_args=())
def select_mask(slot: torch.Tensor, q: torch.Tensor, k: torch.Tensor, layout: list[int]) -> torch.Tensor:
    """Name (0-d int64, CPU) of the mask that layer `slot`, whose heads follow patterns, uses in this call."""
    layer = _layer_of(slot)
    choice = layer.runtime.select(layer, tuple(layout), q, k)
    if choice is not None:
        layer.note_backend(q, k, k, choice)
    return mask_name(None if choice is None else choice.only_mask).clone()


@select_mask.register_fake
def _(slot: torch.Tensor, q: torch.Tensor, k: torch.Tensor, layout: list[int]) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64)


@torch.library.custom_op("sparsereel::attend_layer", mutates_args=())
def attend_layer(
    slot: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale: float | None,
    layout: list[int],
) -> torch.Tensor:
    """The whole attention of layer `slot`, whose selectors may move tokens. Inference only: it has no gradient."""
    layer = _layer_of(slot)
    runtime = layer.runtime
    lengths, bias = runtime.key_padding(attn_mask)
    choice = runtime.select_padded(layer, tuple(layout), q, k, lengths, scale, bias)
    change = runtime.change(layer, tuple(layout), q.device)
    modifier = one_modifier(bias, None if change is None else change.modifier)
    options: dict[str, Any] = {
        "scale": scale,
        "key_lengths": lengths,
        "modifier": modifier,
        "backend": runtime.backend,
    }
    if choice is not None:
        layer.note_backend(q, k, v, choice)
    if change is not None:
        layer.note_change(change, choice, tuple(layout), runtime.tile_of(tuple(layout)), q)
        out = change.run(q, k, v, choice, tuple(layout), runtime.tile_of(tuple(layout)), options)
    elif choice is None:
        out = sparse_attention(q, k, v, None, **options)
        runtime.measure(layer, q, k, v, out, options)
    else:
        out = run_launches(q, k, v, choice, **options)
    return out.contiguous()


@attend_layer.register_fake
def _(
    slot: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale: float | None,
    layout: list[int],
) -> torch.Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])
