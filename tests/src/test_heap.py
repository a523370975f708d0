"""The heap is told to keep memory, unless the environment or the system decides."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sparsereel.heap import VARIABLES

# Mapped blocks go back to the system when freed, what lies in the heap stays.
CODE = """
import mmap, sys
from pathlib import Path
from sparsereel.heap import keep_freed_memory
import numpy as np
told = keep_freed_memory()
np.ones(64 << 20, np.uint8)
resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
print(told, resident >> 20)
"""


def run(**variables: str) -> tuple[str, int]:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    told, resident = done.stdout.split()
    return told, int(resident)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise():
    told, kept = run()
    if told == "False":
        pytest.skip("not glibc")
    left_alone, given_back = run(MALLOC_MMAP_THRESHOLD_="131072")
    assert left_alone == "False"
    assert kept - given_back > 48
