"""Cross-attention under a regional prior: maps are kept while the small result is made, windows are told what concerns
them. Hooks on single instances; the layers' own processors compute all outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsereel.extend.screening import mean_over_heads
from sparsereel.families.base import by_suffix, named
from sparsereel.families.layout import fixed
from sparsereel.token_order import tile_order

if TYPE_CHECKING:
    from sparsereel.extend.extension import Extension
    from sparsereel.extend.prompts import PromptedCall
    from sparsereel.extend.regional import RegionalPrior
    from sparsereel.extend.sizes import Triple
    from sparsereel.runtime import ModelRuntime

_PARAMETERS = ("hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb")
#: layers whose sides are below this share of the whole grid's say too little of where a token is
_USABLE = 0.25


@dataclass
class Work:
    """What is done in the cross-attention of one model call.

    Attributes:
        rows: those of the user's prompts, one slice for each time that the samples are in the batch.
        batch: all rows.
        tokens: of the prompts.
        kept_by: where maps go; None = they are not kept.
        without: bool (samples, tokens), True = no key; None = all are keys.
        contexts: regional prompts as the layers take them, each (1, tokens, width).
    """

    rows: list[slice]
    batch: int
    tokens: int
    kept_by: PromptedCall | None = None
    without: Tensor | None = None
    contexts: list[Tensor] = field(default_factory=list)


class Composer:
    """The hooks on one model."""

    def __init__(
        self,
        prior: RegionalPrior,
        model: nn.Module,
        layers: list[nn.Module],
        extension: Extension,
        runtime: ModelRuntime,
    ) -> None:
        self.prior = prior
        self.extension = extension
        self.runtime = runtime
        self.work: Work | None = None
        self.handles: list[Any] = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        ]
        for layer in layers:
            self.handles.append(layer.register_forward_pre_hook(self.screen, with_kwargs=True))
            self.handles.append(layer.register_forward_hook(self.compose, with_kwargs=True))

    def remove(self) -> None:
        """Leave model and layers as they were."""
        for handle in self.handles:
            handle.remove()

    # -------------------------------------------------------------- a model call

    # What it looks up is no graph's business.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before a model call: what its layers are to do."""
        self.work = None
        call, place = self.extension.prompted, self.extension.place
        if call is None:
            if place is not None:
                self.extension.tell(
                    "the regional prior changes nothing in calls of the model by hand, or with latents that were given"
                )
            return
        if place is None and not call.collecting:
            return
        embeds = named(list(inspect.signature(type(model).forward).parameters)[1:], args, kwargs).get(
            "encoder_hidden_states"
        )
        rows = call.conditional(embeds) if isinstance(embeds, Tensor) else None
        if embeds is None or rows is None:
            self.extension.tell(
                "the regional prior cannot tell the prompt from what guides away from it (they are the same, or they "
                "were changed on the way): those calls run without it"
            )
        elif rows:
            self.work = self._work(model, call, embeds, rows)

    def _work(self, model: nn.Module, call: PromptedCall, embeds: Tensor, rows: list[slice]) -> Work:
        work = Work(rows, len(embeds), embeds.shape[1])
        place = self.extension.place
        if place is None:
            work.kept_by = call if self.prior.threshold else None
            return work
        work.without = call.without(place)
        if self.prior.weight:
            project = project_text(model)
            assert project is not None or not self.prior.prompts
            work.contexts = [project(region.to(embeds)) for region in call.regions_at(place)] if project else []
        return work

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """After a model call, failed ones among them."""
        self.work = None

    # -------------------------------------------------------------- a layer

    def screen(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Before a layer: take from the keys what the window goes without."""
        work = self.work
        if work is None or work.without is None:
            return None
        given = named(_PARAMETERS, args, kwargs)
        if not self._understood(given, work):
            return None
        given["attention_mask"] = masked(module, given["hidden_states"], given.get("attention_mask"), work)
        return (given.pop("hidden_states"),), given

    def compose(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        """After a layer: keep its map, or mix in what regional prompts answer."""
        work = self.work
        if work is None or (work.kept_by is None and not work.contexts):
            return None
        given = named(_PARAMETERS, args, kwargs)
        if not self._understood(given, work):
            return None
        if work.kept_by is not None:
            self._keep_map(module, given, work)
            return None
        output = output.clone()
        for rows in work.rows:
            output[rows] += self.prior.weight * (_regional(module, given, work, rows) - output[rows])
        return output

    def _understood(self, given: dict[str, Any], work: Work) -> bool:
        hidden, context = given["hidden_states"], given.get("encoder_hidden_states")
        if isinstance(context, Tensor) and hidden.shape[0] == work.batch and context.shape[1] >= work.tokens:
            return True
        self.extension.tell(
            "the regional prior leaves cross-attention to more than text (as of an IP-Adapter) as it is"
        )
        return False

    @torch.no_grad()
    def _keep_map(self, module: nn.Module, given: dict[str, Any], work: Work) -> None:
        hidden = given["hidden_states"]
        layout, tile = self.runtime.layout, self.runtime.tile
        here = None if layout is None else self.runtime.layer_layout(hidden.shape[1])
        if layout is None or here is None or work.kept_by is None:
            return
        sides, whole = _sides(here), _sides(layout)
        if any(n < _USABLE * m for n, m in zip(sides, whole, strict=True)):
            return
        for rows in work.rows:
            text = given["encoder_hidden_states"][rows, -work.tokens :]
            bias = given.get("attention_mask")
            chart = mean_over_heads(*query_and_key(module, hidden[rows], text), None if bias is None else bias[rows])
            if tile is not None and here == layout:
                chart = chart.index_select(1, tile_order(fixed(layout), tile).inverse.indices.to(chart.device))
            work.kept_by.keep_map(chart, sides, whole)


def cross_attentions(model: nn.Module) -> list[nn.Module]:
    """Layers that attend to text."""
    found = [module for _, module in by_suffix(model, [".attn2"])]
    return [m for m in found if hasattr(m, "to_q") and getattr(m, "is_cross_attention", True)]


def project_text(model: Any) -> Callable[[Tensor], Tensor] | None:
    """How a model brings embeddings of a text to what its cross-attention takes; None = not known."""
    embedder = getattr(getattr(model, "condition_embedder", None), "text_embedder", None)
    if embedder is not None:
        return embedder
    if hasattr(model, "down_blocks") and getattr(model, "encoder_hid_proj", None) is None:
        return lambda embeds: embeds
    return None


def query_and_key(module: Any, hidden: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, queries, D) and (B, H, tokens, D) as the processors of Wan and Stable Diffusion make them."""
    query = module.to_q(hidden)
    fused = getattr(module, "fused_projections", False)
    key = module.to_kv(text).chunk(2, -1)[0] if fused else module.to_k(text)
    # Wan's norms are over all heads together; U-Nets have none.
    if module.norm_q is not None:
        query, key = module.norm_q(query), module.norm_k(key)
    q, k = (x.unflatten(-1, (module.heads, -1)).transpose(1, 2) for x in (query, key))
    return q, k


def masked(module: Any, hidden: Tensor, mask: Tensor | None, work: Work) -> Tensor:
    """The mask of a layer, with -inf where a sample's row goes without a token; other rows keep theirs."""
    from diffusers.models.attention_processor import Attention

    assert work.without is not None
    bias = hidden.new_zeros(work.batch, 1, work.tokens)
    without = work.without.to(hidden.device)[:, None]
    for rows in work.rows:
        bias[rows] = bias[rows].masked_fill(without, float("-inf"))
    # Layers of U-Nets spread a mask over their heads themselves.
    bias = bias if isinstance(module, Attention) else bias[:, None]
    return bias if mask is None else mask + bias


def _regional(module: Any, given: dict[str, Any], work: Work, rows: slice) -> Tensor:
    """The mean of a layer's outputs for the regional prompts, for some rows."""
    rest = {name: value for name, value in given.items() if name not in _PARAMETERS}
    hidden, context = given["hidden_states"][rows], given["encoder_hidden_states"][rows]
    # What stands before the text, as the picture that Wan begins from, is the same for all.
    before = context[:, : context.shape[1] - work.tokens]
    total = None
    for region in work.contexts:
        text = torch.cat([before, region.to(before).expand(len(hidden), -1, -1)], 1)
        # Not called as a module: its hooks are these.
        out = module.forward(hidden, encoder_hidden_states=text, **rest)
        total = out if total is None else total + out
    assert total is not None
    mean: Tensor = total / len(work.contexts)
    return mean


def _sides(layout: Any) -> Triple:
    from sparsereel.extend.extension import video_of

    found = video_of(layout)
    assert found is not None
    return found
