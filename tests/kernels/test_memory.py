"""The torch backend's memory grows with the sequence, not with its square."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, torch
from sparsereel_kernels.memory import peak_extra_bytes
from sparsereel_kernels import torch_blocks
from sparsereel_kernels.testing import make_qkv, random_block_mask

torch.set_num_threads(2)
dtype, layout = getattr(torch, sys.argv[1]), sys.argv[2]
q, k, v = make_qkv(16_384, heads=4, dtype=dtype, layout=layout)
mask = random_block_mask(16_384, density=0.1, partial_share=0.2)
small = make_qkv(256, dtype=dtype)
torch_blocks.forward(*small, None, 0.1)
out, lse = torch_blocks.forward(q, k, v, mask, 0.125)
del out, lse
size = q.nbytes + k.nbytes + v.nbytes
forward = peak_extra_bytes(lambda: torch_blocks.forward(q, k, v, mask, 0.125))
out, lse = torch_blocks.forward(q, k, v, mask, 0.125)
backward = peak_extra_bytes(lambda: torch_blocks.backward(out, None, q, k, v, out, lse, mask, 0.125))
print(forward / size, backward / size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("dtype", "layout"), [("float32", "bhsd"), ("bfloat16", "bshd")])
def test_peak_is_below_three_times_the_inputs(dtype, layout):
    """In a process of its own whose freed memory goes back at once, so that the peak is what was in use."""
    environment = {"OMP_NUM_THREADS": "2", "MALLOC_MMAP_THRESHOLD_": "65536", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", PROGRAM, dtype, layout]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    forward, backward = map(float, result.stdout.split())
    assert forward < 3, f"forward takes {forward:.2f} times q, k and v"
    assert backward < 3, f"backward takes {backward:.2f} times q, k and v"
