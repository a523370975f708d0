"""Ulysses: instead of all heads of some tokens, each process gets all tokens of some heads, and gives them back.

After DeepSpeed-Ulysses (Jacobs et al. 2023). Rank r of P owns the heads r H/P to (r + 1) H/P - 1. The ranks' numbers
of tokens may differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def heads_of_rank(heads: int, rank: int, size: int) -> range:
    """The global numbers of the heads that a rank owns.

    Raises:
        ValueError: heads that do not divide by the number of processes.
    """
    if heads % size:
        raise ValueError(f"ulysses needs heads that divide by the {size} processes, got {heads} heads; use ring")
    each = heads // size
    return range(rank * each, (rank + 1) * each)


def to_heads(x: Tensor, lengths: Sequence[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """All tokens of this rank's heads. A collective: every process of the group calls it.

    Args:
        x: (B, lengths[rank], H, D).
        lengths: tokens of each rank.

    Returns:
        (B, S, H / P, D); tokens rank after rank.

    Raises:
        ValueError: heads that do not divide by the number of processes, another length.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    batch, tokens, heads, features = x.shape
    each = len(heads_of_rank(heads, rank, size))
    _check_tokens(tokens, lengths[rank])
    # all_to_all cuts along the first dimension: (rank that gets it, tokens) in front.
    sent = x.unflatten(2, (size, each)).permute(2, 1, 0, 3, 4).flatten(0, 1).contiguous()
    got = sent.new_empty(sum(lengths), batch, each, features)
    dist.all_to_all_single(_octets(got), _octets(sent), list(lengths), [tokens] * size, group=group)
    return got.transpose(0, 1)


def to_tokens(x: Tensor, lengths: Sequence[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """All heads of this rank's tokens: undoes `to_heads`. A collective.

    Args:
        x: (B, S, H / P, D).

    Returns:
        (B, lengths[rank], H, D).

    Raises:
        ValueError: another length.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    batch, tokens, each, features = x.shape
    _check_tokens(tokens, sum(lengths))
    sent = x.transpose(0, 1).contiguous()
    got = sent.new_empty(size * lengths[rank], batch, each, features)
    dist.all_to_all_single(_octets(got), _octets(sent), [lengths[rank]] * size, list(lengths), group=group)
    return got.unflatten(0, (size, lengths[rank])).permute(2, 1, 0, 3, 4).flatten(2, 3)


def _octets(x: Tensor) -> Tensor:
    """The same memory as bytes: not every transport knows every float."""
    return x.view(torch.uint8)


def _check_tokens(given: int, expected: int) -> None:
    if given != expected:
        raise ValueError(f"this rank should hold {expected} tokens here, got {given}")
