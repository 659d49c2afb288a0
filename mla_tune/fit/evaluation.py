"""How good a table is, on points that the fit never saw: measured whole-path costs against the fastest candidate.

A held-out point counts where every candidate of the table ran. Where one failed, no rule has a finite slowdown to
report; such points are left out for all rules alike, and what failed is in the table's limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mla_tune.errors import FitError
from mla_tune.fit.objective import Objective, inside, shares_near
from mla_tune.fit.observations import Observations
from mla_tune.fit.scope import Scope, scope
from mla_tune.policy.decision import Decision
from mla_tune.policy.evidence import POLICY_RULE, HeldOut, Slowdown
from mla_tune.policy.schema import Policy, Table
from mla_tune.sites.candidates import DEEP_GEMM, JIT, SPARSE_FWD, WITH_KVCACHE
from mla_tune.sites.engines import Engine
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import FORWARD, MODELS, PLAIN, Conditions, SiteName
from mla_tune.store.measurement import Role

Rule = Callable[[int, int, int], str]
"""``rule(num_qo_tokens, kv_tokens, num_reqs)`` -> candidate."""

HAND_WRITTEN_THRESHOLD = 11673
"""SGLang's ``_LARGE_INDEXER_QUERY_THRESHOLD``."""
HAND_WRITTEN_RATIO = 512
"""Context tokens per query token in SGLang's rule for V3.2."""


@dataclass(frozen=True, slots=True)
class HeldOutPoint:
    """One judged point: its shape, and the slowdown of each rule in the order of :func:`rules`."""

    shape: Shape
    slowdowns: tuple[float, ...]


def rules(table: Table) -> tuple[tuple[str, Rule], ...]:
    """Name and choice of every rule that is judged: the policy, then the baselines that the table can express."""
    found: list[tuple[str, Rule]] = [(POLICY_RULE, Decision(table).choose)]
    found += [(f"always {name}", _always(name)) for name in table.candidates]
    return (*found, *_hand_written(table))


def _always(name: str) -> Rule:
    return lambda num_qo_tokens, kv_tokens, num_reqs: name


def _hand_written(table: Table) -> list[tuple[str, Rule]]:
    attention = table.site == SiteName.PREFILL_ATTENTION
    large, small = (c.name for c in ((SPARSE_FWD, WITH_KVCACHE) if attention else (JIT, DEEP_GEMM)))
    if not {large, small} <= set(table.candidates):
        return []

    def by_threshold(num_qo_tokens: int, kv_tokens: int, num_reqs: int) -> str:
        return large if num_qo_tokens > HAND_WRITTEN_THRESHOLD else small

    def by_ratio(num_qo_tokens: int, kv_tokens: int, num_reqs: int) -> str:
        return large if kv_tokens < HAND_WRITTEN_RATIO * num_qo_tokens else small

    found: list[tuple[str, Rule]] = [(f"num_qo_tokens > {HAND_WRITTEN_THRESHOLD}", by_threshold)]
    if attention:
        found.append((f"kv_tokens < {HAND_WRITTEN_RATIO} * num_qo_tokens", by_ratio))
    return found


def held_out_points(observations: Observations, table: Table) -> list[HeldOutPoint]:
    """Every held-out point of a table at which all its candidates ran, in the order of the shapes."""
    where = table_scope(table, observations.conditions)
    judged = rules(table)
    points = []
    for shape in where.swept(observations, Role.HELD_OUT):
        costs_us = {name: where.measured_us(observations, name, shape) for name in table.candidates}
        ran = {name: cost for name, cost in costs_us.items() if cost is not None}
        if len(ran) == len(costs_us):
            fastest_us = min(ran.values())
            picks = (rule(shape.num_qo_tokens, shape.kv_tokens, shape.num_reqs) for _, rule in judged)
            points.append(HeldOutPoint(shape, tuple(ran[pick] / fastest_us for pick in picks)))
    return points


def held_out(observations: Observations, table: Table) -> HeldOut:
    """The held-out part of a table. Raises :class:`FitError` if no point can be judged."""
    points = held_out_points(observations, table)
    if not points:
        raise FitError(
            f"a table must be judged on held-out points: got none for {table.site} of {table.model}, layer "
            f"{table.layer}, h_q {table.h_q}, at which all of {', '.join(table.candidates)} ran; "
            "next: sweep without a filter on points, or with a larger budget"
        )
    names = [name for name, _ in rules(table)]
    return _summary(names, [point.slowdowns for point in points])


