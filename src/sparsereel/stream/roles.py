"""Heads that look far back and heads that do not, and caches as large as each of them needs.

RazorAttention (arXiv 2407.15891), DuoAttention (arXiv 2410.10819) and their kin keep everything for a few *retrieval*
heads and only sink + recent tokens for the others, the *streaming* heads. Here "everything" is the stream's window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsereel.stream.cache import HeadGroup


@dataclass(frozen=True)
class HeadRoles:
    """Which heads are streaming heads.

    Args:
        streaming: head numbers by layer; layers that are missing have none.
        recent: latent frames that a streaming head sees besides the sink, the chunk being denoised included.

    Raises:
        ValueError: recent < 1, or negative numbers.
    """

    streaming: Mapping[int, tuple[int, ...]]
    recent: int

    def __post_init__(self) -> None:
        if self.recent < 1:
            raise ValueError(f"streaming heads need recent >= 1 latent frames, got {self.recent}")
        if any(number < 0 for layer, heads in self.streaming.items() for number in (layer, *heads)):
            raise ValueError("layer and head numbers of streaming heads must be 0 or more")

    def groups(self, layer: int, heads: int, whole: HeadGroup) -> tuple[HeadGroup, ...]:
        """The head groups of one layer with `heads` heads whose retrieval heads get `whole`.

        Raises:
            ValueError: a head that the layer does not have.
        """
        short = tuple(sorted(set(self.streaming.get(layer, ()))))
        if short and short[-1] >= heads:
            raise ValueError(f"layer {layer} has {heads} heads, so there is no head {short[-1]}")
        window = min(whole.window, whole.sink + self.recent)
        if not short or window == whole.window:
            return (whole,)
        far = tuple(head for head in range(heads) if head not in short)
        small = HeadGroup(short, whole.sink, window)
        return (small,) if not far else (HeadGroup(far, whole.sink, whole.window), small)
