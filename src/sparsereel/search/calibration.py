"""What a searched plan carries along: where it is for, what was tried, what every head's choice does and costs."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsereel.generation import environment
from sparsereel.search.costs import Costs, Item, errors_of
from sparsereel.search.errors import SHARES
from sparsereel.search.record import Recording, Study

#: the measured figure that a target is about
MEASURE = {"budget": "density", "target_psnr": "psnr", "target_speedup": "speedup"}
#: significant digits of numbers in plan files
DIGITS = 5


def of(study: Study, recording: Recording, items: list[Item], choice: np.ndarray, costs: Costs) -> dict[str, Any]:
    """Plain data; "geometry" and "steps" are what `transfer.watch` compares with."""
    settings, facts = study.settings, study.facts
    size = {"frames": settings.frames, "height": settings.height, "width": settings.width}
    return {
        "geometry": facts.geometry(),
        "steps": facts.steps,
        "size": {name: value for name, value in size.items() if value is not None},
        **({"extended": facts.extended} if facts.extended else {}),
        "model": facts.fingerprint,
        "dtype": str(facts.dtype).removeprefix("torch."),
        "prompts": [settings.prompts[i] for i in settings.calibrating],
        "held_out": [settings.prompts[i] for i in settings.measuring],
        "seed": settings.seed,
        "candidates": [str(method) for method in study.candidates],
        "tile": None if costs.tile is None else list(costs.tile),
        "study": study.identity(),
        "heads": _heads(study, recording, items, choice, costs),
        "environment": environment(),
    }


def _heads(
    study: Study, recording: Recording, items: list[Item], choice: np.ndarray, costs: Costs
) -> dict[str, dict[str, Any]]:
    """For each layer, one number a head: mean over the stretches of steps."""
    rows = np.arange(len(items))
    errors, shares = errors_of(recording)[rows, choice], costs.share[rows, choice]
    found: dict[str, dict[str, Any]] = {}
    for component, layer in sorted({(item.component, item.layer) for item in items}):
        heads = study.facts.layers[component, layer].heads
        mine = [n for n, item in enumerate(items) if (item.component, item.layer) == (component, layer)]
        error, cost = ([_mean(values, items, mine, h) for h in range(heads)] for values in (errors, shares))
        places = _places(recording, component, layer)
        entry = {"error": error, "cost": cost, **places}
        found.setdefault(component, {})[str(layer)] = entry
    return found


def _mean(values: np.ndarray, items: list[Item], mine: list[int], head: int) -> float:
    return float(np.mean([values[n] for n in mine if items[n].head == head]))


def _places(recording: Recording, component: str, layer: int) -> dict[str, list[float]]:
    """Entropy of each head and its attention mass by place, over all stretches."""
    parts = [sums for (c, number, _), sums in recording.sums.items() if (c, number) == (component, layer)]
    queries = sum(float(part.queries) for part in parts)
    total = sum((part.shares for part in parts[1:]), parts[0].shares) / max(queries, 1.0)
    entropy = sum((part.entropy for part in parts[1:]), parts[0].entropy) / max(queries, 1.0)
    return {"entropy": entropy.tolist(), **{name: total[:, column].tolist() for column, name in enumerate(SHARES)}}


def tidy(value: Any) -> Any:
    """The same data with floats of DIGITS significant digits, so that plan files stay readable."""
    if isinstance(value, dict):
        return {key: tidy(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(entry) for entry in value]
    if isinstance(value, str):
        # torch's version is text of a class of its own, which YAML does not know.
        return str(value)
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
