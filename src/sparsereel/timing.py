"""Dense against sparse on this machine, from one run: what `sparsereel bench attention` and `bench pipeline` print.

Contenders take turns, so that a slow minute hits all alike, and the median counts. Share of ideal = (seconds of dense
SDPA / seconds sparse) x density: 1.00 means that work skipped is time saved. The second share counts only the pairs
that are allowed, so that masks that visit blocks for nothing do not look good.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from sparsereel.generation import DTYPES, Request, environment, generate
from sparsereel.grid import TokenGrid
from sparsereel.inject import PlanLike
from sparsereel.kernel_choice import kernel_for
from sparsereel.patterns import Full, Pattern, Skip
from sparsereel.plan import AttentionPlan
from sparsereel.presets import resolve_plan
from sparsereel.search.candidates import methods_of
from sparsereel.sparse_layer import clock
from sparsereel.token_order import best_mask
from sparsereel_kernels import BlockMask, dispatch, sparse_attention
from sparsereel_kernels.run import Wants, problem_of

#: backends that are the definition or compile for half a minute a mask on a CPU: timed only when they are named
SLOW = ("reference", "flex")


def time_attention(
    plan: PlanLike,
    grid: TokenGrid,
    *,
    heads: int = 4,
    head_dim: int = 64,
    dtype: str = "bf16",
    device: str = "cpu",
    backward: bool = False,
    repeats: int = 5,
    backends: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """Dense SDPA and every backend on the masks of a plan's patterns, q, k, v random.

    Args:
        plan: its patterns are timed, each in all heads; schedules and selectors play no part.
        backward: forward and backward together.
        backends: names; None = all that can run here, but for `SLOW` ones.

    Returns:
        "rows" of pattern, backend, density, token_density, seconds (median), speedup, share_of_ideal and
        share_of_ideal_tokens, and what was timed where.

    Raises:
        ValueError: a plan without patterns, an unknown dtype or backend, a backend that cannot run this.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    patterns = _patterns(resolve_plan(plan))
    shape = (1, heads, grid.seq_len, head_dim)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator).to(device, DTYPES[dtype]) for _ in range(3))
    rows: list[dict[str, Any]] = []
    for pattern in patterns:
        mask = _mask(pattern, grid, device, kernel_for("auto", q.device.type, q.dtype, grid.seq_len, head_dim=head_dim))
        contenders = {"SDPA": _with_gradients(F.scaled_dot_product_attention, (q, k, v), backward)}
        for name in _runnable((q, k, v), mask, backward, backends):
            contenders[name] = _with_gradients(_sparse(mask, name), (q, k, v), backward)
        taken = alternate(contenders, repeats, q)
        dense = statistics.median(taken["SDPA"])
        for name, seconds in taken.items():
            median = statistics.median(seconds)
            density, allowed = (1.0, 1.0) if name == "SDPA" else (mask.density, mask.token_density)
            rows.append(
                {
                    "pattern": str(pattern),
                    "backend": name,
                    "density": density,
                    "token_density": allowed,
                    "seconds": median,
                    "speedup": dense / median,
                    "share_of_ideal": dense / median * density,
                    "share_of_ideal_tokens": dense / median * allowed,
                }
            )
    facts = {"shape": list(shape), "dtype": dtype, "device": device, "backward": backward, "repeats": repeats}
    return {**facts, "environment": environment(), "rows": rows}


def _patterns(plan: AttentionPlan) -> list[Pattern]:
    methods = dict.fromkeys(methods_of(plan))
    found = [method for method in methods if isinstance(method, Pattern) and not isinstance(method, (Full, Skip))]
    if not found:
        raise ValueError("this plan has no pattern to time; selectors depend on q and k, see benchmarks/selection.py")
    return found


def _mask(pattern: Pattern, grid: TokenGrid, device: str, kernel: str) -> BlockMask:
    """The pattern's mask in the order that `sparsify` would put the tokens in."""
    mask = best_mask(pattern.for_head(0, 0), grid, kernel)
    if mask is None:
        raise ValueError(f"{pattern} allows everything on {grid}: there is nothing to skip")
    return mask.to(device)


def _runnable(tensors: Any, mask: BlockMask, backward: bool, wanted: tuple[str, ...] | None) -> list[str]:
    q, k, v = tensors
    problem = problem_of(q, k, v, mask, None, None, Wants(backward=backward))
    if wanted is not None:
        return [dispatch.choose(name, problem, mask).name for name in wanted]
    return [b.name for b in dispatch.BACKENDS if b.name not in SLOW and not b.reasons(problem)]


def _sparse(mask: BlockMask, backend: str) -> Callable[..., torch.Tensor]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sparse_attention(q, k, v, mask, backend=backend)

    return attend


def _with_gradients(attend: Callable[..., torch.Tensor], tensors: Any, backward: bool) -> Callable[[], object]:
    if not backward:
        return torch.no_grad()(lambda: attend(*tensors))
    leaves = [x.detach().requires_grad_() for x in tensors]
    grad = torch.ones_like(tensors[0])
    return lambda: torch.autograd.grad(attend(*leaves), leaves, grad)


def alternate(
    contenders: Mapping[str, Callable[[], object]], repeats: int, like: torch.Tensor
) -> dict[str, list[float]]:
    """Seconds of each contender, taken in turns after one warm-up each; `like` is on the device where they run."""
    for call in contenders.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            start = clock(like)
            call()
            taken[name].append(clock(like) - start)
    return taken


def time_pipeline(
    pipe: Any, request: Request, plan: PlanLike, *, repeats: int = 1, backend: str = "auto"
) -> dict[str, Any]:
    """One request dense and with a plan: seconds, attention share, density, and what Amdahl's law allows.

    Amdahl = 1 / ((1 - a) + a x density), with a the share of the dense clip spent in self-attention. Above it means
    that the kernels beat SDPA's own inner loop. Both kinds run once before they are timed.

    Raises:
        ValueError: what the pipeline or the plan refuses.
    """
    contenders: dict[str, PlanLike | None] = {"dense": None, "sparse": plan}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, used in contenders.items():
            clip = generate(pipe, request, used, backend=backend, profile=True)
            density = 1.0 if clip.report is None or clip.report.density is None else clip.report.density
            row = {"seconds": clip.seconds, "attention_seconds": clip.attention_seconds or 0.0, "density": density}
            if turn:
                runs[name].append(row)
    dense, sparse = ({k: statistics.median(r[k] for r in rows) for k in rows[0]} for rows in runs.values())
    share = dense["attention_seconds"] / dense["seconds"]
    amdahl = 1 / ((1 - share) + share * sparse["density"])
    speedup = dense["seconds"] / sparse["seconds"]
    return {
        "dense": dense,
        "sparse": sparse,
        "attention_share": share,
        "speedup": speedup,
        "amdahl": amdahl,
        "share_of_amdahl": speedup / amdahl,
        "request": vars(request),
        "environment": environment(),
    }
