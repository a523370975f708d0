"""Ring attention: queries stay, keys and values go round; each step attends to one shard of them.

After Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers" (2023). Steps are merged by their
log-sum-exps with the larger one taken off first, so rows that see no key in a step, or in none, are right. Unlike
diffusers, which gathers all keys and values first, a process holds two shards of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsereel.parallel.shards import Shards
from sparsereel_kernels import BlockMask, merge_attention, sparse_attention

#: what a step passes to `sparse_attention` besides tensors and mask, by the rank whose keys it looks at
Options = Callable[[int], dict[str, Any]]


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    shards: Shards,
    group: dist.ProcessGroup | None = None,
    *,
    options: Options = lambda owner: {},
) -> Tensor:
    """Attention of this rank's queries to everybody's keys. A collective.

    Args:
        q: (B, H, s, D), k: (B, Hkv, s, D), v: (B, Hkv, s, Dv), s = shards.lengths[rank]; Hkv divides H.
        mask: for the whole sequence, tokens rank after rank; None = dense.
        options: further arguments of `sparse_attention` for a step.

    Returns:
        (B, H, s, Dv) in q's dtype, added up in fp32 (fp64 for fp64). A query with no visible key gives zeros.
    """
    rank, size = dist.get_rank(group), shards.size
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=precise)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=precise, device=q.device)
    for step in range(size):
        owner = (rank - step) % size
        coming = _pass_on(k, v, shards, owner, group) if step < size - 1 else None
        if q.shape[2] and k.shape[2]:
            part = None if mask is None else mask.cut(shards.span(rank), shards.span(owner))
            if part is None or part.density > 0:
                found, found_lse = sparse_attention(q, k, v, part, return_lse=True, **options(owner))
                out, lse = merge_attention(out, lse, found.to(precise), found_lse)
        if coming is not None:
            k, v = coming()
    return out.to(q.dtype)


def _pass_on(
    k: Tensor, v: Tensor, shards: Shards, owner: int, group: dist.ProcessGroup | None
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Begin to send what this rank holds to the next one and to get the last one's; call the result to wait for it."""
    rank, size = dist.get_rank(group), shards.size
    world = dist.group.WORLD if group is None else group
    assert world is not None
    after, before = (dist.get_global_rank(world, (rank + shift) % size) for shift in (1, -1))
    length = shards.lengths[(owner - 1) % size]
    sent = [k.contiguous(), v.contiguous()]
    got = [x.new_empty(*x.shape[:2], length, x.shape[3]) for x in sent]
    work = [dist.P2POp(dist.isend, x.view(torch.uint8), after, group) for x in sent if x.numel()]
    work += [dist.P2POp(dist.irecv, x.view(torch.uint8), before, group) for x in got if x.numel()]
    requests = dist.batch_isend_irecv(work) if work else []

    def wait() -> tuple[Tensor, Tensor]:
        for request in requests:
            request.wait()
        # `sent` is read until here, so it has to live as long.
        sent.clear()
        return got[0], got[1]

    return wait
