"""UltraViCo (arXiv 2511.20123): positive logits between tokens farther apart than the trained window shrink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparsereel.grid import Permutation, TokenGrid
from sparsereel.patterns.base import Pattern
from sparsereel.patterns.full import Full
from sparsereel.patterns.layout import FRAME, Tokens
from sparsereel.patterns.rules import Axis, Rule
from sparsereel.patterns.skip import Skip
from sparsereel_kernels import FrameDecay


@dataclass(frozen=True)
class UltraViCo:
    """Past its trained length a model spreads its attention over tokens it never learned to place; this narrows it.

    With L = trained latent frames and S_ij the scaled logit of query i and key j: S'_ij = lambda_ij * S_ij where
    S_ij > 0 and i, j are more than L/2 apart; lambda is beta within `gamma` frames of a multiple of `period` (where
    harmonic rotary frequencies make far frames look near), else alpha. Other logits stay. Text is exempt.

    Args:
        alpha: factor outside the window; smaller weakens far tokens more. Below 0.9 consistency falls (the paper).
        beta: stronger factor in the risk bands; None = no bands, as for Wan, whose frequencies are no harmonics.
        period, gamma: where the bands lie and their half width, in latent frames.
        by: "tokens" measures distance along the sequence, as the released code does, so that the window ends
            inside a frame; "frames" compares frame numbers with L // 2: a table of a few entries, gentler to caches.

    Raises:
        ValueError: not 0 < beta <= alpha <= 1, a beta without a period, a negative gamma, an unknown `by`.
    """

    alpha: float = 0.9
    beta: float | None = None
    period: float | None = None
    gamma: float = 0.0
    by: Literal["tokens", "frames"] = "tokens"

    name: ClassVar[str] = "ultravico"

    def __post_init__(self) -> None:
        lowest = self.alpha if self.beta is None else self.beta
        if not 0 < lowest <= self.alpha <= 1:
            raise ValueError(f"UltraViCo needs 0 < beta <= alpha <= 1, got alpha={self.alpha}, beta={self.beta}")
        if (self.beta is None) != (self.period is None) or self.gamma < 0 or (self.period or 1) <= 0:
            raise ValueError(
                "UltraViCo's risk bands need beta, a positive period and gamma >= 0, "
                f"got beta={self.beta}, period={self.period}, gamma={self.gamma}"
            )
        if self.by not in ("tokens", "frames"):
            raise ValueError(f"UltraViCo measures distance by 'tokens' or 'frames', got {self.by!r}")

    def factors(self, trained: int, frames: int, frame_tokens: int) -> Tensor:
        """float32 factors by distance, in tokens or frames as `by` says.

        Args:
            trained, frames: latent frames of the trained and of this clip.
            frame_tokens: tokens of one frame.
        """
        unit = frame_tokens if self.by == "tokens" else 1
        distance = torch.arange(frames * unit, dtype=torch.float64)
        half = trained * unit / 2 if self.by == "tokens" else trained // 2
        table = torch.full_like(distance, self.alpha)
        if self.beta is not None and self.period is not None:
            in_frames = distance / unit
            multiple = (in_frames / self.period).round().clamp(min=1)
            table[(in_frames - multiple * self.period).abs() <= self.gamma] = self.beta
        table[distance <= half] = 1.0
        return table.float()

    def modifier(self, grid: TokenGrid, trained: int, order: Permutation | None, device: torch.device) -> FrameDecay:
        """The rule for the tokens of a grid, in the order in which they come."""
        frame, row, column = grid.coordinates()
        place = frame
        if self.by == "tokens":
            place = torch.where(frame < 0, frame, (frame * grid.height + row) * grid.width + column)
        if order is not None:
            place = place[order.indices]
        places = place.to(device=device, dtype=torch.int32)
        table = self.factors(trained, grid.frames, grid.height * grid.width)
        return FrameDecay(places, places, table.to(device))


@dataclass(frozen=True, eq=False)
class FirstFrame(Pattern):
    """Queries of the first frame see only the trained frames: allowed if t_q > 0 or t_k < trained.

    The video VAE encodes the first frame alone, so its tokens differ from the rest and blur soonest when they see too
    much; UltraViCo's released code for Wan keeps them from all that lies beyond the trained length.
    """

    trained: int

    name: ClassVar[str] = "first_frame"
    sees_itself: ClassVar[bool] = True

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        return (q.t > 0) | (k.t < self.trained)

    def rule(self, grid: TokenGrid) -> Rule:
        frame = torch.arange(grid.frames)
        return Axis(FRAME, (frame[:, None] > 0) | (frame[None] < self.trained))

    def within(self, pattern: Pattern) -> Pattern:
        """This rule on top of a head's pattern."""
        if isinstance(pattern, Skip):
            return pattern
        return self if isinstance(pattern, Full) else pattern & self
