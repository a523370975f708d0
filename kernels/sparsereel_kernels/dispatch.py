"""Which backend runs a call, and why the others do not.

What a backend can do is a contract (its `unsupported_reasons`); which one is preferred is policy, so it is data here;
which one is fastest on this machine is a measurement, so it is a stored table (speed_table.py). Nothing is timed
inside a call: the same call on the same machine takes the same road.
"""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from . import cost, speed_table
from .errors import BackendUnavailable

if TYPE_CHECKING:
    from .block_mask import BlockMask
    from .problem import Problem

logger = logging.getLogger("sparsereel_kernels")


NO_GRADIENTS = "gradients are not supported"


@dataclass(frozen=True)
class Backend:
    """One way to compute: a module with unsupported_reasons, forward and backward.

    `automatic`: device types where "auto" may choose it, or ANY.
    """

    name: str
    module: str
    automatic: tuple[str, ...]

    def load(self) -> ModuleType:
        """The module, imported on first use.

        Raises:
            ImportError: it cannot be imported, or is not part of this version.
        """
        module = importlib.import_module(self.module)
        if not hasattr(module, "forward"):
            raise ImportError(f"{self.module} is not part of this version")
        return module

    def reasons(self, problem: Problem) -> list[str]:
        """Why this backend cannot run `problem`; empty where it can."""
        try:
            module = self.load()
        except ImportError as error:
            return [str(error)]
        reasons = list(module.unsupported_reasons(problem))
        if problem.needs_backward and not hasattr(module, "backward"):
            reasons.append(NO_GRADIENTS)
        return reasons


ANY = ("*",)

# The order is the preference of "auto" where no table says otherwise.
# flex on a CPU compiles for half a minute a mask and has no gradients there, so it runs only when it is named.
BACKENDS = (
    Backend("triton", "sparsereel_kernels.triton", automatic=("cuda",)),
    Backend("cpu", "sparsereel_kernels.cpu", automatic=("cpu",)),
    Backend("flex", "sparsereel_kernels.flex", automatic=("cuda",)),
    Backend("torch", "sparsereel_kernels.torch_blocks", automatic=ANY),
    # Rounds: only by name.
    Backend("triton_int8", "sparsereel_kernels.triton_int8", automatic=()),
    Backend("reference", "sparsereel_kernels.reference", automatic=()),
)
BY_NAME = {backend.name: backend for backend in BACKENDS}


def backend_named(name: str) -> Backend:
    """The entry of BACKENDS called `name`; ValueError listing the names if there is none."""
    if name not in BY_NAME:
        raise ValueError(f"backend must be one of auto, {', '.join(BY_NAME)}, got {name!r}")
    return BY_NAME[name]


def choose(name: str, problem: Problem, mask: BlockMask | None) -> Backend:
    """The backend that runs `problem`: the named one, the one that SPARSEREEL_BACKEND pins, or for "auto" the best.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailable: it (or, for "auto", every backend) cannot run; the text lists the reasons.
    """
    if name == "auto":
        name = os.environ.get("SPARSEREEL_BACKEND") or "auto"
    if name != "auto":
        return _named(name, problem)
    return _automatic(problem, speed_table.density_step(mask))


def explain(problem: Problem) -> dict[str, list[str]]:
    """For every backend, why it cannot run `problem`; an empty list where it can."""
    return {backend.name: backend.reasons(problem) for backend in BACKENDS}


def forget() -> None:
    """Drop remembered choices and tables: after a backend was built, or the stored table changed."""
    _named.cache_clear()
    _automatic.cache_clear()
    _log_once.cache_clear()
    speed_table.load.cache_clear()
    cost.load.cache_clear()


@lru_cache(maxsize=4096)
def _named(name: str, problem: Problem) -> Backend:
    backend = backend_named(name)
    reasons = backend.reasons(problem)
    if reasons:
        opening = f"Backend {name!r} cannot run sparse_attention for"
        hint = 'Use backend="auto" to let another one run.'
        raise BackendUnavailable(_refusal(opening, problem, {name: reasons}, hint))
    return backend


@lru_cache(maxsize=4096)
def _automatic(problem: Problem, density: float) -> Backend:
    refused: dict[str, list[str]] = {}
    for backend in _preference(problem, density):
        reasons = backend.reasons(problem)
        if not reasons:
            _announce(backend.name, problem, refused)
            return backend
        refused[backend.name] = reasons
    hint = 'Use backend="reference" for a slow exact result.'
    raise BackendUnavailable(_refusal("No backend can run sparse_attention for", problem, refused, hint))


def _preference(problem: Problem, density: float) -> list[Backend]:
    """Backends that "auto" may take, best first: the stored table's order, then the order of BACKENDS."""
    allowed = [b for b in BACKENDS if b.automatic == ANY or problem.device_type in b.automatic]
    fastest = speed_table.order(problem, density)
    known = [BY_NAME[name] for name in fastest if name in BY_NAME and BY_NAME[name] in allowed]
    return known + [backend for backend in allowed if backend not in known]


def _refusal(opening: str, problem: Problem, refused: dict[str, list[str]], hint: str) -> str:
    width = max(map(len, refused), default=0)
    lines = [opening, problem.describe()]
    lines += [f"{name:{width}} : {'; '.join(reasons)}" for name, reasons in refused.items()]
    return "\n".join([*lines, hint])


def _announce(chosen: str, problem: Problem, refused: dict[str, list[str]]) -> None:
    passed_over = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refused.items())
    level = logging.WARNING if _kernels_missing(problem, refused.get("cpu", [])) else logging.INFO
    _log_once(level, chosen, problem.device_type, passed_over)


def _kernels_missing(problem: Problem, reasons: list[str]) -> bool:
    """Whether `reasons` mean that the native CPU kernels could not be built: a notice, where the rest is detail."""
    usual = problem.device_type == "cpu" and problem.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return usual and any(reason != NO_GRADIENTS for reason in reasons)


@lru_cache(maxsize=256)
def _log_once(level: int, chosen: str, device_type: str, passed_over: str) -> None:
    because = f" (passed over: {passed_over})" if passed_over else ""
    logger.log(level, "sparse attention on %s uses backend %s%s", device_type, chosen, because)
