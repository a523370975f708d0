"""The front of trade-offs: its ends, its monotonicity, and that it is the best choice at every pressure."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsereel import TokenGrid
from sparsereel.search.costs import Pricing
from sparsereel.search.solve import trace
from sparsereel.selectors import BlockTopk
from sparsereel_kernels.cost import Fit


def tables(seed: int, items: int = 40, candidates: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Random errors and costs; candidate 0 is full (no error, dear), candidate 1 skips (no cost)."""
    rng = np.random.default_rng(seed)
    error, cost = rng.random((items, candidates)), rng.random((items, candidates))
    error[:, 0], cost[:, 0] = 0.0, 1.0
    error[:, 1], cost[:, 1] = 2.0, 0.0
    return error, cost


@pytest.mark.parametrize("seed", range(5))
def test_error_never_falls_and_cost_never_rises_along_the_front(seed):
    error, cost = tables(seed)
    front = trace(error, cost)
    assert len(front) > 40
    assert (np.diff(front.error) >= 0).all()
    assert (np.diff(front.cost) <= 0).all()
    assert (np.diff(front.pressure) >= 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_every_state_is_the_choice_it_says(seed):
    error, cost = tables(seed)
    front = trace(error, cost)
    everyone = np.arange(len(error))
    for state in range(0, len(front), 7):
        choice = front.choice(state)
        assert front.error[state] == pytest.approx(error[everyone, choice].sum())
        assert front.cost[state] == pytest.approx(cost[everyone, choice].sum(), abs=1e-9)


@pytest.mark.parametrize("pressure", [0.01, 0.1, 0.5, 1.0, 3.0, 30.0])
def test_the_choice_at_a_pressure_minimises_error_plus_pressure_times_cost(pressure):
    error, cost = tables(3)
    front = trace(error, cost)
    choice = front.choice(front.at(pressure))
    assert (choice == (error + pressure * cost).argmin(1)).all()


def test_no_pressure_is_dense_and_infinite_pressure_is_the_cheapest():
    error, cost = tables(1)
    # Another candidate without error: dense stays dense all the same.
    error[5, 3] = 0.0
    front = trace(error, cost)
    assert (front.choice(front.at(0.0)) == 0).all()
    assert front.error[0] == 0
    assert (front.choice(front.at(float("inf"))) == 1).all()
    assert front.cost[-1] == pytest.approx(0, abs=1e-12)


def test_targets_are_reached_with_the_least_sacrifice():
    error, cost = tables(2)
    front = trace(error, cost)
    state = front.first_within(15.0)
    assert front.cost[state] <= 15.0 < front.cost[state - 1]
    state = front.last_within(4.0)
    assert front.error[state] <= 4.0 < front.error[state + 1]
    assert front.first_within(-1.0) == len(front) - 1


def test_equal_errors_go_to_the_cheapest_at_once():
    front = trace(np.array([[0.0, 0.0, 0.5]]), np.array([[1.0, 0.4, 0.2]]))
    assert front.choice(1).tolist() == [1]
    assert front.error.tolist() == [0.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("error", "cost"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.full((2, 3), np.nan), np.zeros((2, 3))),
        (np.zeros((2, 3)), np.full((2, 3), -1.0)),
        (np.zeros((0, 3)), np.zeros((0, 3))),
    ],
)
def test_tables_that_make_no_sense_are_refused(error, cost):
    with pytest.raises(ValueError, match=r"must be"):
        trace(error, cost)


def test_a_selection_costs_its_launch_however_short_the_sequence_is(monkeypatch):
    """Heads of a short clip would otherwise seem to choose blocks for nothing."""
    facts = SimpleNamespace(device_type="cpu", dtype=torch.float32, steps=12)
    pricing = object.__new__(Pricing)
    pricing.study, pricing.backend = SimpleNamespace(facts=facts), "cpu"
    monkeypatch.setattr("sparsereel_kernels.cost.load", lambda: ())
    short, long = TokenGrid(9, 12, 12), TokenGrid(33, 64, 64)
    every, fourth = BlockTopk(density=0.2), BlockTopk(density=0.2, refresh=4)
    assert pricing._selecting(every, short, 64) > 0.2
    assert pricing._selecting(every, long, 64) < 0.05
    for grid in (short, long):
        assert pricing._selecting(fourth, grid, 64) == pytest.approx(pricing._selecting(every, grid, 64) / 4)
    # Where a table was measured, its seconds count: on a faster machine a launch weighs more.
    fit = Fit("cpu", "x", 2, "float32", 64, "cpu", False, 0.0, 0.0, 1e-12, 0.0, 0.0)
    monkeypatch.setattr("sparsereel_kernels.cost.find", lambda *a, **k: fit)
    assert pricing._selecting(every, short, 64) > 1.0
