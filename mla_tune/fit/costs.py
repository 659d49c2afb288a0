"""Predicted cost of every candidate at any shape: stage curves added up, then corrected by the timed whole paths."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mla_tune.errors import FitError
from mla_tune.fit.bases import Chip, basis, whole_path_coordinates
from mla_tune.fit.curves import Correction, Curve, fit_correction, fit_curve
from mla_tune.fit.observations import Observations, Shares, group
from mla_tune.fit.work import Array, Work, work
from mla_tune.hardware.datasheet import architecture
from mla_tune.hardware.sku import Environment
from mla_tune.sites.candidates import stages
from mla_tune.sites.site import LayerType, Site
from mla_tune.sites.stages import Amortization, Stage
from mla_tune.store.limit_try import Try
from mla_tune.store.measurement import PER_FORWARD_TOTAL, PER_LAYER_TOTAL, Measurement, Regime

_TOTALS = {PER_LAYER_TOTAL: Amortization.PER_LAYER, PER_FORWARD_TOTAL: Amortization.PER_LAYER_TYPE}


@dataclass(frozen=True, slots=True)
class StageCost:
    """One line of a breakdown."""

    layer: LayerType
    stage: str
    amortization: Amortization
    provider: str
    """Whose kernel runs it; see :meth:`mla_tune.sites.stages.Stage.run_by`."""
    latency_us: float
    """The share that is paid, before the whole-path correction: per layer, or per forward for a whole forward."""


@dataclass(frozen=True, slots=True, eq=False)
class PathCosts:
    """The stages that one whole timing covers, and how far their sum is from it."""

    stages: tuple[tuple[Stage, Curve], ...]
    correction: Correction | None

    def latencies_us(self, work: Work) -> list[tuple[Stage, Array]]:
        """Predicted latency of each stage, microseconds, (num_shapes,)."""
        return [(stage, curve.latency_us(work)) for stage, curve in self.stages]

    @property
    def error(self) -> float:
        """Mean absolute leave-one-out error of the logarithm of this path's prediction."""
        if self.correction is not None:
            return self.correction.error
        return max(curve.correction.error for _, curve in self.stages)

    def error_at(self, work: Work) -> Array:
        """(num_shapes,) the same for predictions at these shapes."""
        if self.correction is not None:
            return self.correction.error_at(whole_path_coordinates(work))
        return np.asarray(np.max([curve.error_at(work) for _, curve in self.stages], axis=0))

    def factor(self, work: Work) -> Array:
        """Measured whole over the sum of the stages, (num_shapes,)."""
        if self.correction is None:
            return np.ones_like(work.num_qo_tokens)
        return np.asarray(np.exp(self.correction.log_factor(whole_path_coordinates(work))))


@dataclass(frozen=True, slots=True, eq=False)
class CandidateCosts:
    """Everything learned about one candidate at one site."""

    site: Site
    candidate: str
    paths: tuple[PathCosts, ...]
    """Per-layer stages first, if there are any."""

    @property
    def error(self) -> float:
        """What a prediction between the measured points is off by, relative: that of the path which dominates."""
        return self.paths[0].error

    def error_at(self, work: Work) -> Array:
        """(num_shapes,) what a prediction at these shapes is off by, relative, by the measured points around each."""
        return self.paths[0].error_at(work)

    def amortized_us(self, work: Work, share: Shares) -> Array:
        """Predicted cost per layer, microseconds, (num_shapes,)."""
        total = np.zeros_like(work.num_qo_tokens)
        for amortization, latency_us in _by_amortization(self, work):
            total += latency_us * share.of(amortization)
        return total

    def breakdown(self, work: Work, share: Shares, layers: int) -> list[StageCost]:
        """The stages of ``layers`` layers at one shape, before the whole-path correction."""
        return [
            StageCost(
                self.site.layer,
                stage.name,
                stage.amortization,
                stage.run_by(self.site),
                float(latency_us[0]) * share.of(stage.amortization) * layers,
            )
            for path in self.paths
            for stage, latency_us in path.latencies_us(work)
        ]


