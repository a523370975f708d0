"""The offline search: the best pattern for every head of a model, as a plan.

    result = sparsereel.search(pipe, prompts, target_psnr=30)
    result.save("plan.yaml")

In the manner of Sparse-vDiT (arXiv 2506.03065): record what each candidate would do to each head (record.py), weigh
layers and steps by what reaches the output (reach.py), price the candidates (costs.py), choose under one pressure
for all heads (solve.py), write the plan (emit.py) and measure it on prompts that were not recorded (verify.py).

This file imports nothing heavy, so that `import sparsereel` stays light.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsereel.inject import PlanLike
    from sparsereel.patterns.base import Pattern
    from sparsereel.search.result import SearchResult
    from sparsereel.selectors.base import Selector


def search(
    pipe: Any,
    prompts: Sequence[str],
    *,
    target_psnr: float | None = None,
    target_speedup: float | None = None,
    budget: float | None = None,
    candidates: Sequence[str | Pattern | Selector] | None = None,
    refine: PlanLike | None = None,
    steps: int | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    held_out: int = 2,
    buckets: int = 3,
    dense_first: float = 0.1,
    backend: str = "auto",
    folder: str | Path | None = None,
    progress: bool = True,
) -> SearchResult:
    """Find the best pattern for every head of every layer in each stretch of steps, and measure the plan.

    Args:
        pipe: a diffusers pipeline with a model of a known family, as it is or after `extend`: then the plan is for the
            longer or larger clip, and calls are of its size where none is given.
        prompts: what to calibrate on; the last `held_out` of them are only used to measure the plan. Prompt number n
            is generated with seed `seed + n`.
        target_psnr: dB against the dense clip; the fastest plan that keeps it.
        target_speedup: seconds of a dense clip over seconds of a sparse one; the plan with the least error that
            reaches it.
        budget: share of the dense key blocks that may be visited, mean over layers, heads and all steps, dense first
            steps included; the plan with the least error within it.
        candidates: names of methods ("radial", "block_topk"), whose default grid of arguments is tried, or patterns
            and selectors. None = all default candidates. `full` is always among them.
        refine: a plan whose patterns and selectors are the candidates instead.
        steps, frames, height, width, guidance: of the calls to search for; None = the pipeline's own defaults.
        held_out: prompts to measure on; 0 = do not measure.
        buckets: stretches of steps, each with choices of its own. More follows the steps closer and records longer.
        dense_first: share of the steps at the start that stay dense.
        backend: kernel to run on, as for `sparsify`.
        folder: where to keep what was recorded, so that an interrupted search goes on there; None = nowhere.
        progress: show a bar with the time left.

    Returns:
        The plan, the front of all trade-offs, and what was measured.

    Raises:
        ValueError: not exactly one of target_psnr, target_speedup and budget; a value out of range; too few prompts;
            a model or pipeline that is not understood; one that `extend` changed in more than rotary frequencies.
    """
    from sparsereel.search.drive import run_search
    from sparsereel.search.settings import Settings, Target

    settings = Settings.of(
        prompts,
        Target.of(target_psnr, target_speedup, budget),
        steps=steps,
        frames=frames,
        height=height,
        width=width,
        guidance=guidance,
        seed=seed,
        held_out=held_out,
        buckets=buckets,
        dense_first=dense_first,
        backend=backend,
    )
    return run_search(pipe, settings, candidates, refine, None if folder is None else Path(folder), show=progress)
