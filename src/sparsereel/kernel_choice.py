"""Which kernel will run calls that have not been made yet: prices and token orders depend on it."""

from __future__ import annotations

import torch

from sparsereel.token_order import BLOCK
from sparsereel_kernels import dispatch
from sparsereel_kernels.errors import BackendUnavailable
from sparsereel_kernels.problem import Problem


def kernel_for(
    backend: str, device_type: str, dtype: torch.dtype, tokens: int, *, heads: int = 1, head_dim: int = 64
) -> str:
    """Name of the backend that will run forward calls of this shape; "" where none can.

    Args:
        backend: as for `sparsify`: a name or "auto".
    """
    problem = Problem(
        device_type=device_type,
        dtype=dtype,
        batch=1,
        heads=heads,
        kv_heads=heads,
        q_len=tokens,
        kv_len=tokens,
        head_dim=head_dim,
        v_dim=head_dim,
        block=BLOCK,
        has_partial=True,
        modifier=None,
        needs_backward=False,
    )
    try:
        return dispatch.choose(backend, problem, None).name
    except BackendUnavailable:
        return ""
