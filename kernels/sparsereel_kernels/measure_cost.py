"""Measures what calls cost on this machine and fits `cost.Fit` to it. Run by `sparsereel bench cost`, never by a call.

Contenders take turns, so that a machine that slows down slows them all; every figure is the median of its runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, run, sparse_attention, speed_table
from .block_mask import BlockMask
from .cost import Fit, done_density
from .problem import dtype_name

BLOCK = (128, 64)
SDPA = "sdpa"


@dataclass(frozen=True)
class Sample:
    """One measured call; seconds for one head."""

    dtype: str
    head_dim: int
    backend: str
    backward: bool
    tokens: int
    density: float
    done: float  # cost.done_density
    seconds: float


@dataclass(frozen=True)
class Sweep:
    """What to measure."""

    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    head_dims: tuple[int, ...] = (32, 64, 128)
    tokens: tuple[int, ...] = (1024, 4096, 8192)
    heads: int = 4
    backward: bool = False
    repeats: int = 3


def measure(sweep: Sweep) -> Iterator[tuple[Sample, ...]]:
    """Samples of one shape after another, so that a caller can show progress and stop."""
    for dtype in sweep.dtypes:
        for head_dim in sweep.head_dims:
            for tokens in sweep.tokens:
                yield tuple(_shape(sweep, dtype, head_dim, tokens))


def shapes(sweep: Sweep) -> int:
    """How many times `measure` yields."""
    return len(sweep.dtypes) * len(sweep.head_dims) * len(sweep.tokens)


def _shape(sweep: Sweep, dtype: torch.dtype, head_dim: int, tokens: int) -> Iterator[Sample]:
    shape = (1, sweep.heads, tokens, head_dim)
    generator = torch.Generator(sweep.device).manual_seed(tokens + head_dim)
    q, k, v = (
        torch.randn(shape, dtype=dtype, device=sweep.device, generator=generator).requires_grad_(sweep.backward)
        for _ in range(3)
    )
    for mask in _masks(tokens):
        here = None if mask is None else mask.to(torch.device(sweep.device))
        contenders = _contenders(q, k, v, here, sweep)
        for backend, seconds in _race(contenders, sweep.repeats, sweep.device).items():
            density = (1.0, 1.0) if mask is None else (mask.density, done_density(mask, backend))
            kind = (dtype_name(dtype), head_dim, backend, sweep.backward, tokens)
            yield Sample(*kind, *density, seconds / sweep.heads)


def _masks(tokens: int) -> Iterator[BlockMask | None]:
    """Dense; whole blocks at two densities; thin stripes, whose blocks are mostly waste."""
    yield None
    rows, columns = -(-tokens // BLOCK[0]), -(-tokens // BLOCK[1])
    for share in (0.12, 0.4):
        generator = torch.Generator().manual_seed(int(share * 100))
        chosen = torch.rand(rows, columns, generator=generator) < share
        chosen[torch.arange(rows), torch.arange(rows) * columns // rows] = True
        dense = chosen.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[:tokens, :tokens]
        yield BlockMask.from_dense(dense[None, None], BLOCK)
    index = torch.arange(tokens)
    distance = (index[:, None] - index).abs() % 256
    yield BlockMask.from_dense((torch.minimum(distance, 256 - distance) <= 24)[None, None], BLOCK)


def _contenders(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, sweep: Sweep
) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}
    problem = run.problem_of(q, k, v, mask, None, None, run.Wants(backward=sweep.backward))
    for backend in dispatch.BACKENDS:
        # Compiled flex costs half a minute a mask, and reference is the definition, not a contender.
        if backend.name in ("flex", "reference") or not backend.automatic or backend.reasons(problem):
            continue
        call = partial(sparse_attention, q, k, v, mask, backend=backend.name)
        found[backend.name] = _call(call, (q, k, v), sweep.backward)
    if mask is None:
        found[SDPA] = _call(lambda: F.scaled_dot_product_attention(q, k, v), (q, k, v), sweep.backward)
    return found


def _call(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...], backward: bool) -> Callable[[], object]:
    if not backward:
        return torch.inference_mode()(forward)

    def both() -> object:
        return torch.autograd.grad(forward().sum(), leaves)

    return both


def _race(contenders: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for attempt in range(repeats + 1):
        for name, call in contenders.items():
            start = _now(device)
            call()
            if attempt:
                times[name].append(_now(device) - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


# ------------------------------------------------------------------ fits


def fit(samples: list[Sample], device: str) -> list[Fit]:
    """One fit for each dtype, head_dim, backend and direction that has samples."""
    groups: dict[tuple[str, int, str, bool], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.dtype, sample.head_dim, sample.backend, sample.backward), []).append(sample)
    name, threads = speed_table.device_name(device), torch.get_num_threads()
    fits = []
    for (dtype, head_dim, backend, backward), group in groups.items():
        weights = _non_negative(group)
        errors = [abs(_predicted(weights, s) / s.seconds - 1) for s in group]
        kind = (device, name, threads, dtype, head_dim, backend, backward)
        fits.append(Fit(*kind, *weights, error=statistics.median(errors)))
    return fits


def _features(sample: Sample) -> list[float]:
    pairs = float(sample.tokens) ** 2
    waste = max(0.0, sample.density - sample.done)
    return [1.0, float(sample.tokens), pairs * sample.done, pairs * waste]


def _predicted(weights: tuple[float, ...], sample: Sample) -> float:
    return sum(w * x for w, x in zip(weights, _features(sample), strict=True))


def _non_negative(samples: list[Sample]) -> tuple[float, float, float, float]:
    """Least squares of relative errors with weights of 0 and above: negative ones are taken out, one at a time."""
    rows = torch.tensor([_features(s) for s in samples], dtype=torch.float64)
    rows = rows / torch.tensor([s.seconds for s in samples], dtype=torch.float64)[:, None]
    scale = rows.abs().amax(0).clamp_min(1e-300)
    active = [i for i in range(4) if float(rows[:, i].abs().sum()) > 0]
    weights = [0.0] * 4
    while active:
        solution = torch.linalg.lstsq((rows / scale)[:, active], torch.ones(len(samples), 1, dtype=torch.float64))
        values = (solution.solution[:, 0] / scale[active]).tolist()
        if min(values) >= 0:
            for index, value in zip(active, values, strict=True):
                weights[index] = value
            break
        active.pop(values.index(min(values)))
    return (weights[0], weights[1], weights[2], weights[3])


def orders(samples: list[Sample], device: str) -> list[speed_table.Entry]:
    """Entries of the speed table: which backend is fastest where."""
    groups: dict[tuple[object, ...], dict[str, float]] = {}
    for s in samples:
        if s.backend != SDPA:
            key = (s.dtype, s.head_dim, s.tokens, round(s.density, 4), s.backward)
            groups.setdefault(key, {})[s.backend] = s.seconds
    name = speed_table.device_name(device)
    return [
        {
            "device": device,
            "name": name,
            "dtype": dtype,
            "head_dim": head_dim,
            "tokens": tokens,
            "density": density,
            "backward": backward,
            "order": sorted(times, key=lambda backend: times[backend]),
        }
        for (dtype, head_dim, tokens, density, backward), times in groups.items()
    ]
