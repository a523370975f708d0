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
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


BASIC = "lengths_and_blocks or head_dims or groups or modifiers"


# The interpreter runs on one thread: on a busy machine this takes minutes.
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("chosen", "at_least"), [(BASIC, 35), (f"not ({BASIC})", 25)], ids=["basic", "others"])
def test_numerics_in_the_interpreter(chosen, at_least):
    arguments = ("-m", "not slow and not gpu", "-k", chosen)
    assert run(str(HERE / "test_triton_numerics.py"), *arguments) >= at_least


@pytest.mark.timeout(1200)
def test_int8_in_the_interpreter():
    assert run(str(HERE / "test_triton_int8.py"), "-m", "not slow and not gpu", "-k", "device or int8") >= 15