# A layer's own table and that of the forward ask for the same shapes, as do models that share a site.
@lru_cache(maxsize=32)
def _by_amortization(costs: CandidateCosts, work: Work) -> tuple[tuple[Amortization, Array], ...]:
    """Whole-path latency of one candidate, microseconds, split by how often it is paid."""
    totals = {amortization: np.zeros_like(work.num_qo_tokens) for amortization in Amortization}
    for path in costs.paths:
        factor = path.factor(work)
        for stage, latency_us in path.latencies_us(work):
            totals[stage.amortization] += factor * latency_us
    return tuple(totals.items())


class CostModel:
    """Cost curves of every site that was measured in one environment, fitted on the fit points alone."""

    modelled = False
    """Whether the curves are of another GPU than the observations; see :class:`mla_tune.fit.modelled.ModelledCosts`."""

    def __init__(
        self,
        environment: Environment,
        measurements: Iterable[Measurement],
        tries: Iterable[Try] = (),
        regime: Regime | None = None,
    ) -> None:
        self.environment = environment
        self.observations = Observations(measurements, tries, regime, architecture(environment.sku))
        self._fitted: dict[tuple[Site, str], CandidateCosts] = {}

    @property
    def architecture(self) -> str | None:
        """Of the GPU that the curves are of; see :func:`mla_tune.hardware.datasheet.architecture`."""
        return architecture(self.environment.sku)

    def candidates(self, site: Site) -> tuple[str, ...]:
        """Candidates that ran at this site, sorted."""
        return self.observations.candidates(site)

    def costs(self, site: Site, candidate: str) -> CandidateCosts:
        """Curves of one candidate; fitted at the first call. Raises :class:`FitError` if it never ran."""
        key = (site, candidate)
        if key not in self._fitted:
            if candidate not in self.candidates(site):
                raise FitError(
                    f"a candidate needs a successful fit point: {candidate} has none at {site.key}; "
                    f"accepted: {', '.join(self.candidates(site)) or 'none'}; next: sweep the site again"
                )
            self._fitted[key] = self._fit(site, candidate)
        return self._fitted[key]

    def _fit(self, site: Site, candidate: str) -> CandidateCosts:
        totals = [name for name in _TOTALS if group(site, candidate, name)]
        return CandidateCosts(site, candidate, tuple(self._fit_path(site, candidate, name) for name in totals))

    def _fit_path(self, site: Site, candidate: str, total: str) -> PathCosts:
        names = group(site, candidate, total)
        members = tuple(s for s in stages(site, candidate) if s.name in names)
        if not all(self.observations.latencies(site, candidate, stage.name)[0] for stage in members):
            # The whole was timed and a stage was not: the whole has a curve of its own.
            members = (Stage(total, _TOTALS[total]),)
        path = PathCosts(tuple((stage, self._fit_stage(site, candidate, stage)) for stage in members), None)
        shapes, measured_us = self.observations.latencies(site, candidate, total)
        if len(members) == 1 and members[0].name != total and not self._timed_apart(site, candidate, total):
            return path
        loads = work(site, shapes)
        predicted_us = sum((us for _, us in path.latencies_us(loads)), np.zeros(len(shapes)))
        ratios = np.log(np.array(measured_us) / predicted_us)
        return PathCosts(path.stages, fit_correction(whole_path_coordinates(loads), ratios))

    def _timed_apart(self, site: Site, candidate: str, total: str) -> bool:
        """Whether the whole path has timings of its own, rather than those of its only stage."""
        shapes, _ = self.observations.latencies(site, candidate, total)
        return any(
            (m := self.observations.part(site, candidate, shape, total)) is not None and m.part == total
            for shape in shapes
        )

    def _fit_stage(self, site: Site, candidate: str, stage: Stage) -> Curve:
        shapes, latencies_us = self.observations.latencies(site, candidate, stage.name)
        stage_basis = basis(site, stage.law, Chip(max(self.environment.sm_count, 1), architecture=self.architecture))
        return fit_curve(stage_basis, work(site, shapes), np.array(latencies_us))
