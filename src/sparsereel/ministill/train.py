"""Train ministill from nothing, or go on where an earlier run stopped.

    python -m sparsereel.ministill.train --output out/ministill --threads 1

Stages, in order: vae, data (render and encode the pictures), unet. Each keeps its state in the output folder and is
skipped once done; Ctrl-C stops cleanly, and the same command resumes. What is trained on what, and for how long,
stands in training/recipe.py. `OUTPUT/pipeline` is a folder that stock `StableDiffusionPipeline` loads, fresh every few
minutes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

STAGES = ("vae", "data", "unet")


@dataclass(frozen=True)
class Options:
    """What a training run was asked for.

    Attributes:
        output: Folder for caches, checkpoints and the model.
        steps: Budget of each trained stage instead of the recipe's.
        minutes: Budget in minutes instead of steps.
        pictures: Cap on the pictures of every set; for trying things out.
        seed: Of everything random in training (sets have their own seeds).
    """

    output: Path
    steps: int | None = None
    minutes: float | None = None
    pictures: int | None = None
    seed: int = 0


def main(arguments: list[str] | None = None) -> int:
    """Run the stages asked for; returns the exit code (0 done, 2 wrong use, 130 interrupted)."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsereel.ministill.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("out/ministill"), help="where everything goes")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--steps", type=int, help="budget of each trained stage (default: the recipe's)")
    parser.add_argument("--minutes", type=float, help="budget in minutes instead")
    parser.add_argument("--pictures", type=int, help="at most so many pictures a set, to try things out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    given = parser.parse_args(arguments)
    from sparsereel.minireel.training import loop

    if given.threads:
        torch.set_num_threads(given.threads)
    options = Options(given.output, given.steps, given.minutes, given.pictures, given.seed)
    stages = STAGES if given.stage == "all" else (given.stage,)
    return loop.exit_code(lambda: run(options, stages))


def run(options: Options, stages: tuple[str, ...] = STAGES) -> bool:
    """Run these stages in order; False when one was interrupted.

    Raises:
        ValueError: a stage needs what an earlier one has not made, or an option is out of range.
    """
    from sparsereel.ministill.training import stages as run_stage

    if options.minutes is not None and options.steps is not None:
        raise ValueError("Give --minutes or --steps, not both.")
    return all(getattr(run_stage, name)(options) for name in stages)


if __name__ == "__main__":
    sys.exit(main())
