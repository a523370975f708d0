"""Starts test_triton_numerics.py in Triton's interpreter, in a process of its own: Triton reads TRITON_INTERPRET when
it is first imported, and no other test may see it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(util.find_spec("triton") is None, reason="triton is not installed")

HERE = Path(__file__).parent


def run(*arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def test_numerics_in_the_interpreter():
    passed = run(str(HERE / "test_triton_numerics.py"), "-m", "not slow and not gpu")
    assert passed >= 60
