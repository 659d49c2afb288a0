"""What a changed policy wins or costs, by the shapes that were measured.

A grid says how many answers change, and nothing of their price. Where a changed answer falls on a measured shape, both
candidates were timed there, and their times are the price. Elsewhere only the cost curves have an opinion: a prediction,
which is kept apart and named so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mla_tune.fit.costs import CostModel
from mla_tune.fit.evaluation import table_scope
from mla_tune.fit.observations import Observations
from mla_tune.fit.scope import Scope
from mla_tune.fit.work import work
from mla_tune.policy.comparison import GridShape, PolicyChange, TableChange, rule_of
from mla_tune.policy.schema import TableKey
from mla_tune.sites.shape import MAX_REQS, Shape
from mla_tune.store.measurement import Role

_MOST_PREDICTED = 4096
"""Changed shapes of a table that are predicted at most, evenly drawn from all: a mean needs no more."""


@dataclass(frozen=True, slots=True)
class MeasuredChange:
    """One changed table at the measured shapes at which both of its answers, and its other candidates, ran."""

    key: TableKey
    measured: int
    changed: int
    """Of them, the shapes whose answer changes."""
    held_out: int
    """Of these, the shapes that no fit has seen."""
    ratio: float | None
    """Geometric mean of old time over new time at the changed shapes: above 1 the new answer is faster; None for none."""
    best: float | None
    worst: float | None
    slowdown_before: float | None
    """Mean time over the fastest candidate's, at all measured shapes of the table; None where there is none."""
    slowdown_after: float | None


@dataclass(frozen=True, slots=True)
class PredictedChange:
    """One changed table at the shapes whose answer changes, by the cost curves alone."""

    key: TableKey
    shapes: int
    ratio: float
    """Geometric mean of predicted old time over predicted new time."""
    best: float
    worst: float


def judge_changes(observations: Observations, change: PolicyChange) -> list[MeasuredChange]:
    """Every changed table of ``change`` by ``observations``, in its order."""
    return [_judged(observations, table) for table in change.tables]


def mean_ratio(judged: Iterable[MeasuredChange]) -> float | None:
    """Geometric mean of old time over new time over the changed measured shapes of all tables; None for none."""
    logs = [(entry.changed, float(np.log(entry.ratio))) for entry in judged if entry.ratio is not None]
    total = sum(count for count, _ in logs)
    return float(np.exp(sum(count * log for count, log in logs) / total)) if total else None


def _judged(observations: Observations, change: TableChange) -> MeasuredChange:
    where = table_scope(change.table, observations.conditions)
    names = _candidates(change)
    old, new = rule_of(change.before, change.after), rule_of(change.after, change.before)
    ratios: list[float] = []
    slowdowns: list[tuple[float, float]] = []
    held_out = 0
    for shape, role in _measured_shapes(where, observations):
        times_us = {name: where.measured_us(observations, name, shape) for name in names}
        ran = {name: time_us for name, time_us in times_us.items() if time_us is not None}
        picks = tuple(rule(shape.num_qo_tokens, shape.kv_tokens, shape.num_reqs) for rule in (old, new))
        if not set(picks) <= set(ran):
            continue
        before_us, after_us = (ran[pick] for pick in picks)
        fastest_us = min(ran.values())
        slowdowns.append((before_us / fastest_us, after_us / fastest_us))
        if picks[0] != picks[1]:
            ratios.append(before_us / after_us)
            held_out += role is Role.HELD_OUT
    means = np.mean(slowdowns, axis=0) if slowdowns else (None, None)
    return MeasuredChange(
        key=change.key,
        measured=len(slowdowns),
        changed=len(ratios),
        held_out=held_out,
        ratio=_geomean(ratios) if ratios else None,
        best=max(ratios, default=None),
        worst=min(ratios, default=None),
        slowdown_before=None if means[0] is None else float(means[0]),
        slowdown_after=None if means[1] is None else float(means[1]),
    )


def _candidates(change: TableChange) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for of in (change.before, change.after) if of for name in of.candidates))


def _measured_shapes(where: Scope, observations: Observations) -> Iterator[tuple[Shape, Role]]:
    for role in (Role.FIT, Role.HELD_OUT):
        for shape in where.swept(observations, role):
            yield shape, role


def predict_changes(
    costs: CostModel, change: PolicyChange, asked: Iterable[Sequence[GridShape]]
) -> list[PredictedChange]:
    """The changed tables by the curves of ``costs``; ``asked`` holds the shapes of each table of ``change``.

    A table of which no answer changes, or whose candidates the measurements lack, has no prediction.
    """
    found = (_predicted(costs, table, shapes) for table, shapes in zip(change.tables, asked, strict=True))
    return [entry for entry in found if entry is not None]


def _predicted(costs: CostModel, change: TableChange, asked: Sequence[GridShape]) -> PredictedChange | None:
    old, new = rule_of(change.before, change.after), rule_of(change.after, change.before)
    possible = [shape for shape in asked if 1 <= shape[2] <= shape[0] <= shape[1] and shape[2] <= MAX_REQS]
    moved = [(shape, old(*shape), new(*shape)) for shape in possible if old(*shape) != new(*shape)]
    moved = moved[:: -(-len(moved) // _MOST_PREDICTED) or 1]
    where = table_scope(change.table, costs.observations.conditions)
    names = sorted({name for _, *answers in moved for name in answers})
    if not moved or not set(names) <= set(where.candidates(costs.observations)):
        return None
    shapes = [Shape(num_reqs, tokens, kv_tokens) for (tokens, kv_tokens, num_reqs), _, _ in moved]
    works = [work(site, shapes) for site, _ in where.parts]
    us = {name: where.predicted_us(costs, name, works) for name in names}
    ratios = [float(us[before][at] / us[after][at]) for at, (_, before, after) in enumerate(moved)]
    return PredictedChange(change.key, len(moved), _geomean(ratios), max(ratios), min(ratios))


def _geomean(ratios: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(ratios))))
