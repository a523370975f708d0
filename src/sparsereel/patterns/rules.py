"""Rules: what a pattern allows, in a form that is decided for whole blocks first and for bits only where needed.

A rule is a tree of `Both` and `Either` over a few leaves. For a pair of blocks it answers EMPTY (nothing allowed), FULL
(everything allowed) or PARTIAL (look at the bits); PARTIAL may be said too often, the other two are certain. Tokens
outside the video (text, conditions) see and are seen by everything in every leaf.

Symbols: i, j = numbers of query and key blocks; a word = int64 whose bit c says that key column c of the block is
allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from sparsereel.patterns.layout import Coordinate, Kinds, Side, Tokens, distinct_values, scramble, unique_rows

EMPTY, PARTIAL, FULL = 0, 1, 2
WORD = 64
# Words of one prefix table (Band) beyond which pairs are compared one by one instead: 2^23 words are 64 MiB.
LARGEST_TABLE = 2**23
# Beyond every coordinate, and beyond the bounds of blocks without video tokens. All sums of two fit in an int32.
FARTHEST = 2**28
ANYWHERE = 2**30
# Pairs of kinds whose bits are compared beforehand, so that those that come out alike share a tile (8 MiB of bits).
PAIRS_TO_COMPARE = 2**13
# 0 in the video, -1 outside.
WHETHER_VIDEO = Coordinate("index", modulus=1)


class Layout:
    """Both sides of an attention, and what the rules have worked out about them."""

    def __init__(self, queries: Side, keys: Side) -> None:
        self.queries = queries
        self.keys = keys
        self.memory: dict[tuple[Rule, str], Any] = {}

    def once(self, rule: Rule, what: str, compute: Callable[[], Any]) -> Any:
        """`compute()` the first time that `rule` asks for `what`, remembered afterwards."""
        if (rule, what) not in self.memory:
            self.memory[rule, what] = compute()
        return self.memory[rule, what]

    @property
    def words(self) -> int:
        """Words of one row of a key block."""
        return -(-self.keys.block // WORD)


class Rule:
    """A leaf or a combination. `i`, `j` are int64 tensors of block numbers: a list of pairs, or [n, 1] and [1, m]."""

    def status(self, layout: Layout, i: Tensor, j: Tensor) -> Tensor:
        """uint8 EMPTY, PARTIAL or FULL for each pair."""
        raise NotImplementedError

    def key(self, layout: Layout, i: Tensor, j: Tensor, status: Tensor) -> Tensor:
        """int64 for each pair of a list: pairs with equal keys have equal bits (equal keys of others: 1 in 2^64)."""
        raise NotImplementedError

    def bits(self, layout: Layout, i: Tensor, j: Tensor) -> Tensor:
        """[pairs, BQ, words] int64, exact, for a list of pairs that are PARTIAL."""
        raise NotImplementedError

    def words(self, layout: Layout, i: Tensor, j: Tensor) -> Tensor:
        """[pairs, BQ, words] int64, exact, for any list of pairs. Columns past the block are undefined."""
        status = self.status(layout, i, j)
        if bool((status == PARTIAL).all()):
            return self.bits(layout, i, j)
        known = torch.where(status == FULL, -1, 0).to(torch.int64)
        out = known[:, None, None].repeat(1, layout.queries.block, layout.words)
        open_pairs = (status == PARTIAL).nonzero().squeeze(1)
        if open_pairs.numel():
            out[open_pairs] = self.bits(layout, i[open_pairs], j[open_pairs])
        return out


def _mix(key: Tensor, more: Tensor | int) -> Tensor:
    return scramble(key * 0x2545F4914F6CDD1D + more)


@dataclass(frozen=True, eq=False)
class Constant(Rule):
    """Everything, or nothing, text included."""

    allowed: bool

    def status(self, layout: Layout, i: Tensor, j: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(i.shape, j.shape)
        return torch.full(shape, FULL if self.allowed else EMPTY, dtype=torch.uint8)

    def key(self, layout: Layout, i: Tensor, j: Tensor, status: Tensor) -> Tensor:
        return status.to(torch.int64)


@dataclass(frozen=True, eq=False)
class Axis(Rule):
    """Allowed where table[q's coordinate, k's coordinate]; for coordinates of few values.

    table: bool [values, values].
    """

    coordinate: Coordinate
    table: Tensor

    def status(self, layout: Layout, i: Tensor, j: Tensor) -> Tensor:
        q, k = layout.queries.kinds(self.coordinate), layout.keys.kinds(self.coordinate)
        of_kinds: Tensor = layout.once(self, "status", lambda: self._status_of_kinds(q, k))
        if i.dim() == 2:
            return of_kinds[q.of_block[i[:, 0]]].index_select(1, k.of_block[j[0]])
        return of_kinds[q.of_block[i], k.of_block[j]]

    def _status_of_kinds(self, q: Kinds, k: Kinds) -> Tensor:
        table = self._with_outside()
        rows, columns = distinct_values(q.rows), distinct_values(k.rows)
        some = reduce(torch.logical_or, (table[row] for row in rows.T))
        every = reduce(torch.logical_and, (table[row] for row in rows.T))
        touched = reduce(torch.logical_or, (some[:, column] for column in columns.T))
        filled = reduce(torch.logical_and, (every[:, column] for column in columns.T))
        return touched.to(torch.uint8) + filled.to(torch.uint8)

    def _with_outside(self) -> Tensor:
        # Index -1, tokens outside the video, reaches the last row and column.
        return torch.nn.functional.pad(self.table, (0, 1, 0, 1), value=True)

    def key(self, layout: Layout, i: Tensor, j: Tensor, status: Tensor) -> Tensor:
        q, k = layout.queries.kinds(self.coordinate), layout.keys.kinds(self.coordinate)
        names: Tensor = layout.once(self, "names", lambda: self._names_of_kinds(layout))
        pair = names[q.of_block[i] * k.rows.shape[0] + k.of_block[j]]
        return torch.where(status == PARTIAL, _mix(pair, 3), status.to(torch.int64))

    def _names_of_kinds(self, layout: Layout) -> Tensor:
        """[pairs of kinds] numbers, equal where bits are equal; all different where there are too many to look at."""
        q, k = layout.queries.kinds(self.coordinate), layout.keys.kinds(self.coordinate)
        pairs = torch.arange(q.rows.shape[0] * k.rows.shape[0])
        if pairs.numel() > PAIRS_TO_COMPARE:
            return pairs
        words = self._bits_of_kinds(layout, pairs // k.rows.shape[0], pairs % k.rows.shape[0])
        return unique_rows(words.flatten(1))[0]

    def bits(self, layout: Layout, i: Tensor, j: Tensor) -> Tensor:
        q, k = layout.queries.kinds(self.coordinate), layout.keys.kinds(self.coordinate)
        return self._bits_of_kinds(layout, q.of_block[i], k.of_block[j])

    def _bits_of_kinds(self, layout: Layout, i: Tensor, j: Tensor) -> Tensor:
        q, k = layout.queries.kinds(self.coordinate), layout.keys.kinds(self.coordinate)
        table: Tensor = layout.once(self, "words", lambda: self._words_of_values(k, layout.words))
        values = torch.where(q.rows < 0, self.table.shape[0], q.rows)[i]
        return table[values * k.rows.shape[0] + j[:, None]]

    def _words_of_values(self, k: Kinds, words: int) -> Tensor:
        """[(values + 1) * kinds of key blocks, words]: what a query with that coordinate sees of that block."""
        table = self._with_outside()
        out = torch.zeros(table.shape[0], k.rows.shape[0], words, dtype=torch.int64)
        for column in range(k.rows.shape[1]):
            out[:, :, column // WORD] |= table[:, k.rows[:, column]].to(torch.int64) << (column % WORD)
        return out.flatten(0, 1)


@dataclass(frozen=True)
class _Bounds:
    """[n] smallest and largest coordinate of each block: of its video tokens, and with text as being anywhere."""

    low: Tensor
    high: Tensor
    least: Tensor
    most: Tensor


def _bounds(low: Tensor, high: Tensor, has_text: Tensor) -> _Bounds:
    return _Bounds(low, high, torch.where(has_text, -ANYWHERE, low), torch.where(has_text, ANYWHERE, high))


@dataclass(frozen=True, eq=False)
class Band(Rule):
    """Allowed where q - before <= k <= q + after in one coordinate; for coordinates of many values."""

    coordinate: Coordinate
    before: int
    after: int

    def status(self, layout: Layout, i: Tensor, j: Tensor) -> Tensor:
        q, k = layout.once(self, "bounds", lambda: self._bounds(layout))
        before, after = min(self.before, FARTHEST), min(self.after, FARTHEST)
        full = (k.high[j] <= q.low[i] + after) & (k.low[j] >= q.high[i] - before)
        touched = (k.least[j] <= q.most[i] + after) & (k.most[j] >= q.least[i] - before)
        return full.to(torch.uint8) + touched.to(torch.uint8)

    def _bounds(self, layout: Layout) -> tuple[_Bounds, _Bounds]:
        sides = (layout.queries.extent(self.coordinate), layout.keys.extent(self.coordinate))
        return _bounds(*sides[0]), _bounds(*sides[1])

    def key(self, layout: Layout, i: Tensor, j: Tensor, status: Tensor) -> Tensor:
        q = layout.queries.kinds(self.coordinate, shifted=True)
        k = layout.keys.kinds(self.coordinate, shifted=True)
        pair = q.of_block[i] * k.rows.shape[0] + k.of_block[j]
        return torch.where(status == PARTIAL, _mix(_mix(pair, q.base[i] - k.base[j]), 5), status.to(torch.int64))

    def bits(self, layout: Layout, i: Tensor, j: Tensor) -> Tensor:
        q = layout.queries.kinds(self.coordinate, shifted=True)
        k = layout.keys.kinds(self.coordinate, shifted=True)
        rows = q.rows[q.of_block[i]]
        own = rows + (q.base[i] - k.base[j])[:, None]
        kind = k.of_block[j]
        span = int(k.rows.max()) + 1
        if k.rows.shape[0] * (span + 1) * layout.words > LARGEST_TABLE:
            columns = k.rows[kind][:, None]
            seen = (columns >= own[..., None] - self.before) & (columns <= own[..., None] + self.after)
            return pack(seen | (columns < 0) | (rows < 0)[..., None])
        below, outside = layout.once(self, "words", lambda: _prefix_words(k, span, layout.words))
        start = (own - self.before).clamp(0, span) + (kind * (span + 1))[:, None]
        stop = (own + self.after + 1).clamp(0, span) + (kind * (span + 1))[:, None]
        words = (below[stop] & ~below[start]) | outside[kind][:, None]
        return torch.where((rows < 0)[..., None], -1, words)


def _prefix_words(k: Kinds, span: int, words: int) -> tuple[Tensor, Tensor]:
    """([kinds * (span + 1), words] keys of the block below a value, [kinds, words] keys outside the video)."""
    kinds = k.rows.shape[0]
    below = torch.zeros(kinds, span + 1, words, dtype=torch.int64)
    outside = torch.zeros(kinds, words, dtype=torch.int64)
    everyone = torch.arange(kinds)
    for column in range(k.rows.shape[1]):
        value, bit = k.rows[:, column], 1 << (column % WORD) if column % WORD < 63 else -(1 << 63)
        outside[:, column // WORD] |= torch.where(value < 0, bit, 0)
        # Each bit enters once, so the running sum is a running "or".
        below[everyone, value.clamp(min=0) + 1, column // WORD] += torch.where(value < 0, 0, bit)
    return below.cumsum(1).flatten(0, 1), outside


@dataclass(frozen=True, eq=False)
class Marked(Rule):
    """Allowed where the query (side "queries") or the key (side "keys") is marked.

    marks: bool [video tokens], by number inside the video.
    """

    side: str
    marks: Tensor

    def _marks(self, side: Side) -> Tensor:
        return torch.nn.functional.pad(self.marks, (0, 1), value=True)[side.tokens.index]

    def _kinds(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """([n] status of each block of the marked side, [n, B] marks)."""
        marks = self._marks(layout.queries if self.side == "queries" else layout.keys)
        return marks.any(1).to(torch.uint8) + marks.all(1).to(torch.uint8), marks

    def status(self, layout: Layout, i: Tensor, j: Tensor) -> Tensor:
        of_block, _ = layout.once(self, "marks", lambda: self._kinds(layout))
        # The other side's text is seen by all, so a block that holds some is never empty.
        other = layout.keys if self.side == "queries" else layout.queries
        has_text = layout.once(self, "text", lambda: other.tokens.outside.any(1).to(torch.uint8))
        all_text = layout.once(self, "all text", lambda: other.tokens.outside.all(1).to(torch.uint8) * 2)
        own, opposite = (i, j) if self.side == "queries" else (j, i)
        return torch.maximum(of_block[own], torch.maximum(has_text, all_text)[opposite])

    def key(self, layout: Layout, i: Tensor, j: Tensor, status: Tensor) -> Tensor:
        own, opposite = (i, j) if self.side == "queries" else (j, i)
        other = layout.keys if self.side == "queries" else layout.queries
        pair = own * other.count + other.kinds(WHETHER_VIDEO).of_block[opposite]
        return torch.where(status == PARTIAL, _mix(pair, 7), status.to(torch.int64))

    def bits(self, layout: Layout, i: Tensor, j: Tensor) -> Tensor:
        _, marks = layout.once(self, "marks", lambda: self._kinds(layout))
        q_out, k_out = layout.queries.tokens.outside[i], layout.keys.tokens.outside[j]
        own = marks[i][:, :, None] if self.side == "queries" else marks[j][:, None]
        return pack(own | q_out[:, :, None] | k_out[:, None])


@dataclass(frozen=True, eq=False)
class Predicate(Rule):
    """Allowed where `allowed(q, k)` says so: the general case, looked at pair by pair (slow, little memory)."""

    allowed: Callable[[Tokens, Tokens], Tensor]

    def status(self, layout: Layout, i: Tensor, j: Tensor) -> Tensor:
        return torch.full(torch.broadcast_shapes(i.shape, j.shape), PARTIAL, dtype=torch.uint8)

    def key(self, layout: Layout, i: Tensor, j: Tensor, status: Tensor) -> Tensor:
        return i * layout.keys.count + j

    def bits(self, layout: Layout, i: Tensor, j: Tensor) -> Tensor:
        q = layout.queries.tokens.map(lambda x: x[i][:, :, None])
        k = layout.keys.tokens.map(lambda x: x[j][:, None])
        return pack(self.allowed(q, k) | q.outside | k.outside)


@dataclass(frozen=True, eq=False)
class _Combination(Rule):
    parts: tuple[Rule, ...]

    def key(self, layout: Layout, i: Tensor, j: Tensor, status: Tensor) -> Tensor:
        key: Tensor = torch.full_like(i, 11)
        for part in self.parts:
            key = _mix(key, part.key(layout, i, j, part.status(layout, i, j)))
        return torch.where(status == PARTIAL, key, status.to(torch.int64))


class Both(_Combination):
    """Allowed where all parts allow."""

    def status(self, layout: Layout, i: Tensor, j: Tensor) -> Tensor:
        return reduce(torch.minimum, (part.status(layout, i, j) for part in self.parts))

    def bits(self, layout: Layout, i: Tensor, j: Tensor) -> Tensor:
        return reduce(torch.bitwise_and, (part.words(layout, i, j) for part in self.parts))


class Either(_Combination):
    """Allowed where any part allows."""

    def status(self, layout: Layout, i: Tensor, j: Tensor) -> Tensor:
        return reduce(torch.maximum, (part.status(layout, i, j) for part in self.parts))

    def bits(self, layout: Layout, i: Tensor, j: Tensor) -> Tensor:
        return reduce(torch.bitwise_or, (part.words(layout, i, j) for part in self.parts))


def pack(allowed: Tensor) -> Tensor:
    """[..., B] bool -> [..., words] int64, bit c of word c // 64 = column c."""
    allowed = torch.nn.functional.pad(allowed, (0, -allowed.shape[-1] % WORD))
    eights = allowed.contiguous().view(torch.uint8).view(torch.int64)
    # Gathers the lowest bits of the eight bytes of an int64 in its top byte.
    octets = ((eights * 0x0102040810204080) >> 56) & 255
    return octets.to(torch.uint8).view(torch.int64)
