"""Masks of long videos are fast and small: nothing of the size of (S, S) is ever made."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, time, torch
from sparsereel import patterns
from sparsereel.grid import TokenGrid
torch.set_num_threads(1)
make = lambda: {
    "neighborhood": patterns.Neighborhood((18, 24, 24)),
    "sliding_tile": patterns.SlidingTile((3, 3, 5), tile=(6, 8, 8)),
    "radial": patterns.Radial(),
    "released": patterns.Radial(0.8, flavour="released"),
    "spatial": patterns.Spatial() | patterns.Sink(),
    "temporal": patterns.Temporal(3) | patterns.Sink(),
    "causal": patterns.Causal() & patterns.Radial(),
    "diagonal": patterns.Diagonal(4000) | patterns.VerticalStripe((0, (0.5, 0.51))),
    "multi_diagonal": patterns.MultiDiagonal(200),
}
patterns.Radial().block_mask(TokenGrid(4, 16, 16))
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
seconds = {}
for text in (0, 256):
    grid = TokenGrid(30, 48, 80, text)
    for tile in (None, (4, 8, 8)):
        order = grid.tile_order(tile) if tile else None
        for name, pattern in make().items():
            begin = time.process_time()
            pattern.block_mask(grid, order=order)
            seconds[f"{name}, text {text}, tile {tile}"] = time.process_time() - begin
megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
print(json.dumps({"seconds": seconds, "megabytes": megabytes}))
"""


@pytest.fixture(scope="module")
def measured():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def test_115200_tokens_take_under_a_second_on_two_cores(measured):
    # Processor time of one thread, which a busy machine does not stretch.
    slow = {name: round(seconds, 2) for name, seconds in measured["seconds"].items() if seconds > 2}
    assert not slow


def test_memory_is_that_of_blocks_not_of_pairs(measured):
    # One byte for every pair of tokens would be 12,700 MB; there are 1.6 million pairs of blocks.
    assert measured["megabytes"] < 1000
