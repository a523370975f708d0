"""Train minireel from nothing, or go on where an earlier run stopped.

    python -m sparsereel.minireel.train --output out/minireel                 # every stage
    python -m sparsereel.minireel.train --output out/minireel --stage causal --minutes 30 --start-from FOLDER

Stages, in order: vae, data (render and encode the clips), transformer, causal_small, causal. Each keeps its
state in the output folder and is skipped once done; Ctrl-C stops cleanly, and the same command resumes. What is
trained on what, and for how long, stands in training/recipe.py. `OUTPUT/transformer` is a folder that stock
`WanPipeline` loads, `OUTPUT/causal` holds a transformer for `minireel.load_causal`; both are fresh every few minutes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

STAGES = ("vae", "data", "transformer", "causal_small", "causal")


@dataclass(frozen=True)
class Options:
    """What a training run was asked for.

    Attributes:
        output: Folder for caches, checkpoints and the model.
        minutes: Budget of each trained stage instead of the recipe's.
        steps: Budget in steps instead of minutes.
        clips: Cap on the clips of every set; for trying things out.
        seed: Of everything random in training (sets have their own seeds).
        compiled: Compile the transformer's blocks; needs a C++ compiler.
        start_from: Pipeline folder whose VAE, transformer and text encoder replace those not yet trained here.
    """

    output: Path
    minutes: float | None = None
    steps: int | None = None
    clips: int | None = None
    seed: int = 0
    compiled: bool = False
    start_from: Path | None = None


def main(arguments: list[str] | None = None) -> int:
    """Run the stages asked for; returns the exit code (0 done, 2 wrong use, 130 interrupted)."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsereel.minireel.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("out/minireel"), help="where everything goes")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--minutes", type=float, help="budget of each trained stage (default: the recipe's)")
    parser.add_argument("--steps", type=int, help="budget in steps instead")
    parser.add_argument("--clips", type=int, help="at most so many clips a set, to try things out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--start-from", type=Path, help="pipeline folder to fine-tune instead of starting from nothing")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=shutil.which("g++") is not None,
        help="compile the blocks: five times faster, needs a C++ compiler",
    )
    given = parser.parse_args(arguments)
    from sparsereel.minireel.training import loop

    if given.threads:
        torch.set_num_threads(given.threads)
    options = Options(
        given.output, given.minutes, given.steps, given.clips, given.seed, given.compile, given.start_from
    )
    stages = STAGES if given.stage == "all" else (given.stage,)
    return loop.exit_code(lambda: run(options, stages))


def run(options: Options, stages: tuple[str, ...] = STAGES) -> bool:
    """Run these stages in order; False when one was interrupted.

    Raises:
        ValueError: a stage needs what an earlier one has not made, or an option is out of range.
    """
    from sparsereel.minireel.training import stages as run_stage

    if options.minutes is not None and options.steps is not None:
        raise ValueError("Give --minutes or --steps, not both.")
    return all(getattr(run_stage, name)(options) for name in stages)


if __name__ == "__main__":
    sys.exit(main())
