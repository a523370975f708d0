"""What a clip is made of: passes of the model over so many tokens each, by recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsereel.extend.recipes import Recipe
from sparsereel.extend.sizes import Sizes, Triple
from sparsereel.grid import TokenGrid
from sparsereel.patterns.base import Pattern


@dataclass(frozen=True)
class Pass:
    """Passes that are alike.

    Attributes:
        count: of them, for the whole clip.
        tokens: along each axis.
        windowed: whether the recipe's window holds.
    """

    count: float
    tokens: Triple
    windowed: bool = True

    @property
    def total(self) -> int:
        """Tokens of one pass."""
        return math.prod(self.tokens)


def passes(recipe: Recipe, sizes: Sizes, forwards: int) -> list[Pass]:
    """All passes of a clip whose sampler asks the model `forwards` times.

    A guide's stages come first, each at its own size; views run once a window, dilated views once a coset of rows and
    columns; the dual path adds whole passes, for one branch of guidance unless every call has its own.
    """
    trained, target = sizes.trained_tokens, sizes.target_tokens
    found: list[Pass] = []
    asked = float(forwards)
    if recipe.guide is not None and sizes.grows:
        stages = recipe.guide.stages
        for stage in range(stages):
            share = stage / stages
            rows, columns = (round(trained[a] + (target[a] - trained[a]) * share) for a in (1, 2))
            found += _at(recipe, sizes, (target[0], rows, columns), asked)
        if recipe.guide.mode == "start":
            asked = float(round(forwards * recipe.guide.strength))
    return found + _at(recipe, sizes, target, asked)


def _at(recipe: Recipe, sizes: Sizes, tokens: Triple, asked: float) -> list[Pass]:
    trained = sizes.trained_tokens
    if not any(n > t for n, t in zip(tokens, trained, strict=True)):
        return [Pass(asked, tokens)]
    found = []
    if recipe.views is not None:
        sides = recipe.views.sides(tokens, trained)
        found.append(Pass(asked * len(recipe.views.cut(tokens, trained, (1, 1, 1), None)), sides))
        if recipe.views.dilated:
            rows, columns = (math.ceil(tokens[a] / trained[a]) for a in (1, 2))
            part = (tokens[0], math.ceil(tokens[1] / rows), math.ceil(tokens[2] / columns))
            found.append(Pass(asked * rows * columns, part))
        return found
    if recipe.dual is not None:
        branches = 1.0 if recipe.dual.every == 1 else 0.5
        found.append(Pass(asked * recipe.dual.until * branches / recipe.dual.every, tokens, windowed=False))
    return [*found, Pass(asked, tokens)]


def window_share(recipe: Recipe, sizes: Sizes, tokens: Triple, layers: int) -> float:
    """Share of token pairs that the recipe's window allows, the mean over layers; 1 where there is none."""
    if recipe.window is None:
        return 1.0
    shares = [_share(recipe.window.pattern(tokens, sizes.trained_tokens, layer), tokens) for layer in range(2)]
    odd = layers // 2
    return (shares[0] * (layers - odd) + shares[1] * odd) / layers


def _share(pattern: Pattern | None, tokens: Triple) -> float:
    """Of a pattern, from one grid of the size: block masks of large grids take under a second."""
    if pattern is None:
        return 1.0
    return float(pattern.block_mask(TokenGrid(*tokens)).token_density)
