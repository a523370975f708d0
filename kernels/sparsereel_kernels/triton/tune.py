"""Measures which tiles are fastest on this GPU and stores them where launches look: configs.user_file().

    python -m sparsereel_kernels.triton.tune --head-dim 128 --tokens 32768 --density 0.2

What was found holds for this GPU, this size of numbers, this padded head dim and this mask block, at any length. A
candidate counts only if its results agree with those of the shipped configuration. Nothing is measured inside a call.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor
from triton.errors import TritonError
from triton.testing import do_bench

from ..testing import random_block_mask
from . import configs, launch, target_of

# Share of the largest value that two configurations' results may differ by: a few roundings to bf16.
AGREEMENT = 0.03
TILES = (32, 64, 128)
WARPS = (4, 8)
STAGES = (1, 2, 3, 4)
PREFIX = {"forward": "forward", "queries": "query_gradient", "keys": "key_gradient"}
logger = logging.getLogger("sparsereel_kernels")


def candidates(architecture: str, block: tuple[int, int]) -> Iterator[configs.Config]:
    """Configurations worth a try for a mask block, without repeats."""
    seen = set()
    with_tma = (True, False) if architecture in configs.WITH_TMA else (False,)
    for tile_m, tile_n, warps, stages, tma in product(TILES, TILES, WARPS, STAGES, with_tma):
        config = configs.fitted(configs.Config(tile_m, tile_n, warps, stages, tma), block)
        if config not in seen:
            seen.add(config)
            yield config


def _milliseconds(made: launch.Launch) -> float:
    return float(do_bench(made.run, warmup=10, rep=40))


def tune(
    *,
    tokens: int = 32768,
    heads: int = 8,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    block: tuple[int, int] = (128, 64),
    density: float = 0.2,
    kernels: Sequence[str] = configs.KERNELS,
    device: torch.device | str = "cuda",
    measure: Callable[[launch.Launch], float] = _milliseconds,
    tried: Callable[[str, tuple[int, int]], Iterator[configs.Config]] = candidates,
) -> dict[str, configs.Config]:
    """Time every candidate of every kernel on a random mask and store the fastest.

    Args:
        tokens, heads, head_dim, dtype: of q, k and v.
        block: the mask's (query, key) block in tokens.
        density: share of key blocks visited.
        kernels: which of "forward", "queries" (gradient of q) and "keys" (gradients of k and v).
        device: where to measure.
        measure: time of one launch; any unit.
        tried: (architecture, block) -> the candidates; default `candidates`.

    Returns:
        The fastest configuration by kernel. They are stored, and taken from the next call on.

    Raises:
        ValueError: a kernel that does not exist.
    """
    unknown = [kernel for kernel in kernels if kernel not in configs.KERNELS]
    if unknown:
        raise ValueError(f"kernels must be among {', '.join(configs.KERNELS)}, got {', '.join(unknown)}")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, head_dim, generator=generator).to(device, dtype) for _ in range(3))
    mask = random_block_mask(tokens, block=block, density=density, device=device)
    call = launch.Call(q, k, v, mask, head_dim**-0.5, None, None, target_of(q.device))
    found = {}
    for kernel in kernels:
        options = tried(call.target.architecture, call.block)
        found[kernel] = _fastest(call, kernel, list(options), measure)
    bits = q.element_size() * 8
    key = {kernel: configs.tuned_key(call.target.device, kernel, bits, call.width, call.block) for kernel in found}
    configs.save({key[kernel]: config for kernel, config in found.items()})
    return found


def _fastest(
    call: launch.Call, kernel: str, options: list[configs.Config], measure: Callable[[launch.Launch], float]
) -> configs.Config:
    """The fastest of `options` and the configuration in use; those that do not fit or disagree are passed over."""
    results, prepared = _prepare(call)
    in_use = call.config(kernel)
    best, best_time, expected = in_use, float("inf"), None
    for config in [in_use, *(option for option in options if option != in_use)]:
        made = _launch(replace(call, pinned={kernel: config}), kernel, results, prepared)
        try:
            made.run()
            values = [x.clone() for x in _written(kernel, results, prepared)]
            seconds = measure(made)
        except TritonError as error:
            logger.info("%s: %s is left out: %s", kernel, config, error)
            continue
        expected = expected or values
        if not all(_agree(a, b) for a, b in zip(values, expected, strict=True)):
            logger.warning("%s: %s is left out: its results differ from those of %s", kernel, config, in_use)
        elif seconds < best_time:
            best, best_time = config, seconds
    return best


Results = tuple[Tensor, Tensor]
Prepared = tuple[launch.Given, launch.Gradients]


def _prepare(call: launch.Call) -> tuple[Results, Prepared]:
    """Room for results, and what backward starts from."""
    out, lse = launch.forward(call)
    grad_out = torch.randn_like(out)
    given = launch.Given(grad_out, None, out, lse, torch.empty_like(lse))
    found = launch.Gradients(torch.empty_like(call.q), torch.empty_like(call.k), torch.empty_like(call.v), None)
    next(iter(launch.backward_launches(call, given, found))).run()
    return (torch.empty_like(out), torch.empty_like(lse)), (given, found)


def _launch(call: launch.Call, kernel: str, results: Results, prepared: Prepared) -> launch.Launch:
    made = launch.forward_launches(call, *results) if kernel == "forward" else launch.backward_launches(call, *prepared)
    return next(x for x in made if x.kernel.__name__.startswith(PREFIX[kernel]))


def _written(kernel: str, results: Results, prepared: Prepared) -> tuple[Tensor, ...]:
    found = prepared[1]
    return {"forward": results, "queries": (found.dq,), "keys": (found.dk, found.dv)}[kernel]


def _agree(a: Tensor, b: Tensor) -> bool:
    finite = b.isfinite()
    difference = (a.float() - b.float())[finite].abs().max()
    return bool(torch.equal(a.isfinite(), finite) and difference <= AGREEMENT * b[finite].abs().max())


def main(given: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--block", type=int, nargs=2, default=(128, 64), metavar=("QUERY", "KEY"))
    parser.add_argument("--density", type=float, default=0.2)
    arguments = parser.parse_args(given)
    if not torch.cuda.is_available():
        print("tuning needs a CUDA device; none is present", file=sys.stderr)
        return 4
    found = tune(
        tokens=arguments.tokens,
        heads=arguments.heads,
        head_dim=arguments.head_dim,
        dtype=getattr(torch, arguments.dtype),
        block=tuple(arguments.block),
        density=arguments.density,
    )
    for kernel, config in found.items():
        print(f"{kernel:8} {config}")
    print(f"stored in {configs.user_file()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
