"""Names of block masks: numbers that compiled graphs carry instead of Python objects.

A compiled graph can hold tensors, not masks, and a number in its code would be a new graph for every layer. So each
mask has a name, a 0-d int64 CPU tensor that never changes and is never given out again; 0 stands for "no mask".

Lifetime. `find` must answer as long as a graph may ask, which is longer than the layer that owned the mask may live:
the plan can be replaced between forward and backward. The table itself holds masks weakly, and a name made by
`name_tensor` owns its mask: the mask lives as long as the tensor's memory does, also where only autograd's saved
tensors still hold it. `BlockMask.name` is the exception (a mask owning itself would never be freed); whoever reads
it holds the mask. Copies of names (an offloaded activation, a clone) own nothing; for them the last masks used are
kept besides, up to KEPT_BYTES. Where a mask is gone nevertheless, `find` raises: no other mask ever takes its place.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .block_mask import BlockMask

KEPT_BYTES = 256 << 20

_names = itertools.count(1)
_masks: weakref.WeakValueDictionary[int, BlockMask] = weakref.WeakValueDictionary()
_recent: OrderedDict[int, BlockMask] = OrderedDict()
_lock = threading.Lock()


class _Owner(bytearray):
    """Memory of a name tensor; storage made from it keeps this object, and so the mask, alive."""

    mask: BlockMask | None


def register(mask: BlockMask) -> Tensor:
    """Give `mask` a name that does not own it."""
    number = next(_names)
    with _lock:
        _masks[number] = mask
    # A mask may be built in inference mode and be used in training.
    with torch.inference_mode(False):
        return torch.tensor(number, dtype=torch.int64, device="cpu")


def name_tensor(mask: BlockMask | None) -> Tensor:
    """A new 0-d int64 CPU tensor that names `mask` and keeps it alive; None gives the name of "no mask"."""
    number = 0 if mask is None else int(mask.name)
    owner = _Owner(number.to_bytes(8, sys.byteorder))
    owner.mask = mask
    with torch.inference_mode(False):
        return torch.frombuffer(owner, dtype=torch.int64).reshape(())


def find(name: Tensor) -> BlockMask | None:
    """The mask that `name` stands for.

    Raises:
        RuntimeError: the mask has been freed.
    """
    number = int(name)
    if number == 0:
        return None
    with _lock:
        mask = _masks.get(number)
        if mask is None:
            raise RuntimeError(
                f"block mask {number} no longer exists; keep the BlockMask (or the tensor that mask_name gave) "
                "as long as a graph uses it"
            )
        _keep(number, mask)
    return mask


def _keep(number: int, mask: BlockMask) -> None:
    """Hold `mask` until others have used up the room."""
    if number in _recent:
        _recent.move_to_end(number)
        return
    _recent[number] = mask
    size = sum(kept.nbytes for kept in _recent.values())
    while size > KEPT_BYTES and len(_recent) > 1:
        size -= _recent.popitem(last=False)[1].nbytes
