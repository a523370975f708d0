"""The loop both stages share: progress, budget, checkpoints, and a clean stop on Ctrl-C."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sparsereel.minireel.training import checkpoint

CHECKPOINT_SECONDS = 180


class Trainer(Protocol):
    """What the loop drives; `state` and `load` must make a resumed run equal to an uninterrupted one."""

    steps: int
    losses: dict[str, float]

    def step(self, progress: float) -> None: ...
    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]: ...
    def load(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None: ...


def run(
    trainer: Trainer,
    name: str,
    path: Path,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    on_checkpoint: Callable[[], None] = lambda: None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> bool:
    """Train until the budget is used, resuming from `path` if it exists.

    Args:
        trainer: Fresh; its state is replaced by the checkpoint's if there is one.
        name: Shown beside the progress bar.
        path: Checkpoint file, written every `checkpoint_seconds`, at the end and on Ctrl-C.
        minutes: Budget of training time, over all resumed runs together.
        steps: Budget of steps instead; then progress, and so the learning rate, does not depend on the clock.
        on_checkpoint: Called after each checkpoint.

    Returns:
        True when the budget is used, False when interrupted.

    Raises:
        ValueError: not exactly one of minutes and steps is given, or it is not positive.
    """
    budget = minutes if steps is None else steps
    if (minutes is None) == (steps is None) or budget is None or budget <= 0:
        raise ValueError(f"Give either minutes or steps, above 0; got minutes={minutes}, steps={steps}.")
    spent = 0.0
    if path.exists():
        tensors, facts = checkpoint.load(path)
        trainer.load(tensors, facts)
        spent = facts["seconds"]
        if facts["done"]:
            return True
    clock = _Clock(spent)

    def progress() -> float:
        return trainer.steps / steps if steps is not None else clock.seconds() / (60 * budget)

    def save() -> None:
        tensors, facts = trainer.state()
        checkpoint.save(path, tensors, facts | {"seconds": clock.seconds(), "done": progress() >= 1})
        on_checkpoint()

    try:
        _train(trainer, name, progress, save, checkpoint_seconds)
    except KeyboardInterrupt:
        save()
        return False
    save()
    return True


def _train(
    trainer: Trainer, name: str, progress: Callable[[], float], save: Callable[[], None], checkpoint_seconds: float
) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[losses]}")
    saved = time.monotonic()
    with Progress(*columns) as bar:
        task = bar.add_task(name, total=1.0, losses="")
        while (done := progress()) < 1:
            trainer.step(done)
            losses = "  ".join(f"{key} {value:.4f}" for key, value in sorted(trainer.losses.items()))
            bar.update(task, completed=done, losses=f"step {trainer.steps}  {losses}")
            if time.monotonic() - saved > checkpoint_seconds:
                save()
                saved = time.monotonic()
        bar.update(task, completed=1.0)


class _Clock:
    """Seconds of training, those before the last interruption included."""

    def __init__(self, spent: float):
        self.start = time.monotonic() - spent

    def seconds(self) -> float:
        return time.monotonic() - self.start


def exit_code(run: Callable[[], bool]) -> int:
    """Run stages for a command: 0 done, 2 wrong use (one sentence on stderr), 130 interrupted."""
    try:
        finished = run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not finished:
        print("Stopped and saved. The same command goes on from here.")
        return 130
    return 0
