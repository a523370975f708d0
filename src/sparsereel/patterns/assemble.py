"""From a rule to a BlockMask, in memory proportional to the number of blocks.

Blocks that the rule decides at once need no bits. Of the others, those with equal keys are looked at once, and tiles of
equal bits are stored once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsereel.patterns.layout import first_occurrence, unique_rows
from sparsereel.patterns.rules import EMPTY, FULL, PARTIAL, WORD, Layout, Rule
from sparsereel_kernels import BlockMask

# Pairs of blocks that are classified at a time, and words of bits that are computed at a time.
PAIRS_AT_ONCE = 2**21
WORDS_AT_ONCE = 2**20


@dataclass
class Blocks:
    """The state of every pair of blocks, and the bits of the partial ones.

    state: [nQ, nK] uint8 EMPTY, PARTIAL or FULL. tile: [number of PARTIAL pairs] row of `bits`, pairs in row-major
    order. bits: [tiles, BQ, words] int64.
    """

    state: Tensor
    tile: Tensor
    bits: Tensor


def decide(rule: Rule, layout: Layout) -> Blocks:
    """Classify every pair of blocks exactly."""
    state, keys = _classify(rule, layout)
    i, j = (state == PARTIAL).nonzero().unbind(1)
    _, alike = torch.unique(keys, return_inverse=True)
    first = first_occurrence(alike)
    outcome, tile, bits = _look(rule, layout, i[first], j[first])
    state[i, j] = outcome[alike]
    partial = outcome[alike] == PARTIAL
    return Blocks(state, tile[alike][partial], bits)


def rows_with_keys(rule: Rule, layout: Layout) -> Tensor:
    """bool [queries]: which queries may attend to any key of the layout."""
    blocks = decide(rule, layout)
    full_blocks = (blocks.state == FULL).any(1).to(torch.int64)
    seen = full_blocks[:, None].repeat(1, layout.queries.block)
    query_block = (blocks.state == PARTIAL).nonzero()[:, 0]
    rows_of_tile = (blocks.bits != 0).any(2).to(torch.int64)
    for part in torch.arange(query_block.numel()).split(WORDS_AT_ONCE // layout.queries.block):
        seen.index_add_(0, query_block[part], rows_of_tile[blocks.tile[part]])
    return seen.flatten()[: layout.queries.length] > 0


def _classify(rule: Rule, layout: Layout) -> tuple[Tensor, Tensor]:
    """[nQ, nK] status, and a key for each PARTIAL pair in row-major order."""
    count = layout.keys.count
    every_key = torch.arange(count)[None]
    state = torch.empty(layout.queries.count, count, dtype=torch.uint8)
    keys = [torch.empty(0, dtype=torch.int64)]
    for rows in torch.arange(layout.queries.count).split(max(1, PAIRS_AT_ONCE // count)):
        state[rows] = rule.status(layout, rows[:, None], every_key)
        i, j = (state[rows] == PARTIAL).nonzero().unbind(1)
        i = i + rows[0]
        # A ragged last block has bits cut off, so it shares tiles only with its like.
        ragged = (i == layout.queries.count - 1) * 2 + (j == count - 1) * 1
        keys.append(rule.key(layout, i, j, state[i, j]) * 4 + ragged)
    return state, torch.cat(keys)


def _look(rule: Rule, layout: Layout, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outcome [pairs], tile number [pairs] and the different tiles [tiles, BQ, words] of a list of pairs."""
    block = layout.queries.block
    inside = _column_words(layout.keys.block, layout.words)
    if i.numel() == 0:
        none = torch.empty(0, dtype=torch.int64)
        return none.to(torch.uint8), none, none.view(0, block, layout.words)
    outcomes, tiles, bits, known = [], [], [], 0
    for part in torch.arange(i.numel()).split(max(1, WORDS_AT_ONCE // (block * layout.words))):
        words = rule.words(layout, i[part], j[part]) & inside
        outcome = _outcome(words, inside)
        _cut(words, layout, i[part], j[part], inside)
        alike, first = unique_rows(words.flatten(1))
        outcomes.append(outcome)
        tiles.append(alike + known)
        bits.append(words[first])
        known += first.numel()
    outcome, tile, words = torch.cat(outcomes), torch.cat(tiles), torch.cat(bits)
    alike, first = unique_rows(words.flatten(1))
    return outcome, *_used(outcome, alike[tile], words[first])


def _used(outcome: Tensor, tile: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the tiles that no PARTIAL pair shows."""
    used = torch.zeros(words.shape[0], dtype=torch.bool)
    used[tile[outcome == PARTIAL]] = True
    return (used.cumsum(0) - 1)[tile], words[used]


def _outcome(words: Tensor, inside: Tensor) -> Tensor:
    full = (words == inside).flatten(1).all(1)
    some = (words != 0).flatten(1).any(1)
    return full.to(torch.uint8) + some.to(torch.uint8)


def _column_words(columns: int, words: int) -> Tensor:
    """[words] int64 with a bit for each of the first `columns` columns."""
    filled = (columns - torch.arange(words) * WORD).clamp(0, WORD)
    return torch.where(filled == WORD, -1, (1 << filled.clamp(max=WORD - 1)) - 1)


def _cut(words: Tensor, layout: Layout, i: Tensor, j: Tensor, inside: Tensor) -> None:
    """Clear, in place, the bits of rows and columns past the ends of the sequence."""
    last_columns = _column_words(layout.keys.valid_in_last, layout.words)
    words &= torch.where((j == layout.keys.count - 1)[:, None], last_columns, inside)[:, None]
    words[i == layout.queries.count - 1, layout.queries.valid_in_last :] = 0


def to_block_mask(blocks: Blocks, layout: Layout, *, exact: bool) -> BlockMask:
    """The BlockMask (one batch, one head) of `blocks`; without `exact` every touched block is full."""
    q_block, k_block = layout.queries.block, layout.keys.block
    full, partial = blocks.state == FULL, blocks.state == PARTIAL
    if not exact:
        full, partial = blocks.state != EMPTY, torch.zeros_like(full)
    full_counts, full_indices, _ = _index_lists(full)
    counts, indices, slots = _index_lists(partial)
    tile = torch.zeros_like(indices)
    if exact:
        tile[slots] = blocks.tile.to(torch.int32)
    bits = blocks.bits if exact else blocks.bits[:0]
    octets = bits.flatten().view(torch.uint8).view(-1, q_block, layout.words * 8)[..., : k_block // 8]
    return BlockMask.from_lists(
        seq_lengths=(layout.queries.length, layout.keys.length),
        BLOCK_SIZE=(q_block, k_block),
        kv_num_blocks=counts[None, None],
        kv_indices=indices[None, None],
        full_kv_num_blocks=full_counts[None, None],
        full_kv_indices=full_indices[None, None],
        partial_tile=tile[None, None],
        partial_bits=octets.contiguous(),
    )


def _index_lists(present: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """([nQ] counts, [nQ, longest] ascending columns then zeros, where each entry went) of a bool [nQ, nK]."""
    counts = present.sum(1)
    rows, columns = present.nonzero().unbind(1)
    slot = torch.arange(rows.numel()) - (counts.cumsum(0) - counts)[rows]
    indices = torch.zeros(present.shape[0], int(counts.max()), dtype=torch.int32)
    indices[rows, slot] = columns.to(torch.int32)
    return counts.to(torch.int32), indices, (rows, slot)
