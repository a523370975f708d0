"""What both stages share: parameters under Muon and AdamW, their moving average, and a state that resumes exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from sparsereel.minireel.training.optim import MovingAverage, Muon, warm_up_and_decay
from sparsereel.minireel.training.resumable import Resumable


class MuonTrainer(Resumable):
    """Base of the stages' trainers; a stage adds `step`.

    Args:
        parameters: Everything that is trained.
        matrices: Those of them that Muon moves; AdamW moves the rest.
        rates: Learning rates of Muon and AdamW.
        hold: Share of the stage at full rate; then it falls linearly.
        decay: Of the moving average, a step.
        betas: Of AdamW.
        weight_decay: Of Muon.
        seed: Of the stage's generator.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        matrices: Iterable[torch.nn.Parameter],
        rates: tuple[float, float],
        *,
        hold: float,
        decay: float,
        betas: tuple[float, float],
        weight_decay: float,
        seed: int,
    ):
        self.parameters, matrices = list(parameters), list(matrices)
        self.rates, self.hold = rates, hold
        self.muon = Muon(matrices, weight_decay=weight_decay)
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.parameters if id(p) not in chosen]
        self.adamw = torch.optim.AdamW(rest, lr=rates[1], betas=betas, weight_decay=0.0)
        self.average = MovingAverage(self.parameters, decay)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0
        self.losses: dict[str, float] = {}

    def update(self, loss: torch.Tensor, progress: float) -> None:
        """One step of both optimizers down `loss`; a gradient that is not finite is passed over."""
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if torch.isfinite(norm):
            factor = warm_up_and_decay(self.steps, progress, self.hold)
            for group in self.adamw.param_groups:
                group["lr"] = self.rates[1] * factor
            self.adamw.step()
            self.muon.step(self.rates[0] * factor)
            self.average.update(self.steps + 1)
        self.steps += 1

    def note(self, name: str, value: float) -> None:
        """Follow a loss by a moving average, for the progress bar."""
        self.losses[name] = 0.98 * self.losses.get(name, value) + 0.02 * value

    @contextmanager
    def use_result(self) -> Iterator[None]:
        """While entered, the models hold what the stage ships: the moving average of their weights."""
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()
