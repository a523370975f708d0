"""The torch backend's memory grows with the sequence, not with its square."""

from __future__ import annotations

import sys

import pytest
import torch

from sparsereel_kernels import torch_blocks
from sparsereel_kernels.memory import peak_extra_bytes
from sparsereel_kernels.testing import make_qkv, random_block_mask

TOKENS = 16_384


def steady_peak(call):
    """The least of three: what else lives in the process can only add to a peak."""
    return min(peak_extra_bytes(call) for _ in range(3))


@pytest.fixture
def _plain_memory():
    """Filling memory with NaN touches all of it, also what a call never writes."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_plain_memory")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float32, "bhsd"), (torch.bfloat16, "bhsd"), (torch.bfloat16, "bshd")], ids=str
)
def test_peak_is_below_three_times_the_inputs(dtype, layout):
    q, k, v = make_qkv(TOKENS, heads=4, dtype=dtype, layout=layout)
    mask = random_block_mask(TOKENS, density=0.08, partial_share=0.2)
    size = q.nbytes + k.nbytes + v.nbytes
    out, lse = torch_blocks.forward(q, k, v, mask, 0.125)
    forward = steady_peak(lambda: torch_blocks.forward(q, k, v, mask, 0.125))
    assert out.nbytes <= forward < 3 * size, f"forward takes {forward / size:.2f} times q, k and v"
    backward = steady_peak(lambda: torch_blocks.backward(out, None, q, k, v, out, lse, mask, 0.125))
    assert size <= backward < 3 * size, f"backward takes {backward / size:.2f} times q, k and v"


def test_the_measure_sees_what_is_allocated():
    taken = peak_extra_bytes(lambda: torch.zeros(64 << 20, dtype=torch.uint8))
    assert 0.9 * (64 << 20) < taken < 1.2 * (64 << 20)
