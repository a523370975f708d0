"""How far an error gets: what a layer's or a stretch's error does to the latents at the end.

One prompt is run with few steps: once dense, once with a middling candidate everywhere, once with it in each group of
layers alone, once in each stretch of steps alone. A weight is the error of the latents over the error put in; layers
and stretches are taken to act independently, and the run with everything sets the scale.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsereel.files import write_json
from sparsereel.inject import sparsified
from sparsereel.patterns import Full, Pattern, Skip
from sparsereel.search.costs import Costs, Item
from sparsereel.search.emit import plan_of
from sparsereel.search.record import Study
from sparsereel.search.watch import run
from sparsereel.team import Team

#: steps of such a run
STEPS = 8
#: groups of layers at most
GROUPS = 8
#: token density of the candidate that is put in
MIDDLE = 0.35
#: weights are not taken below this share of the largest: a run without visible effect is not a licence
LEAST = 1e-3


@dataclass(frozen=True)
class Probe:
    """One run: which items follow the middling candidate."""

    name: str
    members: np.ndarray


def middling(study: Study, costs: Costs) -> int:
    """Number of the pattern (else of any candidate but full and skip) whose density is nearest to MIDDLE."""
    mean = costs.density.mean(0)
    plain = [n for n, m in enumerate(study.candidates) if isinstance(m, Pattern) and not isinstance(m, (Full, Skip))]
    others = [n for n, m in enumerate(study.candidates) if not isinstance(m, (Full, Skip))]
    numbers = plain or others or list(range(1, len(study.candidates)))
    return min(numbers, key=lambda n: (abs(float(mean[n]) - MIDDLE), n))


def groups_of(items: list[Item]) -> np.ndarray:
    """[N] group of layers of each item: neighbouring layers, at most GROUPS groups."""
    layers = {key: n for n, key in enumerate(sorted({(item.component, item.layer) for item in items}))}
    count = min(GROUPS, len(layers))
    return np.array([layers[item.component, item.layer] * count // len(layers) for item in items])


def probes_of(items: list[Item]) -> list[Probe]:
    """All runs besides the dense one."""
    groups, buckets = groups_of(items), np.array([item.bucket for item in items])
    probes = [Probe("all", np.ones(len(items), dtype=bool))]
    probes += [Probe(f"layers {g}", groups == g) for g in np.unique(groups).tolist()]
    probes += [Probe(f"stretch {b}", buckets == b) for b in np.unique(buckets).tolist()]
    return probes


def probe_steps(study: Study) -> int:
    """Denoising steps of a probing run: enough that every stretch has at least one."""
    total = study.facts.steps
    if study.facts.led:  # a share of the steps asked for, so fewer would be none
        return total
    return next(s for s in range(min(STEPS, total), total + 1) if _covers(study, s))


def _covers(study: Study, steps: int) -> bool:
    from sparsereel.schedule import share_of

    first = share_of(study.settings.dense_first, steps)
    return all(any((s, steps) in b.stretch for s in range(first, steps)) for b in study.buckets)


def measure_reach(
    pipe: Any, study: Study, items: list[Item], number: int, on_step: Callable[[int], None], team: Team
) -> dict[str, float]:
    """Mean squared error of the latents over their variance, by name of the probe; finished runs are kept."""
    probes = probes_of(items)
    mine = [probe for place, probe in enumerate(probes) if team.does(place)]
    found = _measured(pipe, study, items, number, on_step, mine, team.rank)
    team.meet()
    for rank in range(team.size):
        found |= _kept(study, rank)
    # A team of another size may have left its files.
    left = [probe for probe in probes if probe.name not in found]
    return found | _measured(pipe, study, items, number, on_step, left, team.rank)


def _path(study: Study, rank: int) -> Path | None:
    return None if study.folder is None else study.folder / f"reach{rank or ''}.json"


def _kept(study: Study, rank: int) -> dict[str, float]:
    path = _path(study, rank)
    if path is None or not path.is_file():
        return {}
    kept: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return kept


def _measured(
    pipe: Any,
    study: Study,
    items: list[Item],
    number: int,
    on_step: Callable[[int], None],
    probes: list[Probe],
    rank: int,
) -> dict[str, float]:
    path, found = _path(study, rank), _kept(study, rank)
    missing = [probe for probe in probes if probe.name not in found]
    steps = probe_steps(study)
    request = study.settings.request(0)
    if not study.facts.led:
        request = replace(request, steps=steps)
    dense: torch.Tensor | None = None
    for probe in missing:
        if dense is None:
            dense = _latents(pipe, study, items, np.zeros(len(items), dtype=np.int64), request)
            on_step(steps)
        changed = _latents(pipe, study, items, np.where(probe.members, number, 0), request)
        found[probe.name] = float((changed - dense).square().mean() / dense.var().clamp_min(1e-30))
        if path is not None:
            write_json(path, found)
        on_step(steps)
    return found


def _latents(pipe: Any, study: Study, items: list[Item], choice: np.ndarray, request: Any) -> torch.Tensor:
    with sparsified(pipe, plan_of(study, items, choice), backend=study.settings.backend):
        return run(pipe, request)


def weights_of(study: Study, items: list[Item], errors: np.ndarray, number: int, found: dict[str, float]) -> np.ndarray:
    """[N] weight of each item: error of the latents for one unit of its own error, held for its stretch."""
    buckets = np.array([item.bucket for item in items])
    counts = np.array([bucket.count for bucket in study.buckets], dtype=np.float64)
    held = (counts / counts.sum())[buckets]
    local = errors[:, number] * held
    groups = groups_of(items)
    by_group = _ratios([(found[f"layers {g}"], local[groups == g].sum()) for g in np.unique(groups).tolist()])
    stretches = np.unique(buckets).tolist()
    ratios = _ratios([(found[f"stretch {b}"], local[buckets == b].sum()) for b in stretches])
    by_stretch = dict(zip(stretches, ratios.tolist(), strict=True))
    weights = by_group[groups] * np.array([by_stretch[b] for b in buckets.tolist()]) * held
    total = float((weights * errors[:, number]).sum())
    if total <= 0 or found["all"] <= 0:
        return held
    scaled: np.ndarray = weights * (found["all"] / total)
    return scaled


def _ratios(pairs: list[tuple[float, float]]) -> np.ndarray:
    ratios = np.array([out / put if put > 0 else np.nan for out, put in pairs])
    known = ratios[np.isfinite(ratios)]
    if len(known) == 0 or known.max() <= 0:
        return np.ones(len(pairs))
    return np.maximum(np.where(np.isfinite(ratios), ratios, np.median(known)), LEAST * known.max())
