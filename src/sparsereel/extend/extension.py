"""An extension at work on one model: which calls it concerns, and what it changes in them.

It lives in the model's `ModelRuntime`, in hooks, and in attributes of single instances; classes and buffers of
diffusers stay untouched. A call of another size than the wanted one runs as if there were no extension.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsereel.extend import tables
from sparsereel.extend.change import Change, Where
from sparsereel.extend.recipes import Recipe
from sparsereel.extend.rope import RopePolicy
from sparsereel.extend.sizes import Sizes, Triple
from sparsereel.extend.ultravico import FirstFrame
from sparsereel.families.layout import Layout, decode
from sparsereel.patterns.base import Pattern
from sparsereel.token_order import tile_order
from sparsereel_kernels import FrameDecay

if TYPE_CHECKING:
    from sparsereel.extend.prompts import PromptedCall
    from sparsereel.extend.views import Place
    from sparsereel.runtime import ModelRuntime

logger = logging.getLogger("sparsereel")

NOTHING = Change()


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
        #: tokens of a window that the model is seen through just now, and of a size on the way to the wanted one
        self.view: Triple | None = None
        self.stage: Triple | None = None
        #: which of the windows that is; and the pipeline's call, where a regional prior listens to it
        self.place: Place | None = None
        self.prompted: PromptedCall | None = None
        #: a call that sees the whole, without the recipe's window
        self.whole = False
        self._decays: dict[Any, FrameDecay] = {}
        self._told: set[Triple | str] = set()

    # -------------------------------------------------------------- attention

    def concerns(self, tokens: Triple) -> bool:
        """Whether a call with so many tokens along each axis is to be extended."""
        wanted = self.sizes.matches(tokens)
        trained = self.sizes.trained_tokens
        larger = any(a > b for a, b in zip(tokens, trained, strict=True))
        if tokens in (self.view, self.stage):
            return larger
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

    def tell(self, what: str, *details: Any) -> None:
        """Say once, as a warning, what the method could not do; other `details` do not make it another thing."""
        if what not in self._told:
            self._told.add(what)
            logger.warning(what, *details)

    def is_led_by(self, layout: Layout | None) -> bool:
        """Whether a model call with this layout is of the small clip that leads the large one."""
        tokens = None if layout is None else video_of(layout)
        return self.recipe.guide is not None and tokens is not None and not self.sizes.matches(tokens)

    def touches_attention(self, layout: Layout | None) -> bool:
        """Whether attention calls of a model call with this layout may be changed at all."""
        tokens = None if layout is None else video_of(layout)
        return self.recipe.in_attention and tokens is not None and self.concerns(tokens)

    def change(self, where: Where, runtime: ModelRuntime) -> Change | None:
        """What is changed in one attention call; None where nothing is."""
        if not self.touches_attention(where.call):
            return None
        recipe, tokens = self.recipe, video_of(where.call)
        assert tokens is not None
        pattern = self._pattern(where, tokens, runtime)
        scale = 1.0 if recipe.temper is None else recipe.temper.factor(tokens, self.sizes.trained_tokens, pattern)
        mixer = None if recipe.mixer is None else recipe.mixer.at(where, runtime)
        if mixer is not None and mixer.dense_only and pattern is not None:
            mixer = None
        change = Change(self._modifier(where, tokens), pattern, scale, mixer)
        return None if change == NOTHING else change

    def _pattern(self, where: Where, tokens: Triple, runtime: ModelRuntime) -> Pattern | None:
        trained = self.sizes.trained_tokens
        rule: Pattern | None = None
        if self.first_frame is not None and tokens[0] > self.first_frame.trained:
            rule = self.first_frame
        if self.recipe.window is not None and not self.whole:
            window = self.recipe.window.pattern(tokens, trained, where.index)
            rule = window if rule is None else rule if window is None else rule & window
        if self.recipe.unet is not None:
            window = self.recipe.unet.window(where, runtime)
            rule = window if rule is None else rule if window is None else rule & window
        return rule

    def _modifier(self, where: Where, tokens: Triple) -> FrameDecay | None:
        decay, trained = self.recipe.decay, self.sizes.trained_tokens[0]
        if decay is None or tokens[0] <= trained:
            return None
        key = (where.layout, where.tile, where.device)
        if key not in self._decays:
            order = None if where.tile is None else tile_order(where.layout, where.tile)
            # Kept for later calls, which may want gradients.
            with torch.inference_mode(False):
                self._decays = {key: decay.modifier(decode(where.layout), trained, order, where.device)}
        return self._decays[key]

    def check_methods(self, methods: Any, compensation: Any = None) -> None:
        """Refuse what cannot be combined.

        Raises:
            ValueError: UltraViCo with a selector, which scores logits that UltraViCo changes and may move tokens; a
                window with a selector, which would choose what the window forbids; either with a compensation, which
                estimates what the plan leaves out of plain attention.
        """
        if not self.recipe.in_attention:
            return
        name = "ultravico" if self.recipe.decay is not None else self.recipe.describe()
        if compensation is not None:
            raise ValueError(
                f"{name} does not combine with the compensation of this plan ({compensation}); "
                "take it out of the plan, or choose a method that leaves attention alone, such as 'plain'"
            )
        selectors = sorted({str(method) for method in methods if not isinstance(method, Pattern)})
        if selectors:
            raise ValueError(
                f"{name} combines with patterns, not with the selectors of this plan ({', '.join(selectors)}); "
                "choose another plan, or a method that leaves attention alone, such as 'plain'"
            )

    # -------------------------------------------------------------- what else is changed on the model

    def install(self, model: nn.Module, runtime: ModelRuntime) -> list[Any]:
        """Everything outside of the attention calls; returns handles with `.remove()`.

        Raises:
            ValueError: the recipe does not go with this model; nothing is changed then.
        """
        handles = [tables.install(model, self)]
        try:
            for part in self.recipe.on_model:
                handles += part.install(model, self, runtime)
        except BaseException:
            for handle in handles:
                handle.remove()
            raise
        return handles

    def policies(self, tokens: Triple) -> tuple[RopePolicy, RopePolicy, RopePolicy] | None:
        """Policies of the three axes for a call with so many tokens along each; None where nothing changes."""
        if not self.concerns(tokens):
            return None
        a, b, c = (self.recipe.policy(axis) for axis in range(3))
        return a, b, c


def video_of(layout: Layout) -> Triple | None:
    """Frames, rows and columns of the first segment on a grid, in tokens."""
    for start in range(0, len(layout), 4):
        if layout[start] < 2:
            return layout[start + 1], layout[start + 2], layout[start + 3]
    return None
