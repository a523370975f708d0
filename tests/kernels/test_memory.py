"""The torch backend's memory grows with the sequence, not with its square."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from sparsereel_kernels.memory import peak_extra_bytes

# A process of its own: what earlier tests left of the heap in pieces would count as taken anew.
MEASURE = """
import json, sys, torch
from sparsereel_kernels import torch_blocks
from sparsereel_kernels.memory import peak_extra_bytes
from sparsereel_kernels.testing import make_qkv, random_block_mask

dtype, layout, tokens = getattr(torch, sys.argv[1]), sys.argv[2], 16_384
q, k, v = make_qkv(tokens, heads=4, dtype=dtype, layout=layout)
mask = random_block_mask(tokens, density=0.08, partial_share=0.2)
out, lse = torch_blocks.forward(q, k, v, mask, 0.125)
calls = {
    "forward": lambda: torch_blocks.forward(q, k, v, mask, 0.125),
    "backward": lambda: torch_blocks.backward(out, None, q, k, v, out, lse, mask, 0.125),
}
# The least of three: what else lives in the process can only add to a peak.
peaks = {name: min(peak_extra_bytes(call) for _ in range(3)) for name, call in calls.items()}
print(json.dumps({**peaks, "inputs": q.nbytes + k.nbytes + v.nbytes, "out": out.nbytes}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("dtype", "layout"), [("float32", "bhsd"), ("bfloat16", "bhsd"), ("bfloat16", "bshd")])
def test_peak_is_below_three_times_the_inputs(dtype, layout):
    done = subprocess.run([sys.executable, "-c", MEASURE, dtype, layout], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    size, forward, backward = found["inputs"], found["forward"], found["backward"]
    assert found["out"] <= forward < 3 * size, f"forward takes {forward / size:.2f} times q, k and v"
    assert size <= backward < 3 * size, f"backward takes {backward / size:.2f} times q, k and v"


def test_the_measure_sees_what_is_allocated():
    taken = peak_extra_bytes(lambda: torch.zeros(64 << 20, dtype=torch.uint8))
    assert 0.9 * (64 << 20) < taken < 1.2 * (64 << 20)
