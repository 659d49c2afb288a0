"""Predicted against measured time of forwards that a replay made and real kernels then ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mla_tune.fit.evaluation import rules
from mla_tune.fit.observations import Observations
from mla_tune.fit.scope import scope
from mla_tune.replay.prices import Pricer
from mla_tune.replay.rule_comparison import choices
from mla_tune.sites.shape import RaggedShape
from mla_tune.sites.site import FORWARD, SiteName


@dataclass(frozen=True, slots=True)
class Line:
    """One candidate at one forward: in the layers of one type, or in all of them."""

    shape: RaggedShape
    layer: str
    """A layer type, or ``forward`` for all layers."""
    candidate: str
    predicted_us: float
    measured_us: float | None
    """All layers of the type together, stages that layers share spread over them; None where it did not run."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How far predictions of one candidate at one layer type are from what was measured."""

    layer: str
    candidate: str
    forwards: int
    median: float
    """Predicted over measured."""
    p5: float
    p95: float


@dataclass(frozen=True, slots=True)
class RuleMeasured:
    """What one rule would have taken over the forwards at which every candidate ran."""

    rule: str
    measured_us: float
    slower_at: int
    """Forwards at which another single candidate was faster by more than the noise band."""
    worst: float
    """Largest measured slowdown against the fastest single candidate of a forward."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that a spot check found."""

    forwards: int
    complete: int
    """Forwards at which every candidate ran in every layer type."""
    lines: tuple[Line, ...]
    accuracy: tuple[Accuracy, ...]
    rules: tuple[RuleMeasured, ...]
    """Empty where no forward is complete."""


def compare(pricer: Pricer, observations: Observations, shapes: Sequence[RaggedShape]) -> Comparison:
    """``observations`` hold the measurements of ``shapes``, each filed under its three integers."""
    table, conditions = pricer.tables.attention, pricer.costs.observations.conditions
    prices = pricer.prices(shapes)
    lines: list[Line] = []
    whole = scope(SiteName.PREFILL_ATTENTION, pricer.model, FORWARD, table.h_q, conditions=conditions)
    for index, shape in enumerate(shapes):
        key = shape.evened()
        for layer, (site, count) in zip(prices.attention, pricer.sites, strict=True):
            alone = scope(SiteName.PREFILL_ATTENTION, pricer.model, site.layer, table.h_q, conditions=conditions)
            for row, name in enumerate(layer.candidates):
                us = alone.measured_us(observations, name, key)
                total_us = None if us is None else count * us
                lines.append(Line(shape, layer.layer, name, float(layer.total_us[row, index]), total_us))
        if len(pricer.sites) > 1:
            for name in table.candidates:
                predicted_us = float(prices.attention_of(name)[index])
                lines.append(Line(shape, FORWARD, name, predicted_us, whole.measured_us(observations, name, key)))
    measured = [
        [whole.measured_us(observations, name, shape.evened()) for name in table.candidates] for shape in shapes
    ]
    complete = [index for index, row in enumerate(measured) if None not in row]
    return Comparison(
        forwards=len(shapes),
        complete=len(complete),
        lines=tuple(lines),
        accuracy=_accuracy(lines),
        rules=_rules(pricer, [shapes[i] for i in complete], np.array([measured[i] for i in complete], dtype=float)),
    )


def _accuracy(lines: Sequence[Line]) -> tuple[Accuracy, ...]:
    found = []
    for layer, candidate in dict.fromkeys((line.layer, line.candidate) for line in lines):
        here = [line for line in lines if (line.layer, line.candidate) == (layer, candidate)]
        ratios = [line.predicted_us / line.measured_us for line in here if line.measured_us]
        if ratios:
            p5, median, p95 = (float(value) for value in np.percentile(ratios, [5, 50, 95]))
            found.append(Accuracy(layer, candidate, len(ratios), median, p5, p95))
    return tuple(found)


def _rules(
    pricer: Pricer, shapes: Sequence[RaggedShape], measured_us: np.typing.NDArray[np.float64]
) -> tuple[RuleMeasured, ...]:
    """``measured_us`` is (num_shapes, num_candidates)."""
    if not shapes:
        return ()
    table = pricer.tables.attention
    found = []
    for name, rule in rules(table):
        columns = [table.candidates.index(pick) for pick in choices(rule, shapes)]
        taken_us = measured_us[np.arange(len(shapes)), columns]
        slowdowns = taken_us / measured_us.min(axis=1)
        slower_at = int((slowdowns > 1 + pricer.tables.noise_band).sum())
        found.append(RuleMeasured(name, float(taken_us.sum()), slower_at, float(slowdowns.max())))
    return tuple(found)
