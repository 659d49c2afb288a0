"""Who won at one measured point, or that nobody can say: two candidates whose intervals overlap are ambiguous."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mla_tune.fit.observations import Observations
from mla_tune.fit.scope import Scope
from mla_tune.sites.shape import Shape


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one measured comparison."""

    choice: str
    """The fastest candidate where it is clearly faster than the incumbent; otherwise the incumbent."""
    ambiguous: bool
    """The intervals of the two that matter overlap."""


def verdict(observations: Observations, scope: Scope, names: Sequence[str], shape: Shape) -> Verdict | None:
    """Who won at ``shape`` among ``names``, the incumbent first; None where one of them was not measured."""
    costs_us = [scope.measured_us(observations, name, shape) for name in names]
    intervals = [scope.measured_interval(observations, name, shape) for name in names]
    known = [
        (us, interval, name) for us, interval, name in zip(costs_us, intervals, names, strict=True) if us and interval
    ]
    if len(known) < len(names):
        return None
    incumbent = known[0]
    challengers = sorted(known[1:], key=lambda entry: entry[0])
    if not challengers:
        return Verdict(incumbent[2], ambiguous=False)
    best = challengers[0]
    if best[1].overlaps(incumbent[1]):
        return Verdict(incumbent[2], ambiguous=True)
    if best[0] > incumbent[0]:
        return Verdict(incumbent[2], ambiguous=False)
    return Verdict(best[2], ambiguous=any(best[1].overlaps(other[1]) for other in challengers[1:]))


def overlapping(observations: Observations, scope: Scope, one: str, other: str, shape: Shape) -> bool:
    """Whether the measured costs of two candidates at ``shape`` cannot be told apart; false where one was not measured."""
    intervals = [scope.measured_interval(observations, name, shape) for name in (one, other)]
    first, second = intervals
    return first is not None and second is not None and first.overlaps(second)
