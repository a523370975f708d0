"""Longer and larger clips than a model was trained for, without training.

    sparsereel.extend(pipe, frames=2.0)                   # twice the trained length
    video = pipe("a cat surfing", num_frames=165)         # the call stays yours; the report names the size
    sparsereel.restore(pipe)

Two knobs: the rotary frequencies that place tokens (rope.py) and the logits of tokens far apart (ultravico.py);
recipes.py says which method turns which. This file imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsereel.extend.recipes import Recipe
    from sparsereel.inject import PlanLike
    from sparsereel.report import Report


def extend(
    pipe: Any,
    *,
    frames: float | int | None = None,
    height: float | int | None = None,
    width: float | int | None = None,
    method: str | Recipe = "auto",
    plan: PlanLike | None = None,
) -> Report:
    """Make a pipeline's model fit for clips longer or larger than it was trained on; nothing is trained.

    The pipeline is called as before, with the wanted size (`Report.arguments` of the result). Calls of another size run
    as if `extend` had not been called. A second call replaces the first; `restore` undoes it, bit for bit.

    Args:
        pipe: a diffusers pipeline with a model of a family that can be extended (wan, hunyuan_video, stable_diffusion).
        frames: how long. A float is a ratio of the trained length in latent frames (2.0 turns Wan's 81 frames, 21
            latent ones, into 165); an int is a number of frames. None leaves the length to the call.
        height, width: likewise in pixels; a ratio is rounded to the nearest size that the pipeline takes.
        method: "auto" (by family and ratio), another name of `sparsereel.extend.recipes.METHODS` such as "plain",
            "riflex", "pi_time" or "ultravico", several joined by "+", or a `sparsereel.extend.recipes.Recipe`.
        plan: also make the attention sparse, as `sparsify` does. None keeps the plan in place, if there is one.

    Returns:
        The report of `sparsify`, with the size, the method, and the arguments to call the pipeline with.

    Raises:
        ValueError: a size, method or family that cannot work, or a plan that does not go with the method; the text says
            what is allowed.
    """
    from sparsereel.extend.drive import run_extend

    return run_extend(pipe, frames, height, width, method, plan)
