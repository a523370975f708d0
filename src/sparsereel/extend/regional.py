"""C-Upscale's regional priors (arXiv 2505.16976): what a window of a large picture is told about, and by whom.

Beside the structure that a small result lends the large one (guide.py), every window gets the words of the prompt that
belong there, and prompts of its own region. The paper's code is not public; the forms here are this library's:

    attention prior   the small result's cross-attention map says how much of a token lies in a window. m_n(t) is the
                      mean of the map of token t over window n, divided by its largest value over all windows. A token
                      with m_n(t) < threshold is no key in window n, so that "one dog" is not drawn in each of them.
    semantic prior    out = (1 - w) out(screened prompt) + w out(regional prompt)  in every cross-attention of a window
                      that a prompt's box overlaps enough; several such prompts enter with their mean.

Words are screened and mixed where the prompt is the user's; guidance's other branch stays as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsereel.extend.cross_attention import Composer, cross_attentions, project_text

if TYPE_CHECKING:
    from torch import nn

    from sparsereel.extend.extension import Extension
    from sparsereel.extend.views import Shares
    from sparsereel.runtime import ModelRuntime

#: top, left, bottom, right, as shares of the picture
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class RegionalPrior:
    """Which words and which further prompts reach a window.

    Args:
        prompts: pairs of a text and the box that it is for, (top, left, bottom, right) as shares of the picture. Texts
            are encoded once a call, by the pipeline's own encoder.
        threshold: share of a token's largest mass in any window below which a window does without it; 0 = every window
            has every token. Kept in any case: the first token, end and padding. Maps are blurred: on minireel
            0.4 screens nothing and 0.7 much.
        weight: w, the regional prompts' part in cross-attention.
        overlap: a prompt is for the windows that share at least so much with its box: the area of both together, over
            that of the smaller one.

    Raises:
        ValueError: a text that is none, a box that is empty or leaves the picture, a threshold, weight or overlap out
            of range.
    """

    prompts: tuple[tuple[str, Box], ...] = ()
    threshold: float = 0.5
    weight: float = 0.5
    overlap: float = 0.25

    name: ClassVar[str] = "regional"

    def __post_init__(self) -> None:
        for given in self.prompts:
            _check_region(given)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"the threshold of a regional prior is a share in [0, 1], got {self.threshold}")
        if not 0 <= self.weight <= 1 or not 0 < self.overlap <= 1:
            raise ValueError(
                "a regional prior needs a weight in [0, 1] and an overlap in (0, 1], "
                f"got weight={self.weight}, overlap={self.overlap}"
            )

    def for_window(self, window: Shares) -> list[int]:
        """Numbers of the prompts that a window takes up."""
        return [number for number, (_, box) in enumerate(self.prompts) if overlap(window, box) >= self.overlap]

    def install(self, model: nn.Module, extension: Extension, runtime: ModelRuntime) -> list[Any]:
        """Watch the model's cross-attention; returns handles with `.remove()`.

        Raises:
            ValueError: regional prompts, and a model without cross-attention or one that changes its prompts itself.
        """
        layers, name = cross_attentions(model), type(model).__name__
        if self.prompts and (not layers or project_text(model) is None):
            raise ValueError(
                f"regional prompts need cross-attention (attn2) to texts as they were encoded, which {name} has not"
            )
        if not layers:
            extension.tell(f"the regional prior changes nothing: {name} has no cross-attention (attn2)")
            return []
        return [Composer(self, model, layers, extension, runtime)]


def overlap(window: Shares, box: Box) -> float:
    """Area that a window and a box share, over that of the smaller one; both in shares of the picture."""
    common, areas = 1.0, (1.0, 1.0)
    for (start, stop), (low, high) in zip(window[1:], ((box[0], box[2]), (box[1], box[3])), strict=True):
        common *= max(0.0, min(stop, high) - max(start, low))
        areas = (areas[0] * (stop - start), areas[1] * (high - low))
    return common / min(areas)


def _check_region(given: Any) -> None:
    is_pair = isinstance(given, tuple | list) and len(given) == 2
    if not is_pair or not isinstance(given[0], str) or not given[0].strip():
        raise ValueError(f"a regional prompt is a pair (text, (top, left, bottom, right)), got {given!r}")
    text, box = given
    numbers = isinstance(box, tuple | list) and all(isinstance(side, int | float) for side in box)
    if not numbers or len(box) != 4 or not all(math.isfinite(side) for side in box):
        raise ValueError(f"the box of {text!r} needs four numbers (top, left, bottom, right), got {box!r}")
    top, left, bottom, right = box
    if min(box) < 0 or max(box) > 1:
        raise ValueError(f"the box of {text!r} is in shares of the picture, from 0 to 1, got {box!r}")
    if top >= bottom or left >= right:
        raise ValueError(f"the box of {text!r} is empty: top < bottom and left < right must hold, got {box!r}")
