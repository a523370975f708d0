"""The state of a stage under Muon and AdamW with a moving average, saved and taken up so that a run resumes exactly."""

from __future__ import annotations

from typing import Any

import torch

from sparsereel.minireel.training.checkpoint import copy_numbered, numbered, under_prefix, with_prefix
from sparsereel.minireel.training.optim import MovingAverage, Muon, adamw_state, load_adamw_state


class Resumable:
    """Base of the trainers; a trainer sets the attributes and adds `step`."""

    #: torch.nn.Parameter each; torch's own signatures want lists of parameters here and of tensors there
    parameters: list[Any]
    muon: Muon
    adamw: torch.optim.AdamW
    average: MovingAverage
    generator: torch.Generator
    steps: int
    losses: dict[str, float]

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything a resumed run needs to go on exactly as this one would have."""
        tensors = {
            **with_prefix("weights", numbered(self.parameters)),
            **with_prefix("average", numbered(self.average.values)),
            **with_prefix("muon", self.muon.state()),
            **with_prefix("adamw", adamw_state(self.adamw)),
            "generator": self.generator.get_state(),
        }
        return tensors, {"steps": self.steps, "losses": self.losses}

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        copy_numbered(self.parameters, under_prefix("weights", tensors))
        copy_numbered(self.average.values, under_prefix("average", tensors))
        self.muon.load(under_prefix("muon", tensors))
        load_adamw_state(self.adamw, under_prefix("adamw", tensors))
        self.generator.set_state(tensors["generator"])
        self.steps, self.losses = facts["steps"], dict(facts["losses"])