@dataclass(frozen=True, slots=True)
class LostTable:
    """A table that chose worse at its own held-out points than one candidate everywhere would have."""

    table: str
    """As ``site, model, ...``."""
    rule: str
    """The rule that was better."""
    factor: float
    """Mean slowdown of the table over that of the rule."""
    incumbent: str
    """What is served instead: the engine's own choice."""

    def __str__(self) -> str:
        return (
            f"{self.table}: at its held-out points it is {self.factor:.2f} times slower than {self.rule!r}; it keeps "
            f"{self.incumbent}, the engine's default; next: sweep again with a larger --budget"
        )


def lost_table(table: Table, judged: HeldOut, noise_band: float) -> LostTable | None:
    """How ``table``, by its judgement, loses its held-out points beyond its noise band; None where it does not."""
    own, *others = judged.slowdown
    best = min(others[: len(table.candidates)], key=lambda rule: rule.mean)  # one for each candidate comes first
    factor = own.mean / best.mean
    if factor <= 1 + noise_band:
        return None
    heads = [] if table.h_q is None else [f"h_q {table.h_q}"]
    engine = [] if table.engine is Engine.SGLANG else [str(table.engine)]
    name = ", ".join([table.site, table.model, *heads, table.layer, *engine])
    return LostTable(name, best.rule, factor, table.incumbent)


def overall(observations: Observations, tables: Iterable[Table]) -> HeldOut | None:
    """The judgement over all of SGLang's attention tables of one layer type, each point of each table with equal weight.

    None if there is no such table with two candidates.
    """
    judged = [table for table in tables if is_single_layer_attention(table) and len(table.candidates) > 1]
    if not judged:
        return None
    slowdowns = [point.slowdowns for table in judged for point in held_out_points(observations, table)]
    return _summary([name for name, _ in rules(judged[0])], slowdowns)


@dataclass(frozen=True, slots=True)
class Weighted:
    """Mean slowdown of every rule over the held-out points near recorded traffic, weighed by its share there."""

    points: int
    """Points with any traffic near; where there are none nothing is known, and ``slowdown`` is empty."""
    effective: float
    """Points of equal weight that would say as much: the square of the summed weights over the sum of their squares."""
    slowdown: tuple[tuple[str, float], ...]


def by_traffic(observations: Observations, policy: Policy, objective: Objective) -> Weighted:
    """The tables of :func:`overall`, each by the traffic that its rows decide."""
    weights: list[float] = []
    slowdowns: list[tuple[float, ...]] = []
    names: list[str] = []
    for table in policy.tables:
        if not is_single_layer_attention(table) or len(table.candidates) < 2:
            continue
        names = names or [name for name, _ in rules(table)]
        recorded = inside(objective.recorded(SiteName(table.site), table.model), table.measured)
        points = held_out_points(observations, table)
        near = shares_near(recorded, [point.shape for point in points], policy.gpu.sm_count)
        for point, weight in zip(points, near, strict=True):
            if weight > 0:
                weights.append(float(weight))
                slowdowns.append(point.slowdowns)
    if not weights:
        return Weighted(0, 0.0, ())
    means = np.average(np.array(slowdowns), axis=0, weights=weights)
    effective = sum(weights) ** 2 / sum(weight * weight for weight in weights)
    return Weighted(len(weights), effective, tuple((name, float(m)) for name, m in zip(names, means, strict=True)))


def is_single_layer_attention(table: Table) -> bool:
    """Whether ``table`` is SGLang's and chooses attention for one layer type."""
    return table.site == SiteName.PREFILL_ATTENTION and table.layer != FORWARD and table.engine is Engine.SGLANG


def table_scope(table: Table, conditions: Conditions = PLAIN) -> Scope:
    """What ``table`` chooses for; ``conditions`` are those of its policy's measurements."""
    return scope(SiteName(table.site), MODELS[table.model], table.layer, table.h_q, table.engine, conditions)


def _summary(names: Iterable[str], slowdowns: Sequence[tuple[float, ...]]) -> HeldOut:
    columns = zip(names, zip(*slowdowns, strict=True), strict=True)
    return HeldOut(points=len(slowdowns), slowdown=tuple(_slowdown(name, column) for name, column in columns))


def _slowdown(rule: str, values: Sequence[float]) -> Slowdown:
    return Slowdown(
        rule=rule,
        geomean=round(float(np.exp(np.mean(np.log(values)))), 4),
        mean=round(float(np.mean(values)), 4),
        p95=round(float(np.percentile(values, 95)), 4),
        worst=round(float(np.max(values)), 4),
    )
