"""The choice: every head trades error against cost at one common exchange rate, the pressure lambda.

    minimise  sum_i error[i, c_i] + lambda * sum_i cost[i, c_i]

Without coupling each item decides for itself, and as lambda grows it walks along the lower convex hull of its points
(cost, error): from the least error to the least cost. All steps of all items, sorted by the lambda at which they are
taken, are the whole Pareto front of the relaxed problem; along it error never falls and cost never rises, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Front:
    """All plans along the front, from lambda 0 to infinite pressure. M steps, N items.

    Attributes:
        start: [N] candidates at lambda 0.
        pressure: [M + 1] lambda at which each state begins; 0 for the first.
        item, candidate: [M] which item takes up which candidate in each step.
        error, cost: [M + 1] totals of each state.
    """

    start: np.ndarray
    pressure: np.ndarray
    item: np.ndarray
    candidate: np.ndarray
    error: np.ndarray
    cost: np.ndarray

    def __len__(self) -> int:
        return len(self.pressure)

    def choice(self, state: int) -> np.ndarray:
        """[N] candidate of each item in state 0 .. M."""
        chosen = self.start.copy()
        # Later steps of an item overwrite its earlier ones.
        chosen[self.item[:state]] = self.candidate[:state]
        return chosen

    def at(self, pressure: float) -> int:
        """The state at a lambda: all steps that pay at it."""
        if pressure <= 0:
            return 0
        return int(np.searchsorted(self.pressure[1:], pressure, side="left"))

    def first_within(self, cost: float) -> int:
        """The state of least error whose cost is at most `cost`; the last one where none is."""
        within = np.flatnonzero(self.cost <= cost + 1e-12)
        return int(within[0]) if len(within) else len(self) - 1

    def last_within(self, error: float) -> int:
        """The state of least cost whose error is at most `error`; the first one where none is."""
        within = np.flatnonzero(self.error <= error)
        return int(within[-1]) if len(within) else 0


def trace(error: np.ndarray, cost: np.ndarray) -> Front:
    """The front of N items with C candidates each.

    Args:
        error, cost: [N, C], finite, not negative. Candidate 0 is where equal errors begin (full).

    Raises:
        ValueError: shapes that differ, or values that are negative or not finite.
    """
    if error.shape != cost.shape or error.ndim != 2 or 0 in error.shape:
        raise ValueError(f"error and cost must be tables of one shape [N, C], got {error.shape} and {cost.shape}")
    for name, table in (("error", error), ("cost", cost)):
        if not np.isfinite(table).all() or (table < 0).any():
            raise ValueError(f"{name} must be finite and not negative")
    start = error.argmin(1)
    steps: list[tuple[float, int, int, int]] = []
    for number in range(len(error)):
        walk = _walk(error[number], cost[number], int(start[number]))
        steps += [(at, number, order, candidate) for order, (at, candidate) in enumerate(walk)]
    steps.sort()
    item = np.array([number for _, number, _, _ in steps], dtype=np.int64)
    candidate = np.array([c for _, _, _, c in steps], dtype=np.int64)
    pressure = np.array([0.0, *(at for at, _, _, _ in steps)])
    errors, costs = _totals(error, cost, start, item, candidate)
    return Front(start, pressure, item, candidate, errors, costs)


def _walk(error: np.ndarray, cost: np.ndarray, start: int) -> list[tuple[float, int]]:
    """(lambda, candidate) of each corner of one item's hull after the first, cheaper and cheaper."""
    walk: list[tuple[float, int]] = []
    here, reached = start, 0.0
    while True:
        cheaper = np.flatnonzero(cost < cost[here])
        if len(cheaper) == 0:
            return walk
        rates = np.maximum(error[cheaper] - error[here], 0.0) / (cost[here] - cost[cheaper])
        best = rates.min()
        # Of the candidates on one edge of the hull the cheapest is its other corner.
        edge = cheaper[rates <= best]
        here = int(edge[np.lexsort((edge, error[edge], cost[edge]))[0]])
        # Rounding may put a corner a hair before the one it follows.
        reached = max(reached, float(best))
        walk.append((reached, here))


def _totals(
    error: np.ndarray, cost: np.ndarray, start: np.ndarray, item: np.ndarray, candidate: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    now = start.copy()
    gained, saved = np.zeros(len(item)), np.zeros(len(item))
    for step, (number, chosen) in enumerate(zip(item, candidate, strict=True)):
        gained[step] = max(0.0, error[number, chosen] - error[number, now[number]])
        saved[step] = cost[number, now[number]] - cost[number, chosen]
        now[number] = chosen
    everyone = np.arange(len(start))
    errors = error[everyone, start].sum() + np.concatenate([[0.0], np.cumsum(gained)])
    costs = cost[everyone, start].sum() - np.concatenate([[0.0], np.cumsum(saved)])
    return errors, np.maximum(costs, 0.0)
