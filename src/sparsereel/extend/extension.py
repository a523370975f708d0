"""An extension at work on one model: which calls it concerns, and what it changes in them.

It lives in the model's `ModelRuntime` and, for Wan, in the instance's own `rope.forward`; classes and buffers of
diffusers stay untouched. A call of another size than the wanted one runs as if there were no extension.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from sparsereel.extend.recipes import INTRINSIC, PLAIN, Recipe
from sparsereel.extend.rope import RIFLEx, RopePolicy, axis_table, plain_frequencies
from sparsereel.extend.sizes import Sizes, Triple
from sparsereel.extend.ultravico import FirstFrame
from sparsereel.families.layout import Layout, decode
from sparsereel.patterns.base import Pattern
from sparsereel.token_order import BLOCK, MASKS, Tile, tile_order
from sparsereel_kernels import BlockMask, FrameDecay

logger = logging.getLogger("sparsereel")

#: `WanTransformer3DModel` has no setting for it
WAN_BASE = 1e4


class Extension:
    """What `extend` asked for, on one model.

    Args:
        family: the name of the model's family.
    """

    def __init__(self, sizes: Sizes, recipe: Recipe, family: str) -> None:
        self.sizes = sizes
        self.recipe = recipe
        # The frame that Wan's VAE encodes by itself.
        decay = recipe.decay is not None and family == "wan"
        self.first_frame = FirstFrame(sizes.trained_tokens[0]) if decay else None
        self._decays: dict[Any, FrameDecay] = {}
        self._told: set[Triple] = set()

    # -------------------------------------------------------------- attention

    def concerns(self, tokens: Triple) -> bool:
        """Whether a call with so many tokens along each axis is to be extended."""
        wanted = self.sizes.matches(tokens)
        trained = self.sizes.trained_tokens
        larger = any(a > b for a, b in zip(tokens, trained, strict=True))
        if larger and not wanted and not torch.compiler.is_compiling():
            self._tell(tokens)
        return wanted and self.sizes.grows

    def _tell(self, tokens: Triple) -> None:
        if tokens not in self._told:
            self._told.add(tokens)
            logger.warning(
                "a call of %d x %d x %d tokens is larger than trained but not the size that extend was asked for (%s): "
                "it runs as without extend",
                *tokens,
                ", ".join(f"{name}={value}" for name, value in self.sizes.arguments.items()),
            )

    def modifier(self, layout: Layout, tile: Tile | None, device: torch.device) -> FrameDecay | None:
        """The change to the logits of a call with this layout and token order; None where there is none."""
        decay = self.recipe.decay
        tokens = _video(layout)
        if decay is None or tokens is None or tokens[0] <= self.sizes.trained_tokens[0] or not self.concerns(tokens):
            return None
        key = (layout, tile, device)
        if key not in self._decays:
            order = None if tile is None else tile_order(layout, tile)
            trained = self.sizes.trained_tokens[0]
            # Kept for later calls, which may want gradients.
            with torch.inference_mode(False):
                self._decays = {key: decay.modifier(decode(layout), trained, order, device)}
        return self._decays[key]

    def head_pattern(self, pattern: Pattern, layout: Layout) -> Pattern:
        """A head's pattern in a call with this layout: its own, less what the extension forbids."""
        return pattern if self._rule(layout) is None else self._rule(layout).within(pattern)  # type: ignore[union-attr]

    def dense_mask(self, layout: Layout, tile: Tile | None, device: torch.device) -> BlockMask | None:
        """What a dense call with this layout may see; None = everything."""
        rule = self._rule(layout)
        if rule is None:
            return None
        order = None if tile is None else tile_order(layout, tile)
        return MASKS.get((rule,), decode(layout), block=BLOCK, device=device, order=order)

    def _rule(self, layout: Layout) -> FirstFrame | None:
        tokens = _video(layout)
        if self.first_frame is None or tokens is None or tokens[0] <= self.first_frame.trained:
            return None
        return self.first_frame if self.concerns(tokens) else None

    def check_methods(self, methods: Any, compensation: Any = None) -> None:
        """Refuse what cannot be combined.

        Raises:
            ValueError: UltraViCo with a selector, which scores logits that UltraViCo changes and may move tokens, or
                with a compensation, which estimates them.
        """
        if self.recipe.decay is not None and compensation is not None:
            raise ValueError(
                f"ultravico does not combine with the compensation of this plan ({compensation}); "
                "take it out of the plan, or choose method='riflex', 'yarn', 'ntk', 'pi' or 'plain'"
            )
        selectors = sorted({str(method) for method in methods if not isinstance(method, Pattern)})
        if self.recipe.decay is not None and selectors:
            raise ValueError(
                f"ultravico combines with patterns, not with the selectors of this plan ({', '.join(selectors)}); "
                "choose another plan, or method='riflex', 'yarn', 'ntk', 'pi' or 'plain'"
            )

    # -------------------------------------------------------------- rotary tables

    def install(self, model: nn.Module) -> Any:
        """Put the rotary tables in; returns a handle with `.remove()`.

        Raises:
            ValueError: the model's tables are not those that the policies are defined on.
        """
        rope = getattr(model, "rope", None)
        if type(rope).__name__ != "WanRotaryPosEmbed":
            return _Nothing()
        tables = WanTables(rope, self)
        if not tables.known():
            if self.recipe.time == self.recipe.space == PLAIN:
                return _Nothing()
            raise ValueError("this model's rotary tables are not Wan's (base 10000), so their frequencies stay")
        return tables.install()

    def policies(self, tokens: Triple) -> tuple[RopePolicy, RopePolicy, RopePolicy] | None:
        """Policies of the three axes for a call with so many tokens along each; None where nothing changes."""
        if not self.concerns(tokens):
            return None
        a, b, c = (self.recipe.policy(axis) for axis in range(3))
        return a, b, c


