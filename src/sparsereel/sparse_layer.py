"""One replaced self-attention layer: takes q, k, v from a seam, asks the runtime what to do, and keeps count."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from sparsereel.families.layout import Layout
from sparsereel.launches import Choice, modifier_in_order, run_launches
from sparsereel.padding import bias_of
from sparsereel.plan import LayerPlan
from sparsereel.step import StepInfo
from sparsereel_kernels import BlockMask, FrameDecay, KeyBias, dispatch, run, sparse_attention

if TYPE_CHECKING:
    from sparsereel.extend.change import Change
    from sparsereel.runtime import ModelRuntime
    from sparsereel.token_order import Tile

#: layers by slot number; compiled graphs name layers by it
LAYERS: weakref.WeakValueDictionary[int, SparseLayer] = weakref.WeakValueDictionary()
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
    backend: str | None = None

    def add_sparse(self, choice: Choice) -> None:
        self.calls += 1
        self.sparse_calls += 1
        self.density += choice.density
        self.token_density += choice.token_density

    def add_dense(self, reason: str) -> None:
        self.calls += 1
        self.density += 1.0
        self.token_density += 1.0
        self.dense_reasons[reason] = self.dense_reasons.get(reason, 0) + 1


@dataclass(frozen=True)
class Call:
    """How the model asked for attention, besides q, k and v.

    Attributes:
        attn_mask, dropout_p, is_causal, scale: as `F.scaled_dot_product_attention` names them.
        refuse: why the seam knows that this call is not to be touched.
        dense: runs the attention that the layer had before.
        free_choice: the user named no attention backend of their own, so dense calls may take the faster of ours.
    """

    attn_mask: Any
    dropout_p: float
    is_causal: bool
    scale: float | None
    refuse: str | None
    dense: Callable[[], torch.Tensor]
    free_choice: bool


class SparseLayer:
    """One replaced self-attention layer."""

    def __init__(self, runtime: ModelRuntime, name: str, index: int, plan: LayerPlan) -> None:
        self.runtime = runtime
        self.name = name
        self.index = index
        self.plan = plan
        # Plain attributes: compiled code cannot read a cached property.
        self.has_selectors = plan.has_selectors
        self.tally = Tally()
        self.last_choice: Choice | None = None
        self.reached = False
        # Calls at the step in progress: the first is one guidance branch, the second the other.
        self._step: StepInfo | None = None
        self._calls_at_step = 0
        self._take_slot()

    def _take_slot(self) -> None:
        number = next(_SLOTS)
        self.slot = torch.tensor(number, dtype=torch.int64)
        LAYERS[number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseLayer:
        twin = object.__new__(SparseLayer)
        memo[id(self)] = twin
        for key, value in vars(self).items():
            shared = key in ("plan", "last_choice")
            setattr(twin, key, value if shared else copy.deepcopy(value, memo))
        # A copied model is its own: compiled graphs find layers by slot.
        twin._take_slot()
        return twin

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Attention of this layer; q, k, v (B, H, S, D)."""
        if isinstance(call.attn_mask, torch.Tensor) and call.attn_mask.ndim == 4:
            call = replace(call, attn_mask=self.runtime.family.key_mask(call.attn_mask))
        refuse = call.refuse or _refusal(q, k, call)
        layout = None if refuse else self.runtime.layer_layout(q.shape[2])
        if refuse is None and layout is None:
            refuse = self.runtime.no_layout or f"{q.shape[2]} tokens do not lie on the model's token grid"
        perturbing = self.runtime.perturbing
        if torch.compiler.is_compiling():
            if perturbing is not None:
                raise RuntimeError("heads cannot be perturbed in a compiled model; run it without torch.compile")
            return self._attend_compiled(q, k, v, call, layout, refuse)
        start = clock(q) if self.runtime.profile else 0.0
        try:
            out = self._attend_eager(q, k, v, call, layout, refuse)
        finally:
            if self.runtime.profile:
                self.tally.seconds += clock(q) - start
        return out if perturbing is None else perturbing.apply(out, v, self.index, layout)

    def _attend_compiled(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: Call,
        layout: Layout | None,
        refuse: str | None,
    ) -> torch.Tensor:
        if refuse is not None or layout is None:
            torch.ops.sparsereel.note_dense(self.slot, refuse or "")
            return call.dense()
        compensated = self.runtime.plan.compensation is not None
        if self.has_selectors or compensated or self.runtime.may_change(layout):
            padding = call.attn_mask
            return torch.ops.sparsereel.attend_layer(self.slot, q, k, v, padding, call.scale, list(layout))
        name = torch.ops.sparsereel.select_mask(self.slot, q, k, list(layout))
        # Whether a padding mask is a plain prefix is data; a graph takes it as a bias, which needs no such test.
        bias = bias_of(call.attn_mask)
        options: dict[str, Any] = {"scale": call.scale, "backend": self.runtime.backend}
        tile = self.runtime.call_tile(layout)
        if tile is None:
            return sparse_attention(q, k, v, name, modifier=bias, **options)
        order, back = (torch.ops.sparsereel.token_order(q, list(layout), list(tile), way) for way in (False, True))
        q, k, v = (x.index_select(2, order) for x in (q, k, v))
        moved = modifier_in_order(bias, order)
        return sparse_attention(q, k, v, name, modifier=moved, **options).index_select(2, back)

    def _attend_eager(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: Call,
        layout: Layout | None,
        refuse: str | None,
    ) -> torch.Tensor:
        runtime = self.runtime
        again = in_backward()
        if not again and (refuse is not None or layout is None):
            self.count_dense(refuse or "")
            return call.dense()
        change = None if refuse is not None or layout is None else runtime.change(self, layout, q.device)
        if again and runtime.repeat(self) is None and change is None:
            return call.dense()
        lengths, bias = runtime.key_padding(call.attn_mask)
        if runtime.observer is not None and layout is not None and bias is None and not again:
            runtime.observer(self, layout, runtime.step(), q, k, v, lengths, call.scale)
        choice = runtime.select_padded(self, layout or (), q, k, lengths, call.scale, bias)
        options: dict[str, Any] = {
            "scale": call.scale,
            "key_lengths": lengths,
            "modifier": one_modifier(bias, None if change is None else change.modifier),
            "backend": runtime.backend,
        }
        if choice is not None:
            self.note_backend(q, k, v, choice)
        if change is not None and layout is not None:
            tile = runtime.tile_of(layout)
            if not again:
                self.note_change(change, choice, layout, tile, q)
            return change.run(q, k, v, choice, layout, tile, options)
        if choice is not None:
            return run_launches(q, k, v, choice, **options)
        own = call.free_choice and runtime.own_dense(q)
        out = sparse_attention(q, k, v, **options) if own else call.dense()
        runtime.measure(self, q, k, v, out, options)
        return out

    def branch_at(self, step: StepInfo) -> str:
        """Which of the calls at this step this is: guidance branches are calls of their own, in a fixed order."""
        if step != self._step:
            self._step, self._calls_at_step = step, 0
        self._calls_at_step += 1
        return str(self._calls_at_step)

    def note_backend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, choice: Choice) -> None:
        """Remember which kernel this call runs on, for the report."""
        mask: BlockMask | None = choice.launches[0].mask
        needs_gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        problem = run.problem_of(q, k, v, mask, None, None, run.Wants(backward=needs_gradients))
        self.tally.backend = dispatch.choose(self.runtime.backend, problem, mask).name

    def note_change(
        self, change: Change, choice: Choice | None, layout: Layout, tile: Tile | None, q: torch.Tensor
    ) -> None:
        """A call that the plan leaves dense sees only its extension's window: correct what was counted for it."""
        if choice is None and change.pattern is not None:
            density, token_density = change.densities(layout, tile, q)
            self.tally.density += density - 1
            self.tally.token_density += token_density - 1

    def count_dense(self, reason: str) -> None:
        """A call stays dense for `reason`."""
        self._chose(None)
        self.tally.add_dense(reason)
        self.runtime.announce(reason, self.name)

    def count_sparse(self, choice: Choice) -> None:
        """A call runs as `choice` says."""
        self._chose(choice)
        self.tally.add_sparse(choice)

    def _chose(self, choice: Choice | None) -> None:
        self.reached = True
        self.last_choice = choice
        self.runtime.chosen[self] = choice


