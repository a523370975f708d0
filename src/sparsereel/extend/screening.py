"""Where in a picture each token of a prompt is, by maps of cross-attention; which tokens a window goes without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from sparsereel.extend.sizes import Triple
    from sparsereel.extend.views import Shares


class PromptMap:
    """The mean map of cross-attention over layers and steps, summed up in place.

    Args:
        samples: pictures of the call; each has its own map.
        sides: frames, rows and columns of the map.
        tokens: of the prompt.
    """

    def __init__(self, samples: int, sides: Triple, tokens: int, device: torch.device) -> None:
        self.total = torch.zeros(samples, *sides, tokens, dtype=torch.float32, device=device)
        self.count = 0

    def add(self, layer: Tensor, sides: Triple) -> None:
        """One layer's map (samples, queries, tokens) over so many frames, rows and columns, enlarged where it is
        smaller than the whole map."""
        here = layer.unflatten(1, sides)
        size = self.total.shape[2:4]
        if here.shape[2:4] != size:
            flat = here.flatten(0, 1).movedim(-1, 1)
            grown = F.interpolate(flat, size=tuple(size), mode="bilinear", align_corners=False)
            here = grown.movedim(1, -1).unflatten(0, here.shape[:2])
        self.total += here.to(self.total)
        self.count += 1

    def mean(self) -> Tensor:
        """(samples, frames, rows, columns, tokens); a place's tokens sum to 1."""
        return self.total / max(1, self.count)


def mean_over_heads(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias), the mean over heads, head by head.

    Args:
        q: (B, H, queries, D).
        k: (B, H, tokens, D).
        bias: (B, 1, tokens), added to the logits.

    Returns:
        (B, queries, tokens) in fp32.
    """
    total = torch.zeros(q.shape[0], q.shape[2], k.shape[2], dtype=torch.float32, device=q.device)
    for head in range(q.shape[1]):
        logits = q[:, head].float() @ k[:, head].float().transpose(1, 2) * q.shape[-1] ** -0.5
        total += (logits if bias is None else logits + bias.float()).softmax(-1)
    return total.div_(q.shape[1])


def mass_in_windows(chart: Tensor, windows: Sequence[Shares]) -> Tensor:
    """Means of a map over windows, whose borders may cut its cells.

    Args:
        chart: (samples, frames, rows, columns, tokens).
        windows: (start, stop) of each along frames, rows and columns, as shares.

    Returns:
        (windows, samples, tokens).
    """
    found = []
    for window in windows:
        part = chart
        for span in window:
            # The axis in question is always the second: the ones before it are summed away.
            part = torch.tensordot(_share_of_cells(span, part.shape[1], part), part, dims=([0], [1]))
        found.append(part)
    return torch.stack(found)


def _share_of_cells(span: tuple[float, float], cells: int, like: Tensor) -> Tensor:
    """(cells,): how much of a span of an axis each of its cells is; sums to 1."""
    edges = torch.arange(cells + 1, dtype=torch.float64) / cells
    inside = (edges[1:].clamp(max=span[1]) - edges[:-1].clamp(min=span[0])).clamp(min=0)
    return (inside / inside.sum()).to(like)


def share_of_largest(mass: Tensor) -> Tensor:
    """m_n(t): (windows, samples, tokens), each token's mass over its maximum among the windows; 0 without any."""
    return mass / mass.amax(0).clamp(min=torch.finfo(mass.dtype).tiny)


def screened(share: Tensor, threshold: float, kept: Tensor) -> Tensor:
    """Which tokens each window goes without.

    Args:
        share: (windows, samples, tokens), see `share_of_largest`.
        kept: bool (samples, tokens), tokens that stay in any case.

    Returns:
        bool (windows, samples, tokens), True = no key. Where nothing would be left, everything is.
    """
    out = (share < threshold) & ~kept
    return out & ~out.all(-1, keepdim=True)
