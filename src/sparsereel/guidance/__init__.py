"""Guidance by perturbed attention heads: SoftPAG, a guider, and the search for the heads (arXiv 2506.10978).

    heads = HeadPerturbation({1: (1, 5), 3: (2,)}, strength=0.8)
    with guided(pipe, heads, scale=2.0, stop=0.5):      # any pipeline with a model of a known family
        video = pipe("a cat surfing").frames[0]

    pipe.update_components(guider=HeadPerturbationGuidance(heads={1: [1, 5]}))       # diffusers' modular pipelines
    found = hunt_heads(pipe, prompts, objective)                                     # which heads to perturb

A weak prediction is made with some heads looking at themselves more than they would, and the result moves away from
it. Names that need diffusers' guiders are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsereel.guidance.perturbation import HeadPerturbation, perturbed

if TYPE_CHECKING:
    from sparsereel.guidance.guider import HeadPerturbationGuidance
    from sparsereel.guidance.hunt import Hunt, hunt_heads
    from sparsereel.guidance.pipelines import guided

__all__ = ["HeadPerturbation", "HeadPerturbationGuidance", "Hunt", "guided", "hunt_heads", "perturbed"]

_HOMES = {"HeadPerturbationGuidance": "guider", "guided": "pipelines", "hunt_heads": "hunt", "Hunt": "hunt"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"sparsereel.guidance.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sparsereel.guidance' has no attribute {name!r}")
