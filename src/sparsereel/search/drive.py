"""The search from end to end: look, record, weigh, price, choose, measure, and again while the target is missed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from sparsereel.families import models_of
from sparsereel.families.layout import decode
from sparsereel.inject import extension_of
from sparsereel.plan import AttentionPlan
from sparsereel.search import calibration, memory
from sparsereel.search.candidates import general_presets, resolve
from sparsereel.search.costs import Costs, Item, Pricing, errors_of, tiles_of
from sparsereel.search.emit import plan_of, tile_of
from sparsereel.search.evidence import Alternative, Evidence, heads_of, preset_choice
from sparsereel.search.forecast import Anchor, Forecast, measure_anchor
from sparsereel.search.progress import Bar, bar, silenced
from sparsereel.search.reach import GROUPS, measure_reach, middling, probe_steps, weights_of
from sparsereel.search.record import Recording, Study, record
from sparsereel.search.result import FrontPoint, SearchResult
from sparsereel.search.settings import Settings, Target, cut_steps
from sparsereel.search.solve import Front, trace
from sparsereel.search.verify import HeldOut
from sparsereel.search.watch import look
from sparsereel.team import Team

if TYPE_CHECKING:
    from sparsereel.inject import PlanLike
    from sparsereel.patterns.base import Pattern
    from sparsereel.selectors.base import Selector
    from sparsereel.token_order import Tile

#: times that a plan is chosen anew after a measurement
REPEATS = 3
#: dB above the target at which a plan is given more pressure
SLACK = 1.5
#: share by which the seconds of a clip vary from run to run
NOISE = 0.03
#: points of the front that are handed back
POINTS = 40


@dataclass(frozen=True, eq=False)
class Solution:
    """One choice in one token order."""

    costs: Costs
    choice: np.ndarray
    plan: AttentionPlan
    pressure: float
    error: float
    met: bool


@dataclass(frozen=True, eq=False)
class Chooser:
    """All that choosing needs: items, weighted errors [N, C], prices by token order."""

    study: Study
    items: list[Item]
    errors: np.ndarray
    prices: dict[Tile | None, Costs]

    def solve(self, target: Target, forecast: Forecast) -> Solution:
        """The best plan whose token order is the one it was priced in.

        The order follows from the plan (by the rule of `sparsify`) and the prices from the order, so every order is
        tried; a plan that would run in another order than its own is priced again in that one.
        """
        own, others = [], []
        for tile, costs in self.prices.items():
            front = trace(self.errors, costs.densities if target.kind == "budget" else costs.times)
            state = _state(target, forecast, costs, front)
            solution = self.solution(target, forecast, costs, front.choice(state), front.pressure[state])
            actual = tile_of(self.study, solution.plan)
            if actual == tile or not solution.choice.any():
                own.append(solution)
            elif actual in self.prices:
                again = self.solution(target, forecast, self.prices[actual], solution.choice, solution.pressure)
                others.append(again)
        by_cost = target.kind == "target_psnr"

        def rank(solution: Solution) -> tuple[bool, float, float]:
            share = solution.costs.mean_share(solution.choice)
            return (not solution.met, *((share, solution.error) if by_cost else (solution.error, share)))

        return min(own or others, key=rank)

    def solution(
        self, target: Target, forecast: Forecast, costs: Costs, choice: np.ndarray, pressure: float
    ) -> Solution:
        """A choice with its plan and its predicted figures."""
        error = float(self.errors[np.arange(len(choice)), choice].sum())
        plan = plan_of(self.study, self.items, choice)
        solution = Solution(costs, choice, plan, float(pressure), error, met=True)
        point = predict(solution, forecast)
        predicted = {"budget": point.density, "target_psnr": point.psnr, "target_speedup": point.speedup}
        met = target.met_by(predicted[target.kind] + (0.0 if target.kind == "budget" else 1e-6))
        return replace(solution, met=met)

    def alone(self, target: Target, forecast: Forecast) -> list[tuple[str, bool, Solution]]:
        """Every candidate in all heads, and the general presets (True), in the token order that each would run in."""
        everywhere = {str(m): np.full(len(self.items), n) for n, m in enumerate(self.study.candidates) if n}
        found = [(name, False, choice) for name, choice in everywhere.items()]
        for name, plan in general_presets().items():
            choice = preset_choice(self.study, self.items, plan, self.prices[None])
            found += [] if choice is None else [(name, True, choice)]
        solutions = []
        for name, preset, choice in found:
            costs = self.prices.get(tile_of(self.study, plan_of(self.study, self.items, choice)), self.prices[None])
            solutions.append((name, preset, self.solution(target, forecast, costs, choice, 0.0)))
        return solutions

    def rival(self, target: Target, forecast: Forecast) -> tuple[str, Solution] | None:
        """Of what stands alone and keeps within the target, the one predicted to lose least.

        None where nothing does, and for a PSNR: the plan is the cheapest then, and predictions say what is cheaper.
        """
        if target.kind == "target_psnr":
            return None
        within = [(name, one) for name, _, one in self.alone(target, forecast) if one.met and one.choice.any()]
        return min(within, key=lambda entry: entry[1].error, default=None)


def predict(solution: Solution, forecast: Forecast) -> FrontPoint:
    """The predicted figures of a choice."""
    share = solution.costs.mean_share(solution.choice)
    return FrontPoint(
        pressure=solution.pressure,
        density=solution.costs.mean_density(solution.choice) * forecast.excess,
        seconds=forecast.seconds(share),
        speedup=forecast.speedup(share),
        error=solution.error,
        psnr=forecast.psnr(solution.error),
    )


def _state(target: Target, forecast: Forecast, costs: Costs, front: Front) -> int:
    if target.kind == "budget":
        return front.first_within(target.value / forecast.excess - costs.fixed_density)
    if target.kind == "target_speedup":
        return front.first_within(forecast.share_for(target.value) - costs.fixed_time)
    return front.last_within(forecast.error_for(target.value))


def run_search(
    pipe: Any,
    settings: Settings,
    candidates: Sequence[str | Pattern | Selector] | None,
    refine: PlanLike | None,
    folder: Path | None,
    *,
    show: bool,
) -> SearchResult:
    """See `sparsereel.search`."""
    model = next(iter(models_of(pipe).values()))
    if isinstance(pipe, nn.Module):
        raise ValueError(f"a search generates clips, so it needs a pipeline, got the model {type(pipe).__name__} alone")
    extension = extension_of(model)
    if extension is not None:
        if not extension.recipe.keeps_attention:
            raise ValueError(
                f"a search records attention as it is, so it does not go with {extension.recipe.describe()}; it takes "
                "methods that move tokens only: plain, pi, pi_time, ntk, yarn, riflex, upscale"
            )
        if extension.recipe.guide is not None and settings.target.kind == "budget":
            raise ValueError(
                f"budget is the density of a whole clip, and with {extension.recipe.describe()} a small clip that "
                "stays dense comes first; give target_psnr or target_speedup"
            )
        settings = settings.extended(extension.sizes.arguments)
    team = Team.here()
    if team.size > 1 and folder is None:
        raise ValueError("several processes search together through files: give folder")
    with silenced(pipe), bar(show and team.leads) as shown:
        facts = look(pipe, settings.request(0), settings.backend)
        if facts.led and len({decode(layer.layout).seq_len for layer in facts.layers.values()}) > 1:
            raise ValueError(
                f"the small picture of {facts.extended} would have to stay dense, which a plan can say by a number of "
                f"tokens only, and layers of {facts.spec.class_name} lie on grids of several sizes"
            )
        grid = max((decode(layer.layout) for layer in facts.layers.values()), key=lambda grid: grid.seq_len)
        found = resolve(candidates, refine, grid)
        buckets = cut_steps(facts.steps, settings.dense_first, settings.buckets)
        study = Study.of(settings, facts, found, buckets, folder)
        shown.expect(_steps_of(study))
        shown.stage("recording heads")
        if team.leads:
            shown.note(memory.sentence(pipe, study))
        recording = record(pipe, study, shown.reach, lambda: shown.done(facts.steps), team)
        chooser, forecast = _weigh(pipe, study, recording, shown, team)
        # Times are only worth something where nobody else runs: the leader measures, the others take its result.
        return team.from_leader(_choose(pipe, study, recording, chooser, forecast, shown) if team.leads else None)


def _steps_of(study: Study) -> int:
    settings, steps = study.settings, study.facts.steps
    clips = len(settings.calibrating) + 3 + 2 * settings.held_out
    probes = min(GROUPS, len(study.facts.layers)) + len(study.buckets) + 2
    return clips * steps + probes * probe_steps(study)


def _weigh(pipe: Any, study: Study, recording: Recording, shown: Bar, team: Team) -> tuple[Chooser, Forecast]:
    pricing = Pricing(study, recording)
    prices = {tile: pricing.costs(tile) for tile in tiles_of(study)}
    raw = errors_of(recording)
    number = middling(study, prices[None])
    shown.stage("weighing layers and steps")
    found = measure_reach(pipe, study, pricing.items, number, shown.done, team)
    weights = weights_of(study, pricing.items, raw, number, found)
    chooser = Chooser(study, pricing.items, raw * weights[:, None], prices)
    everywhere = np.full(len(pricing.items), number)
    shown.stage("timing")
    plan = plan_of(study, pricing.items, everywhere)
    anchor = measure_anchor(pipe, study, plan, shown.done) if team.leads else Anchor(1.0, 1.0, 1.0, 30.0)
    error = float(chooser.errors[:, number].sum())
    costs = prices.get(tile_of(study, plan), prices[None])
    return chooser, Forecast.of(anchor, error, costs.mean_share(everywhere))


def _choose(
    pipe: Any, study: Study, recording: Recording, chooser: Chooser, forecast: Forecast, shown: Bar
) -> SearchResult:
    target = study.settings.target
    solution = chooser.solve(target, forecast)
    tried: Tried = [(solution, forecast, {})]
    held_out = HeldOut(pipe, study, shown.done)
    rounds, rival = 1, ""
    if study.settings.held_out:
        shown.stage("measuring the plan")
        tried = _measured(held_out, study, chooser, solution, forecast, shown)
        rounds = len(tried)
        # Errors are taken to add up, which favours plans of many parts: what stands alone is measured, too.
        found = chooser.rival(target, tried[-1][1])
        if found is not None and not any((found[1].choice == before.choice).all() for before, _, _ in tried):
            shown.more(study.settings.held_out * study.facts.steps)
            rival = found[0]
            tried.append((found[1], tried[-1][1], held_out.measure(found[1].plan)))
    (solution, used, measured), met = best = _best(target, tried)
    predicted = predict(solution, used)
    note = "" if met else _missed(target, predicted, measured, rounds)
    facts = calibration.of(study, recording, chooser.items, solution.choice, solution.costs)
    facts |= {
        "target": {target.kind: target.value},
        "predicted": asdict(predicted),
        "measured": measured,
        "anchor": asdict(forecast.anchor),
        "rounds": rounds,
    }
    if rival:
        names = ("psnr", "seconds", "density")
        facts["rival"] = {"method": rival, "taken": solution is tried[-1][0]} | {n: tried[-1][2][n] for n in names}
    plan = replace(solution.plan, calibration=calibration.tidy(facts))
    front = _front(chooser, target, solution, used)
    turn = next(n for n, entry in enumerate(tried) if entry is best[0])
    data = {
        **heads_of(study, recording, chooser.items, solution.choice, solution.costs),
        "alternatives": [
            Alternative.of(name, preset, predict(one, used)).to_dict()
            for name, preset, one in chooser.alone(target, used)
        ],
        "rounds": [
            {"predicted": asdict(predict(s, f)), "measured": m}
            for number, (s, f, m) in enumerate(tried)
            if m and (number < rounds or s is solution)
        ],
    }
    evidence = Evidence(data, held_out.shown(turn) if measured else ())
    return SearchResult(plan, front, predicted, measured, met, note, evidence)


Tried = list[tuple[Solution, Forecast, dict[str, Any]]]


def _measured(
    held_out: HeldOut, study: Study, chooser: Chooser, solution: Solution, forecast: Forecast, shown: Bar
) -> Tried:
    """Measure; while the target is missed, or PSNR lies well above it, choose again by what was learnt."""
    target = study.settings.target
    tried: Tried = []
    for turn in range(1 + REPEATS):
        measured = held_out.measure(solution.plan)
        tried.append((solution, forecast, measured))
        value = measured[calibration.MEASURE[target.kind]]
        loose = target.kind == "target_psnr" and value > target.value + SLACK
        if turn == REPEATS or (target.met_by(value) and not loose):
            break
        share = solution.costs.mean_share(solution.choice)
        density = solution.costs.mean_density(solution.choice)
        forecast = forecast.learn(solution.error, share, measured)
        if target.kind == "budget":
            forecast = replace(forecast, excess=max(1.0, measured["density"] / max(density, 1e-9)))
        again = chooser.solve(target, forecast)
        if any((again.choice == before.choice).all() for before, _, _ in tried):
            break
        shown.more(study.settings.held_out * study.facts.steps)
        solution = again
    return tried


def _best(target: Target, tried: Tried) -> tuple[tuple[Solution, Forecast, dict[str, Any]], bool]:
    """The plan to hand back and whether it reaches the target.

    Of those that reach it the cheapest for a PSNR, else the one measured to be the most exact. Where none does, the one
    nearest to it; plans that are apart by no more than clips' seconds vary count as equally near, and the most exact of
    them is taken, so that a target missed by chance does not end in a plan that skips what it can.
    """
    if not tried[0][2]:
        return tried[0], tried[0][0].met
    name = calibration.MEASURE[target.kind]
    reached = [entry for entry in tried if target.met_by(entry[2][name])]
    if not reached:
        nearest = min(tried, key=lambda entry: abs(entry[2][name] - target.value))
        if target.kind != "target_speedup":
            return nearest, False
        near = [entry for entry in tried if entry[2][name] >= nearest[2][name] * (1 - NOISE)]
        return max(near, key=lambda entry: entry[2]["psnr"]), False
    if target.kind == "target_psnr":
        return min(reached, key=lambda entry: entry[0].costs.mean_share(entry[0].choice)), True
    return max(reached, key=lambda entry: entry[2]["psnr"]), True


def _missed(target: Target, predicted: FrontPoint, measured: dict[str, Any], rounds: int) -> str:
    name = calibration.MEASURE[target.kind]
    value = measured[name] if measured else getattr(predicted, name)
    how = f"measured after {rounds} rounds" if measured else "predicted"
    return f"{target.kind} {target.value:g} is not reached: {value:.3g} {how}"


def _front(chooser: Chooser, target: Target, solution: Solution, forecast: Forecast) -> tuple[FrontPoint, ...]:
    costs = solution.costs
    front = trace(chooser.errors, costs.densities if target.kind == "budget" else costs.times)
    states = np.unique(np.linspace(0, len(front) - 1, POINTS).round().astype(int))
    points = []
    for state in states.tolist():
        choice = front.choice(state)
        error = float(chooser.errors[np.arange(len(choice)), choice].sum())
        one = replace(solution, choice=choice, pressure=float(front.pressure[state]), error=error)
        points.append(predict(one, forecast))
    return tuple(points)
