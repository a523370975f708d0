"""What a pattern is: a frozen description of who may attend to whom, independent of the size of the video.

A pattern says the same thing twice: `allowed`, the formula for a pair of tokens, which is the definition; and `rule`,
the formula in a form that is decided block by block, which is fast. Tests hold the two together. A pattern of your
own needs only `allowed`; its block masks are then exact too, and slow.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsereel.grid import Permutation, TokenGrid
from sparsereel.patterns.assemble import decide, to_block_mask
from sparsereel.patterns.layout import Side, Tokens
from sparsereel.patterns.rules import Layout, Predicate, Rule
from sparsereel_kernels import BlockMask
from sparsereel_kernels.block_lists import check_block

if TYPE_CHECKING:
    from sparsereel.patterns.compose import AllOf, AnyOf

Range = tuple[int, int]


class Pattern:
    """Who may attend to whom. Subclasses are frozen dataclasses with `eq=False`, compared and hashed as written.

    Text and condition tokens see and are seen by everything; `allowed` and `rule` are about the video alone.
    """

    name: ClassVar[str]
    # Whether each query sees itself. If so, intersections with other such patterns never leave a query without keys.
    sees_itself: ClassVar[bool] = False

    def allowed(self, grid: TokenGrid, q: Tokens, k: Tokens) -> Tensor:
        """Bool tensor of the broadcast shape of `q` and `k`: may this query attend to this key?"""
        raise NotImplementedError(f"{type(self).__name__} must define allowed(grid, q, k)")

    def rule(self, grid: TokenGrid) -> Rule:
        """The same, decided block by block."""
        return Predicate(lambda q, k: self.allowed(grid, q, k))

    def for_head(self, layer: int, head: int) -> Pattern:
        """The pattern that this head of this layer follows; itself where all heads are alike."""
        return self

    def preferred_tile(self, grid: TokenGrid) -> tuple[int, int, int] | None:
        """The tile whose token order (`grid.tile_order`) makes blocks of this pattern fullest; None for grid order."""
        return None

    def token_mask(self, grid: TokenGrid, *, layer: int = 0, head: int | None = None) -> Tensor:
        """The definition: bool [S, S], True = may attend. For small grids; memory grows with the square of the length.

        Args:
            head: Which head, for patterns that differ between heads.
        """
        pattern = self.for_head(layer, head or 0)
        if pattern is not self:
            return pattern.token_mask(grid, layer=layer, head=head)
        tokens = Tokens.of(grid)
        q, k = tokens.map(lambda x: x[:, None]), tokens.map(lambda x: x[None])
        return self.allowed(grid, q, k) | q.outside | k.outside

    def block_mask(
        self,
        grid: TokenGrid,
        block: tuple[int, int] = (128, 64),
        *,
        heads: int = 1,
        layer: int = 0,
        order: Permutation | None = None,
        queries: Range | None = None,
        keys: Range | None = None,
        exact: bool = True,
    ) -> BlockMask:
        """The mask as lists of blocks, on the CPU; fast, with memory proportional to the number of blocks.

        Args:
            block: (query, key) tokens of a block, multiples of 8.
            heads: Number of heads. Where all are alike they share one mask (a head dimension of 1).
            order: Order of the tokens in the sequence the mask is for; None = grid order.
            queries, keys: (start, stop) ranges of tokens in that order; None = all. For shards and streaming.
            exact: True decodes to `token_mask`; False makes every touched block full (a superset, without bits).

        Raises:
            ValueError: an order of another length, a range outside the sequence, a block that kernels do not take.
        """
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        block = check_block(block)
        patterns = [self.for_head(layer, head) for head in range(heads)]
        tokens = Tokens.of(grid)
        if order is not None:
            if len(order) != grid.seq_len:
                raise ValueError(f"the order has {len(order)} tokens, the grid {grid.seq_len}")
            tokens = tokens.map(lambda x: x[order.indices])
        layout = Layout(
            Side(_cut(tokens, "queries", queries), block[0]),
            Side(_cut(tokens, "keys", keys), block[1]),
        )
        different = dict.fromkeys(patterns)
        masks = {p: to_block_mask(decide(p.rule(grid), layout), layout, exact=exact) for p in different}
        return masks[patterns[0]] if len(masks) == 1 else BlockMask.stack([masks[p] for p in patterns])

    def arguments(self) -> dict[str, Any]:
        """The arguments that differ from their defaults, so that `make(name, **arguments)` gives the pattern back."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        required = {f.name: given[f.name] for f in fields(self) if f.default is MISSING}  # type: ignore[arg-type]
        defaults = type(self)(**required)
        return {k: v for k, v in given.items() if k in required or repr(v) != repr(getattr(defaults, k))}

    def __str__(self) -> str:
        """Short form for tables: the name and the arguments that differ from their defaults."""
        listed = ", ".join(f"{key}={value}" for key, value in self.arguments().items())
        return f"{self.name}({listed})" if listed else self.name

    # A window of 1 (token) and of 1.0 (the whole axis) are equal numbers and different patterns, so text is compared.
    @cached_property
    def _written(self) -> str:
        return repr(self)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Pattern) and self._written == other._written

    def __hash__(self) -> int:
        return hash(self._written)

    def __and__(self, other: Pattern) -> AllOf:
        from sparsereel.patterns.compose import AllOf

        return AllOf((self, other))

    def __or__(self, other: Pattern) -> AnyOf:
        from sparsereel.patterns.compose import AnyOf

        return AnyOf((self, other))


def _cut(tokens: Tokens, name: str, bounds: Range | None) -> Tokens:
    length = tokens.index.numel()
    start, stop = bounds or (0, length)
    if not 0 <= start < stop <= length:
        raise ValueError(f"{name} must be a range (start, stop) inside 0..{length} with start < stop, got {bounds!r}")
    return tokens.map(lambda x: x[start:stop])


def distance(length: int) -> Tensor:
    """[length, length] |q - k| of two coordinates of an axis."""
    axis = torch.arange(length)
    return (axis[:, None] - axis).abs()