def _video(layout: Layout) -> Triple | None:
    for start in range(0, len(layout), 4):
        if layout[start] == 0:
            return layout[start + 1], layout[start + 2], layout[start + 3]
    return None


class _Nothing:
    def remove(self) -> None:
        """Nothing was changed."""


class WanTables:
    """Stands in for the forward of one `WanRotaryPosEmbed`: tables of any length, with the policies' frequencies."""

    def __init__(self, rope: Any, extension: Extension) -> None:
        self.rope = rope
        self.extension = extension
        self._found: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def install(self) -> WanTables:
        """Shadow the class's forward on this instance.

        Raises:
            ValueError: somebody else did so before.
        """
        if "forward" in vars(self.rope):
            raise ValueError("another library has replaced this model's rotary embedding; remove that first")
        # A bound method is copied together with the model, unlike a closure.
        self.rope.forward = self.forward
        return self

    def remove(self) -> None:
        """Leave the instance as it was."""
        vars(self.rope).pop("forward", None)

    def known(self) -> bool:
        """Whether the tables are those that the policies are defined on."""
        known = torch.cat([axis_table(plain_frequencies(dim, WAN_BASE), 2)[0] for dim in self._dims()], dim=1)
        found = self.rope.freqs_cos
        length = min(2, found.shape[0])
        same_width = found.shape[1] == known.shape[1]
        return same_width and bool((found[:length].float().cpu() - known[:length]).abs().max() < 0.01)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (1, S, 1, D) for latents (B, C, F, H, W), frame by frame."""
        sizes = zip(hidden_states.shape[2:], self.rope.patch_size, strict=True)
        frames, height, width = (size // patch for size, patch in sizes)
        tokens = (frames, height, width)
        policies = self.extension.policies(tokens)
        if policies is None or (max(tokens) <= self.rope.max_seq_len and all(p == PLAIN for p in policies)):
            return type(self.rope).forward(self.rope, hidden_states)
        like = self.rope.freqs_cos
        if torch.compiler.is_compiling():
            return self._tables(tokens, policies, like)
        key = (tokens, like.device, like.dtype)
        if self._found is None or self._found[0] != key:
            # Kept for later calls, which may want gradients.
            with torch.inference_mode(False):
                self._found = key, self._tables(tokens, policies, like)
        return self._found[1]

    def _dims(self) -> Triple:
        return self.rope.t_dim, self.rope.h_dim, self.rope.w_dim

    def _tables(
        self, tokens: Triple, policies: tuple[RopePolicy, RopePolicy, RopePolicy], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        trained = self.extension.sizes.trained_tokens
        magnitude = max(p.magnitude(n / t) for p, n, t in zip(policies, tokens, trained, strict=True))
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for axis, (dim, policy) in enumerate(zip(self._dims(), policies, strict=True)):
            frequencies = known(policy, dim).frequencies(dim, WAN_BASE, trained[axis], tokens[axis])
            shape = [tokens[axis] if other == axis else 1 for other in range(3)]
            for part, table in zip(parts, axis_table(frequencies, tokens[axis]), strict=True):
                part.append(table.view(*shape, dim).expand(*tokens, dim))
        cos, sin = (torch.cat(part, dim=-1).reshape(1, -1, 1, sum(self._dims())) * magnitude for part in parts)
        return cos.to(like), sin.to(like)


def known(policy: RopePolicy, dim: int) -> RopePolicy:
    """RIFLEx with the component known for this axis, where nothing was said."""
    known = INTRINSIC.get((dim, WAN_BASE))
    if isinstance(policy, RIFLEx) and policy.component is None and policy.loop is None and known is not None:
        return RIFLEx(known, margin=policy.margin)
    return policy
