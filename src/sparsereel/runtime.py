"""What one sparsified model does at run time: which grid, which step, which mask, for each attention layer.

Eager calls choose their mask in plain Python. Inside `torch.compile` the choice is the custom op `select_mask`, which
runs when the graph runs (the step lives in the scheduler, out of the graph's sight) and returns the name of an immutable
mask; so one compiled block serves every layer, step and plan.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import Any

import torch
from sparsereel_kernels import BlockMask, sparse_attention
from sparsereel_kernels.attention import mask_name

from sparsereel.families.base import Family, OrderSource, layout_length, named
from sparsereel.families.layout import Layout, decode
from sparsereel.grid import Permutation, TokenGrid
from sparsereel.mask_cache import MaskCache
from sparsereel.patterns.base import Pattern
from sparsereel.plan import AttentionPlan, LayerPlan
from sparsereel.step import StepInfo, StepSource

logger = logging.getLogger("sparsereel")

BLOCK = (128, 64)
TILE = (4, 8, 8)

_MASKS = MaskCache()
_LAYERS: weakref.WeakValueDictionary[int, SparseLayer] = weakref.WeakValueDictionary()
_SLOTS = count(1)


@dataclass
class Tally:
    """What a layer did since `sparsify`: sums over its calls."""

    calls: int = 0
    sparse_calls: int = 0
    density: float = 0.0
    token_density: float = 0.0
    dense_reasons: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def add_sparse(self, mask: BlockMask) -> None:
        self.calls += 1
        self.sparse_calls += 1
        self.density += mask.density
        self.token_density += mask.token_density

    def add_dense(self, reason: str) -> None:
        self.calls += 1
        self.density += 1.0
        self.token_density += 1.0
        self.dense_reasons[reason] = self.dense_reasons.get(reason, 0) + 1


class SparseLayer:
    """One replaced self-attention layer."""

    def __init__(self, runtime: ModelRuntime, name: str, index: int, plan: LayerPlan) -> None:
        self.runtime = runtime
        self.name = name
        self.index = index
        self.plan = plan
        self.always_dense = plan.uniform_full
        self.tally = Tally()
        self.last_mask: BlockMask | None = None
        self.reached = False
        self._take_slot()

    def _take_slot(self) -> None:
        number = next(_SLOTS)
        self.slot = torch.tensor(number, dtype=torch.int64)
        _LAYERS[number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseLayer:
        import copy

        twin = object.__new__(SparseLayer)
        memo[id(self)] = twin
        for key, value in vars(self).items():
            shared = key in ("plan", "last_mask")
            setattr(twin, key, value if shared else copy.deepcopy(value, memo))
        # A copied model is its own: compiled graphs find layers by slot.
        twin._take_slot()
        return twin

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        attn_mask: torch.Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        refuse: str | None,
        dense: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Attention of this layer over (B, H, S, D); `dense()` is what it ran before."""
        refuse = refuse or self._refusal(q, k, attn_mask, dropout_p, is_causal)
        layout = None if refuse else self.runtime.layer_layout(q.shape[2])
        if refuse is None and layout is None:
            refuse = f"{q.shape[2]} tokens do not lie on the model's token grid"
        if refuse is not None or self.always_dense or layout is None:
            if not torch.compiler.is_compiling():
                self.count_dense(refuse or "the plan says full")
            return dense()
        if torch.compiler.is_compiling():
            # Whether the mask is a plain prefix is data; a graph takes it as a bias, which needs no such test.
            name = torch.ops.sparsereel.select_mask(self.slot, q, list(layout))
            bias = _bias_of(attn_mask)
            return sparse_attention(q, k, v, name, scale=scale, modifier=bias, backend=self.runtime.backend)
        mask = self.runtime.select(self, layout, q.device)
        if mask is None:
            return dense()
        lengths, modifier = self.runtime.key_padding(attn_mask)
        return sparse_attention(
            q, k, v, mask, scale=scale, key_lengths=lengths, modifier=modifier, backend=self.runtime.backend
        )

    def _refusal(
        self, q: torch.Tensor, k: torch.Tensor, attn_mask: Any, dropout_p: float, is_causal: bool
    ) -> str | None:
        if is_causal:
            return "the model asks for causal attention"
        if dropout_p > 0:
            return "attention dropout is on"
        if q.shape[2] != k.shape[2]:
            return f"{q.shape[2]} queries attend to {k.shape[2]} keys"
        if attn_mask is None:
            return None
        if not isinstance(attn_mask, torch.Tensor):
            return f"the model hands a {type(attn_mask).__name__} of its own"
        if attn_mask.ndim != 4 or attn_mask.shape[1] != 1 or attn_mask.shape[2] != 1:
            return f"the model hands an attention mask of shape {tuple(attn_mask.shape)}, not (B, 1, 1, keys)"
        return None

    def count_dense(self, reason: str) -> None:
        self.reached = True
        self.last_mask = None
        self.tally.add_dense(reason)
        self.runtime.announce(reason, self.name)

    def count_sparse(self, mask: BlockMask) -> None:
        self.reached = True
        self.last_mask = mask
        self.tally.add_sparse(mask)


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
        self.model_ref = weakref.ref(model)
        self.family = family
        self.component = component
        self.plan = plan
        self.backend = backend
        self.steps = StepSource()
        self.layers: list[SparseLayer] = []
        # The call in progress.
        self.layout: Layout | None = None
        self.reorder = False
        #: whether the family can put tokens in tile order; set when its hooks are installed
        self.orders_tokens = False
        self._tiled: dict[Layout, bool] = {}
        self._step: StepInfo | None = None
        self._step_known = False
        self._padding: tuple[int, Any] | None = None
        self._announced: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelRuntime:
        import copy

        twin = object.__new__(ModelRuntime)
        memo[id(self)] = twin
        for key, value in vars(self).items():
            shared = key in ("model_ref", "family", "plan", "steps", "_padding")
            setattr(twin, key, value if shared else copy.deepcopy(value, memo))
        model = self.model_ref()
        copied = memo.get(id(model))
        twin.model_ref = self.model_ref if copied is None else weakref.ref(copied)
        return twin

    # -------------------------------------------------------------- hooks

    def before_forward(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook: note the grid of this call. Runs inside `torch.compile` too, so: shapes and ints only."""
        arguments = named(self.family.parameters, args, kwargs)
        layout = self.family.layout(model, arguments)
        self.layout = layout
        self.reorder = self.orders_tokens and layout is not None and self._prefers_tiles(layout)
        if not torch.compiler.is_compiling():
            self._step_known = False
            self._padding = None
            for layer in self.layers:
                layer.reached = False

    def after_forward(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        """Forward hook: name layers that were meant to be sparse but never ran through us."""
        self.layout = None
        self.reorder = False
        if torch.compiler.is_compiling():
            return
        missed = [layer.name for layer in self.layers if not layer.reached and not layer.tally.calls]
        if missed and len(missed) < len(self.layers):
            self._warn_missed(missed)

    def _warn_missed(self, missed: list[str]) -> None:
        key = "missed:" + ",".join(missed)
        if key not in self._announced:
            self._announced.add(key)
            shown = ", ".join(missed[:4]) + (f" and {len(missed) - 4} more" if len(missed) > 4 else "")
            logger.warning("%s: marked as replaced, but this forward did not reach it; it ran as it was", shown)

    # -------------------------------------------------------------- geometry

    def layer_layout(self, length: int) -> Layout | None:
        return None if self.layout is None else self.family.layer_layout(self.layout, length)

    def call_order(self, like: torch.Tensor, *, inverse: bool) -> torch.Tensor | None:
        if not self.reorder or self.layout is None:
            return None
        return torch.ops.sparsereel.token_order(like, list(self.layout), inverse)

    @torch.compiler.assume_constant_result
    def _prefers_tiles(self, layout: Layout) -> bool:
        if layout not in self._tiled:
            grid = decode(layout)
            patterns = frozenset(pattern for layer in self.layers for pattern in layer.plan.distinct())
            enough = grid.seq_len >= self.plan.schedule.min_tokens
            self._tiled[layout] = enough and visits_fewer_in_tiles(patterns, grid)
        return self._tiled[layout]

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

    def select(self, layer: SparseLayer, layout: Layout, device: torch.device) -> BlockMask | None:
        """The mask for this call of `layer`, or None for dense; counted and, when new, announced."""
        if _in_backward():
            # Gradient checkpointing runs the forward again; it must see the mask that the first run saw.
            return layer.last_mask
        mask, reason = self._choose(layer, layout, device)
        if mask is None:
            layer.count_dense(reason)
        else:
            layer.count_sparse(mask)
        return mask

    def _choose(self, layer: SparseLayer, layout: Layout, device: torch.device) -> tuple[BlockMask | None, str]:
        schedule = self.plan.schedule
        tokens = layout_length(layout)
        if tokens < schedule.min_tokens:
            return None, f"{tokens} tokens are fewer than the plan's min_tokens {schedule.min_tokens}"
        step = self.step()
        if step is None:
            if schedule.needs_step or layer.plan.needs_step:
                return None, "the denoising step is unknown and the plan depends on it"
            step = StepInfo(0, 1)
        elif schedule.dense_at(step.index, step.total):
            return None, "dense step of the schedule"
        grid = decode(layout)
        patterns = layer.plan.at(step.index, step.total)
        order = tile_order(layout) if self.reorder and layout == self.layout else None
        mask = _MASKS.get(patterns, grid, block=BLOCK, device=device, layer=layer.index, order=order)
        if mask is None:
            return None, "the plan says full"
        if mask.density > schedule.max_density:
            return None, f"density {mask.density:.2f} is above the plan's max_density {schedule.max_density:g}"
        return mask, ""

    def key_padding(self, attn_mask: torch.Tensor | None) -> tuple[torch.Tensor | None, Any]:
        """(key_lengths, modifier) for a key-padding mask (B, 1, 1, keys); worked out once for all layers of a call."""
        if attn_mask is None:
            return None, None
        if self._padding is None or self._padding[0] != id(attn_mask):
            self._padding = (id(attn_mask), (attn_mask, _lengths_of(attn_mask)))
        lengths = self._padding[1][1]
        return (lengths, None) if lengths is not None else (None, _bias_of(attn_mask))

    def announce(self, reason: str, layer: str) -> None:
        """Say once why something stays dense."""
        if reason in self._announced:
            return
        self._announced.add(reason)
        quiet = reason in ("dense step of the schedule", "the plan says full")
        logger.log(logging.DEBUG if quiet else logging.WARNING, "%s.%s stays dense: %s", self.component, layer, reason)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _lengths_of(attn_mask: torch.Tensor) -> torch.Tensor | None:
    """Key lengths (B,) of a padding mask whose kept keys are a prefix; None when they are not."""
    kept = attn_mask[:, 0, 0]
    kept = kept if kept.dtype == torch.bool else kept >= 0
    if attn_mask.dtype != torch.bool and bool((attn_mask[:, 0, 0][kept] != 0).any()):
        return None
    lengths = kept.sum(-1, dtype=torch.int32)
    prefix = torch.arange(kept.shape[-1], device=kept.device) < lengths[:, None]
    return lengths if bool((prefix == kept).all()) else None


def _bias_of(attn_mask: torch.Tensor | None) -> Any:
    from sparsereel_kernels import KeyBias

    if attn_mask is None:
        return None
    row = attn_mask[:, 0, 0]
    if row.dtype == torch.bool:
        row = torch.zeros_like(row, dtype=torch.float32).masked_fill(~row, float("-inf"))
    return KeyBias(row.float())


# ------------------------------------------------------------------ token order


@lru_cache(maxsize=64)
def tile_order(layout: Layout) -> Permutation:
    """Tile order of a call's tokens: tokens of one 3-D tile side by side."""
    return decode(layout).tile_order(TILE)


def visits_fewer_in_tiles(patterns: frozenset[Pattern], grid: TokenGrid) -> bool:
    """Whether tile order visits fewer blocks than the model's own order, summed over the patterns of a plan."""
    order = grid.tile_order(TILE)
    plain = sum(_density(pattern, grid, None) for pattern in patterns)
    return sum(_density(pattern, grid, order) for pattern in patterns) < plain


def _density(pattern: Pattern, grid: TokenGrid, order: Permutation | None) -> float:
    mask = _MASKS.get((pattern,), grid, block=BLOCK, device=torch.device("cpu"), layer=0, order=order)
    return 1.0 if mask is None else mask.density


# ------------------------------------------------------------------ ops that run when a compiled graph runs


@torch.library.custom_op("sparsereel::select_mask", mutates_args=())
def select_mask(slot: torch.Tensor, q: torch.Tensor, layout: list[int]) -> torch.Tensor:
    """Name (0-d int64, CPU) of the mask that layer `slot` uses in this call; q (B, H, S, D) gives the device."""
    layer = _LAYERS.get(int(slot))
    if layer is None:
        raise RuntimeError("a compiled graph asks for a sparse layer that no longer exists; compile the model again")
    layer.runtime._step_known = False
    return mask_name(layer.runtime.select(layer, tuple(layout), q.device)).clone()


@select_mask.register_fake
def _(slot: torch.Tensor, q: torch.Tensor, layout: list[int]) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64)


@torch.library.custom_op("sparsereel::token_order", mutates_args=())
def token_order(like: torch.Tensor, layout: list[int], inverse: bool) -> torch.Tensor:
    """int64 indices (S,) of the call's token order (or back), on the device of `like`."""
    order = tile_order(tuple(layout))
    return (order.inverse if inverse else order).indices.to(like.device, copy=True)


@token_order.register_fake
def _(like: torch.Tensor, layout: list[int], inverse: bool) -> torch.Tensor:
    return torch.empty(layout_length(tuple(layout)), dtype=torch.int64, device=like.device)