def one_modifier(bias: KeyBias | None, decay: FrameDecay | None) -> KeyBias | FrameDecay | None:
    """What a call hands to its kernel, which takes one change to the logits.

    Raises:
        ValueError: there are two.
    """
    if bias is not None and decay is not None:
        raise ValueError(
            "ultravico does not combine with a padding mask whose kept keys are no prefix; "
            "pad prompts at the end, or generate one prompt at a time"
        )
    return decay if bias is None else bias


def in_backward() -> bool:
    """Whether autograd is running: what is called now is a forward pass that gradient checkpointing runs again."""
    return torch._C._current_graph_task_id() != -1


def _refusal(q: torch.Tensor, k: torch.Tensor, call: Call) -> str | None:
    mask = call.attn_mask
    if call.is_causal:
        return "the model asks for causal attention"
    if call.dropout_p > 0:
        return "attention dropout is on"
    if q.shape[2] != k.shape[2]:
        return f"{q.shape[2]} queries attend to {k.shape[2]} keys"
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        return f"the model hands a {type(mask).__name__} of its own"
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != 1 or mask.shape[3] != k.shape[2]:
        return f"the model hands an attention mask of shape {tuple(mask.shape)}, not (B, 1, 1, keys)"
    return None


def clock(like: torch.Tensor) -> float:
    """Seconds on a clock, after all work queued on the device of `like` is done."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
