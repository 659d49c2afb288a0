"""Why a table answers what it answers: the same sum that the fit minimized, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_tune.fit.costs import CostModel, StageCost
from mla_tune.fit.observations import shares
from mla_tune.fit.scope import Scope, scope
from mla_tune.fit.work import work
from mla_tune.policy.decision import Decision, ExplainedChoice
from mla_tune.policy.schema import Table
from mla_tune.sites.candidates import stages
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import FORWARD, MODELS, Site, SiteName


@dataclass(frozen=True, slots=True)
class CandidateExplanation:
    """What one candidate costs at one shape."""

    candidate: str
    stages: tuple[StageCost, ...]
    """In the order in which they run, a whole forward one layer type after the other; before the correction."""
    correction: float
    """Whole path over the sum of its stages, as measured nearby: launch gaps above 1, overlap below."""
    total_us: float
    """Sum of the stages times the correction, microseconds."""
    measured_us: float | None
    """The whole path as measured at this very shape, if it was."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A table's answer at one shape, with the evidence."""

    shape: Shape
    decision: ExplainedChoice
    """The candidate, the rule that led to it, its row and threshold."""
    unit: str
    """What the times are for: ``layer`` or ``forward``."""
    candidates: tuple[CandidateExplanation, ...]
    """Every candidate of the table, the fastest first."""


def explain(costs: CostModel, table: Table, shape: Shape) -> Explanation:
    """Explain ``table`` at ``shape`` by the measurements that it was fitted on.

    Raises :class:`mla_tune.errors.FitError` if ``costs`` lacks a candidate of the table.
    """
    conditions = costs.observations.conditions
    where = scope(SiteName(table.site), MODELS[table.model], table.layer, table.h_q, table.engine, conditions)
    explained = (_candidate(costs, where, name, shape) for name in table.candidates)
    return Explanation(
        shape=shape,
        decision=Decision(table).explain(shape.num_qo_tokens, shape.kv_tokens, shape.num_reqs),
        unit="forward" if table.layer == FORWARD else "layer",
        candidates=tuple(sorted(explained, key=lambda c: (c.total_us, c.candidate))),
    )


def _candidate(costs: CostModel, where: Scope, name: str, shape: Shape) -> CandidateExplanation:
    works = [work(site, [shape]) for site, _ in where.parts]
    lines: list[StageCost] = []
    for (site, layers), load in zip(where.parts, works, strict=True):
        path = costs.costs(where.launched(site, name, costs), name)
        lines += _in_running_order(path.breakdown(load, shares(where.model, site), layers), site, name)
    total_us = float(where.predicted_us(costs, name, works)[0])
    return CandidateExplanation(
        candidate=name,
        stages=tuple(lines),
        correction=total_us / float(np.sum([line.latency_us for line in lines])),
        total_us=total_us,
        measured_us=None if costs.modelled else where.measured_us(costs.observations, name, shape),
    )


def _in_running_order(lines: list[StageCost], site: Site, candidate: str) -> list[StageCost]:
    """The lines of one site as the candidate's stages run: those of a whole forward first."""
    order = {stage.name: index for index, stage in enumerate(stages(site, candidate))}
    return sorted(lines, key=lambda line: order.get(line.stage, len(order)))
