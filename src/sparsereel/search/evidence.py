"""What a search saw and tried, as plain data for its report: heads, choices, alternatives, measurements."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparsereel.media import Frames
from sparsereel.patterns import Full
from sparsereel.plan import AttentionPlan
from sparsereel.plan_entries import Method
from sparsereel.search.candidates import kept_sinks
from sparsereel.search.costs import Costs, Item, errors_of
from sparsereel.search.emit import resolved
from sparsereel.search.errors import CELLS, SHARES, Sums
from sparsereel.search.record import Recording, Study

if TYPE_CHECKING:
    from sparsereel.search.result import FrontPoint

#: pictures of more heads than this are halved in both directions, so that the page stays small
MANY_HEADS = 256


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a report shows besides the result.

    Attributes:
        data: plain data: the table of heads, names of methods, alternatives, rounds.
        clips: (prompt, seed, dense frames, frames of the plan) of held-out prompts.
    """

    data: dict[str, Any]
    clips: Sequence[tuple[str, int, Frames, Frames]] = field(default=())


def heads_of(study: Study, recording: Recording, items: list[Item], choice: np.ndarray, costs: Costs) -> dict[str, Any]:
    """Every (layer, head): what it does in each stretch, what that costs and loses, where it looks."""
    rows = np.arange(len(items))
    errors, shares, densities = (
        errors_of(recording)[rows, choice],
        costs.share[rows, choice],
        costs.density[rows, choice],
    )
    layers: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for number, item in enumerate(items):
        heads = layers.setdefault((item.component, item.layer), [])
        if item.head == len(heads):
            heads.append({"choice": [], "error": [], "cost": [], "density": []})
        entry = heads[item.head]
        entry["choice"].append(int(choice[number]))
        for name, values in (("error", errors), ("cost", shares), ("density", densities)):
            entry[name].append(float(values[number]))
    cells = CELLS // 2 if sum(map(len, layers.values())) > MANY_HEADS else CELLS
    for key, heads in layers.items():
        seen = [sums for (*place, _), sums in sorted(recording.sums.items()) if tuple(place) == key]
        for head, entry in enumerate(heads):
            entry |= _looks(seen, head, cells)
    facts = study.facts.layers
    return {
        "cells": cells,
        "stretches": [bucket.stretch.text for bucket in study.buckets],
        "methods": [str(method) for method in study.candidates],
        "layers": [
            {"component": component, "number": layer, "name": facts[component, layer].name, "heads": heads}
            for (component, layer), heads in layers.items()
        ],
    }


def _looks(seen: list[Sums], head: int, cells: int) -> dict[str, Any]:
    queries = max(1.0, sum(float(sums.queries) for sums in seen))
    shares = torch.stack([sums.shares[head] for sums in seen]).sum(0) / queries
    entropy = sum(float(sums.entropy[head]) for sums in seen) / queries
    places = {name: float(shares[n]) for n, name in enumerate(SHARES)}
    mass = torch.stack([sums.picture[head] for sums in seen]).sum(0)
    return {"entropy": entropy, **places, "picture": picture(mass, cells)}


def picture(sums: torch.Tensor, cells: int) -> str:
    """[CELLS, CELLS] attention mass as base64 of cells x cells bytes.

    A byte is 255 times the square root of the mass over the largest mass in the picture: small masses stay visible.
    Rows are means over the queries of that part of the sequence (parts that no query was sampled in are 0).
    """
    step = CELLS // cells
    pooled = sums.reshape(cells, step, cells, step).sum((1, 3))
    mass = pooled / pooled.sum(1, keepdim=True).clamp_min(1e-30)
    scaled = (mass / mass.max().clamp_min(1e-30)).sqrt().mul(255).round().to(torch.uint8)
    return base64.b64encode(scaled.numpy().tobytes()).decode()


@dataclass(frozen=True)
class Alternative:
    """One pattern everywhere, or a preset, as predicted from the same recording."""

    name: str
    preset: bool
    density: float
    seconds: float
    psnr: float

    @classmethod
    def of(cls, name: str, preset: bool, point: FrontPoint) -> Alternative:
        return cls(name, preset, point.density, point.seconds, point.psnr)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def preset_choice(study: Study, items: list[Item], plan: AttentionPlan, costs: Costs) -> np.ndarray | None:
    """[N] what a plan does at the middle of each stretch; None where it is for another model or uses other methods.

    A method that the plan's `max_density` forbids is full, as it would be in a run.
    """
    number_of = {method: number for number, method in enumerate(study.candidates)}
    spec = study.facts.spec
    layers = {}
    try:
        plan.check_model(spec.family, spec.class_name or "", spec.layers or 0, spec.heads or 0)
        for component in dict.fromkeys(item.component for item in items):
            layers[component] = resolved(study, plan, component)
    except ValueError:
        return None
    total = study.facts.steps
    chosen = np.zeros(len(items), dtype=np.int64)
    for row, item in enumerate(items):
        bucket = study.buckets[item.bucket]
        step = (bucket.first + bucket.last - 1) // 2
        if plan.schedule.dense_at(step, total):
            continue
        method: Method = layers[item.component][item.layer].at(step, total)[item.head]
        if not isinstance(method, Full):
            found = number_of.get(method, number_of.get(kept_sinks(method, plan.keep_sinks)))
            if found is None:
                return None
            chosen[row] = 0 if costs.density[row, found] > plan.schedule.max_density else found
    return chosen
