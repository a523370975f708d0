"""Wan's rotary tables, of any length and with a policy's frequencies: stands in for `rope.forward` of one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsereel.extend.recipes import INTRINSIC, PLAIN
from sparsereel.extend.rope import RIFLEx, RopePolicy, axis_table, plain_frequencies
from sparsereel.extend.sizes import Triple

if TYPE_CHECKING:
    from sparsereel.extend.extension import Extension

#: `WanTransformer3DModel` has no setting for it
WAN_BASE = 1e4


class Nothing:
    """A handle of what changed nothing."""

    def remove(self) -> None:
        """Nothing was changed."""


def install(model: nn.Module, extension: Extension) -> Any:
    """Put the rotary tables in; returns a handle with `.remove()`.

    Raises:
        ValueError: the model's tables are not those that the policies are defined on.
    """
    rope = getattr(model, "rope", None)
    if type(rope).__name__ != "WanRotaryPosEmbed":
        return Nothing()
    tables = WanTables(rope, extension)
    if not tables.known():
        if extension.recipe.time == extension.recipe.space == PLAIN:
            return Nothing()
        raise ValueError("this model's rotary tables are not Wan's (base 10000), so their frequencies stay")
    return tables.install()


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
