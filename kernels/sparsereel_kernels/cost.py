"""What a mask is expected to cost, as a share of the dense call on the same backend.

A block kernel pays for every block it visits. The native CPU kernels look inside partial blocks: strips of 16 keys that
no row of a panel may see are skipped, so a mask of thin stripes costs far less than its blocks say.
"""

from __future__ import annotations

from .block_mask import BlockMask

#: Share of the pairs that are visited and not allowed which a backend pays for nevertheless. Measured on masks of
#: radial, temporal and window shape at 8,448 tokens: 0.05 to 0.4 on the CPU; block kernels pay in full.
PAID_WASTE = {"cpu": 0.35}


def expected_share(mask: BlockMask | None, backend: str) -> float:
    """Time of a call with `mask` over the time of the dense call, by density alone (1 for None).

    Args:
        backend: the name of the one that will run.
    """
    if mask is None:
        return 1.0
    waste = mask.density - mask.token_density
    return mask.token_density + PAID_WASTE.get(backend, 1.0) * waste
