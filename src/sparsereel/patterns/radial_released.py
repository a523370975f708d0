"""The block mask that Radial Attention's released code builds: windows in powers of two, reduced to blocks by a vote.

It differs from the paper's formula, and its densities are the ones that published runs had. For frames i, j with
D = |i - j|, g = bits of D (1 for 1, 2 for 2..3, 3 for 4..7), s tokens a frame, P = smallest power of two above s:

    window    |a - b| <= max(decay * P / 2^g, 128), the whole frame for D <= 1
    dropped   if u = P / 2^g < 128, unless D mod floor(128 / u) = 0
    sink      j < sink_frames is whole
    vote      a block of 128 x 128 is kept if, of its columns with any allowed pair, more than 60% are over a third full

Frames that do not start on a block share it with their neighbour; a block is kept if either frame's vote keeps it.
Each block sees itself, whatever the vote (the released code does so only where frames are aligned).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 128
WHOLE = 2**60


@lru_cache(maxsize=8)
def released_blocks(frames: int, frame_len: int, decay: float, sink_frames: int) -> Tensor:
    """bool [n, n], n = number of blocks of 128 tokens of the video."""
    count = -(-frames * frame_len // BLOCK)
    kept = torch.eye(count, dtype=torch.bool)
    windows = [_window(d, frame_len, decay) for d in range(frames)]
    for i in range(frames):
        for j in range(frames):
            window = WHOLE if j < sink_frames else windows[abs(i - j)]
            if window < 0:
                continue
            row, row_offset = divmod(i * frame_len, BLOCK)
            column, column_offset = divmod(j * frame_len, BLOCK)
            votes = _vote(window, frame_len, row_offset, column_offset)
            kept[row : row + votes.shape[0], column : column + votes.shape[1]] |= votes
    return kept


def _window(frames_apart: int, frame_len: int, decay: float) -> int:
    """Largest |a - b| of a pair of frames; -1 where the pair is dropped."""
    unit = 2.0 ** (frame_len.bit_length() - frames_apart.bit_length())
    if unit < BLOCK and frames_apart % int(BLOCK / unit):
        return -1
    return WHOLE if frames_apart <= 1 else int(max(unit * decay, BLOCK))


@lru_cache(maxsize=4096)
def _vote(window: int, frame_len: int, row_offset: int, column_offset: int) -> Tensor:
    """bool [row blocks, column blocks] of a pair of frames that start `offset` tokens inside their first blocks."""
    rows = -(-(row_offset + frame_len) // BLOCK)
    columns = -(-(column_offset + frame_len) // BLOCK)
    edges = torch.arange(rows + 1) * BLOCK - row_offset
    first, stop = edges[:-1, None].clamp(min=0), edges[1:, None].clamp(max=frame_len)
    place = torch.arange(frame_len)
    filled = (torch.minimum(stop, place + window + 1) - torch.maximum(first, place - window)).clamp(min=0)
    block_of_column = (place + column_offset) // BLOCK
    touched = torch.zeros(rows, columns, dtype=torch.int64).index_add_(1, block_of_column, (filled > 0).long())
    crowded = torch.zeros(rows, columns, dtype=torch.int64).index_add_(1, block_of_column, (filled * 3 > BLOCK).long())
    return crowded * 10 > touched * 6
