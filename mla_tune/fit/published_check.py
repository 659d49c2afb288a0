"""A model against published figures: predicted, published, ratio, and whether the stated uncertainty holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, log

from mla_tune.fit.costs import CostModel
from mla_tune.fit.modelled import ModelledCosts
from mla_tune.fit.published import LaunchCount, Published
from mla_tune.fit.work import work
from mla_tune.hardware.datasheet import datasheet


@dataclass(frozen=True, slots=True)
class Checked:
    """One published figure and what the curves say of it."""

    published: Published
    predicted_ms: float | None
    """None where no stage covers it, or where the stage was not measured."""
    uncertainty: float
    """Of the prediction, as a logarithm: that of its stages, weighted by their time."""

    @property
    def ratio(self) -> float | None:
        """Predicted over published."""
        return None if self.predicted_ms is None else self.predicted_ms / self.published.published_ms

    @property
    def inside(self) -> bool | None:
        """Whether the published figure lies within the stated uncertainty; None without a prediction."""
        return None if self.ratio is None else exp(-self.uncertainty) <= self.ratio <= exp(self.uncertainty)

    @property
    def off(self) -> float:
        """Distance from the published figure, as a logarithm; 0 without a prediction."""
        return 0.0 if self.ratio is None else abs(log(self.ratio))


def check(measured: CostModel, figures: Iterable[Published]) -> tuple[Checked, ...]:
    """``figures`` in their order, each against the curves of ``measured`` scaled to its GPU.

    On the measured GPU itself the curves are as they were fitted. Raises :class:`mla_tune.errors.UsageError` for a GPU
    without a datasheet.
    """
    found: dict[tuple[str, bool], ModelledCosts] = {}
    checked = []
    for figure in figures:
        kind = (figure.sku, figure.always_splits)
        if kind not in found:
            found[kind] = ModelledCosts(measured, datasheet(figure.sku), always_splits=figure.always_splits)
        checked.append(_checked(found[kind], figure))
    return tuple(checked)


def _checked(costs: ModelledCosts, figure: Published) -> Checked:
    parts = [_predicted(costs, launches) for launches in figure.launches]
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return Checked(figure, None, 0.0)
    total_us = sum(us for us, _ in known)
    return Checked(figure, total_us / 1e3, sum(us * error for us, error in known) / total_us)


def _predicted(costs: ModelledCosts, launches: LaunchCount) -> tuple[float, float] | None:
    """Microseconds of all launches, and the uncertainty of their stage; None where it was not measured."""
    if launches.candidate.name not in costs.candidates(launches.site):
        return None
    stage = costs.stages(launches.site, launches.candidate.name).get(launches.stage)
    if stage is None:
        return None
    us = float(stage.curve.latency_us(work(launches.site, [launches.shape]))[0])
    return us * launches.count, stage.measured_error + stage.doubt
