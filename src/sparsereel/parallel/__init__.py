"""Sparse attention over sequences whose tokens are spread over several processes (context parallelism).

`attention` takes the shards that each process holds. `ulysses` and `ring` are the two ways to exchange them.
"""

from __future__ import annotations

from sparsereel.parallel.call import attention
from sparsereel.parallel.ring import ring_attention
from sparsereel.parallel.shards import Shards
from sparsereel.parallel.ulysses import heads_of_rank, to_heads, to_tokens

__all__ = ["Shards", "attention", "heads_of_rank", "ring_attention", "to_heads", "to_tokens"]
