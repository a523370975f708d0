"""A LoRA for a size or a plan: a few hundred steps through the sparse backward kernels, on a folder of videos.

    result = sparsereel.tune(pipe, "clips", "lora", frames=2.0, plan="radial", steps=500)
    pipe.load_lora_weights("lora")                    # stock diffusers loads it

This file imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparsereel.inject import PlanLike
    from sparsereel.tune.loop import Settings, TuneResult


def tune(
    pipe: Any,
    folder: str | Path,
    output: str | Path,
    *,
    frames: float | int | None = None,
    height: float | int | None = None,
    width: float | int | None = None,
    method: str = "plain",
    plan: PlanLike | None = None,
    settings: Settings | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TuneResult:
    """Train a LoRA of a Wan pipeline's attention for clips of a size, under a plan; resumes where it was interrupted.

    Every step draws clips, noise levels and noise from its seed and number alone, so that a run that was interrupted
    and one that was not end in the same weights. The pipeline is left as it was.

    Args:
        folder: videos, and what they show: `captions.jsonl` with lines {"file": ..., "caption": ...}, or beside each
            video a text file of the same name.
        output: folder for `pytorch_lora_weights.safetensors`, which `load_lora_weights` takes, and the state to resume.
        frames, height, width, method, plan: as `extend` takes them; with no size the trained one.
        settings: steps, rank, learning rate and the like.
        on_step: called with the number of steps done and the mean loss of late.

    Returns:
        Losses on the held-out clips before and after, and where the weights are.

    Raises:
        ValueError: no videos or captions, clips too short, another family, settings that differ from those of the run
            that is to be resumed.
        ModuleNotFoundError: peft is not installed.
    """
    from sparsereel.tune.loop import Settings, run_tune

    size = {"frames": frames, "height": height, "width": width}
    return run_tune(pipe, Path(folder), Path(output), size, method, plan, settings or Settings(), on_step)
