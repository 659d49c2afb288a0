"""What was measured for one table, point by point: which path was faster, by how much, and where nobody can say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

from mla_tune.fit.observations import Observations
from mla_tune.fit.scope import Scope
from mla_tune.fit.winner import verdict
from mla_tune.policy.decision import Decision
from mla_tune.policy.schema import Table
from mla_tune.sites.shape import Shape
from mla_tune.store.measurement import Outcome, Role

DIGITS = 4
"""Significant digits of a time in a report: intervals are wider than that."""


class MeasuredCost(msgspec.Struct, frozen=True, array_like=True):
    """Median of one candidate at one point and its 95 % confidence interval, microseconds."""

    latency_us: float
    low_us: float
    high_us: float


class MeasuredPoint(msgspec.Struct, frozen=True, array_like=True):
    """One measured shape of one table. Written as a list: a report has thousands of them."""

    num_reqs: int
    num_qo_tokens: int
    kv_tokens: int
    held_out: bool
    """The fit never saw it."""
    shift: int
    """How many points before it have the same query tokens and context: they are drawn side by side."""
    fastest: int | None
    """Index of the candidate with the least median; None where none ran."""
    answer: int
    """Index of the candidate that the policy takes there."""
    ambiguous: bool
    """The intervals of the two that matter overlap: the engine's default stays."""
    gain: float | None
    """Cost of the engine's default over that of the best other candidate; None where one of them is missing."""
    costs: tuple[MeasuredCost | None, ...]
    """By candidate, in the table's order."""
    failures: tuple[str, ...]
    """``candidate: what its failure said`` for each that failed. One without a cost and without a failure was not timed, or
    with other launch parameters than the policy's."""


def measured_points(observations: Observations, where: Scope, table: Table) -> tuple[MeasuredPoint, ...]:
    """Every point at which the sweep tried all sites of ``where``, the scope of ``table``; sorted, each once.

    Points of which nothing counts, since all was taken with launch parameters that the policy does not have, are left out.
    """
    return tuple(_points(observations, where, table))


def _points(observations: Observations, where: Scope, table: Table) -> Iterator[MeasuredPoint]:
    choose, candidates, incumbent = Decision(table).choose, table.candidates, table.incumbent
    names = [incumbent, *(name for name in candidates if name != incumbent)]
    held_out = set(where.swept(observations, Role.HELD_OUT))
    seen: Counter[tuple[int, int]] = Counter()
    for shape in sorted({*where.swept(observations, Role.FIT), *held_out}):
        costs = tuple(_cost(observations, where, name, shape) for name in candidates)
        ran = [(cost.latency_us, index) for index, cost in enumerate(costs) if cost is not None]
        failures = tuple(_failures(observations, where, candidates, costs, shape))
        if not ran and not failures:
            continue
        place = shape.num_qo_tokens, shape.kv_tokens
        judged = verdict(observations, where, names, shape)
        yield MeasuredPoint(
            num_reqs=shape.num_reqs,
            num_qo_tokens=shape.num_qo_tokens,
            kv_tokens=shape.kv_tokens,
            held_out=shape in held_out,
            shift=seen[place],
            fastest=min(ran)[1] if ran else None,
            answer=candidates.index(choose(shape.num_qo_tokens, shape.kv_tokens, shape.num_reqs)),
            ambiguous=judged is not None and judged.ambiguous,
            gain=_gain(costs, candidates.index(incumbent)),
            costs=costs,
            failures=failures,
        )
        seen[place] += 1


def _cost(observations: Observations, where: Scope, candidate: str, shape: Shape) -> MeasuredCost | None:
    latency_us = where.measured_us(observations, candidate, shape)
    interval = where.measured_interval(observations, candidate, shape)
    if latency_us is None or interval is None:
        return None
    return MeasuredCost(significant(latency_us), significant(interval.low_us), significant(interval.high_us))


def _gain(costs: Sequence[MeasuredCost | None], incumbent: int) -> float | None:
    default = costs[incumbent]
    others = [cost.latency_us for index, cost in enumerate(costs) if index != incumbent and cost is not None]
    return significant(default.latency_us / min(others)) if default is not None and others else None


def _failures(
    observations: Observations,
    where: Scope,
    candidates: Sequence[str],
    costs: Sequence[MeasuredCost | None],
    shape: Shape,
) -> Iterator[str]:
    for name, cost in zip(candidates, costs, strict=True):
        if cost is None:
            rows = (observations.failure(site, name, shape) for site, _ in where.parts)
            found = next((row for row in rows if row is not None and row.outcome is not Outcome.DISTURBED), None)
            if found is not None:
                yield f"{name}: {found.outcome}, {found.detail}"


def significant(value: float) -> float:
    """``value`` with :data:`DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")
