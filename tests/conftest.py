"""Settings for every test: few threads, and uninitialised memory that shows itself as NaN.

One thread where pytest-xdist runs a process a core, two otherwise; the kernels' tests have two in any case.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
# More threads than cores: a thread that waits by spinning takes the time of the one it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _nan_in_uninitialised_memory():
    """`torch.empty` is filled with NaN, so that a kernel that forgets a tile cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def wait_for() -> Callable[[Any, str], None]:
    """Wait until a condition holds on a page, whose policy forbids Playwright's own way of asking again and again."""

    def wait(tab: Any, condition: str) -> None:
        for _ in range(100):
            if tab.evaluate(condition):
                return
            tab.wait_for_timeout(100)
        raise AssertionError(f"never came true: {condition}")

    return wait
