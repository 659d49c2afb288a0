"""Predicted cost of every candidate at any shape: stage curves added up, then corrected by the timed whole paths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mla_tune.errors import FitError
from mla_tune.fit.bases import Chip, basis, whole_path_coordinates
from mla_tune.fit.curves import Correction, Curve, fit_correction, fit_curve, log_ratio, smooth_correction
from mla_tune.fit.observations import Observations, Shares, group
from mla_tune.fit.prediction_error import PredictionError, folds, prediction_error
from mla_tune.fit.work import Array, Work, work
from mla_tune.hardware.datasheet import architecture
from mla_tune.hardware.sku import Environment
from mla_tune.sites.candidates import stages
from mla_tune.sites.shape import Shape
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
    error: PredictionError
    """What its predictions were off by, at points that were left out of every law and correction in it."""

    def latencies_us(self, work: Work) -> list[tuple[Stage, Array]]:
        """Predicted latency of each stage, microseconds, (num_shapes,)."""
        return [(stage, curve.latency_us(work)) for stage, curve in self.stages]

    def error_at(self, work: Work) -> Array:
        """(num_shapes,) absolute error of the logarithm to expect of predictions at these shapes."""
        return self.error.at(whole_path_coordinates(work))

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
        """What a prediction between the measured points is off by, as a logarithm: that of the path which dominates."""
        return self.paths[0].error.mean

    def error_at(self, work: Work) -> Array:
        """(num_shapes,) the same at these shapes: by the errors around each, the more the farther the nearest point."""
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
        self._stage_fits: dict[tuple[Site, str, Stage], _StageFit] = {}
        self._stage_errors: dict[tuple[Site, str, Stage], PredictionError] = {}

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
        parts = [self._stage_fit(site, candidate, stage) for stage in members]
        curves = tuple((stage, part.curve) for stage, part in zip(members, parts, strict=True))
        shapes, measured_us = self.observations.latencies(site, candidate, total)
        whole = _Whole(work(site, shapes), tuple(shapes), np.array(measured_us))
        alone = len(members) == 1 and members[0].name != total and not self._timed_apart(site, candidate, total)
        correction = None if alone else whole.correction([part.curve for part in parts])
        return PathCosts(curves, correction, whole.error(parts, correction))

    def _timed_apart(self, site: Site, candidate: str, total: str) -> bool:
        """Whether the whole path has timings of its own, rather than those of its only stage."""
        shapes, _ = self.observations.latencies(site, candidate, total)
        return any(
            (m := self.observations.part(site, candidate, shape, total)) is not None and m.part == total
            for shape in shapes
        )

    def _stage_fit(self, site: Site, candidate: str, stage: Stage) -> _StageFit:
        key = (site, candidate, stage)
        if key not in self._stage_fits:
            shapes, latencies_us = self.observations.latencies(site, candidate, stage.name)
            load, measured_us = work(site, shapes), np.array(latencies_us)
            stage_basis = basis(
                site, stage.law, Chip(max(self.environment.sm_count, 1), architecture=self.architecture)
            )
            self._stage_fits[key] = _StageFit(
                fit_curve(stage_basis, load, measured_us), load, tuple(shapes), measured_us
            )
        return self._stage_fits[key]

    def stage_error(self, site: Site, candidate: str, stage: Stage) -> PredictionError:
        """Errors of one stage's curve at points that were left out of it."""
        key = (site, candidate, stage)
        if key not in self._stage_errors:
            fitted = self._stage_fit(site, candidate, stage)
            left_out = folds(len(fitted.shapes))
            self._stage_errors[key] = fitted.curve.error(fitted.load, fitted.measured_us, left_out)
        return self._stage_errors[key]


@dataclass(frozen=True, slots=True, eq=False)
class _StageFit:
    """A stage's curve, and the points that it is made of."""

    curve: Curve
    load: Work
    shapes: tuple[Shape, ...]
    measured_us: Array

    def without(self, left_out: AbstractSet[Shape]) -> Curve:
        """The curve that no point of ``left_out`` is in; the curve itself where no point would be left."""
        mask = np.array([shape in left_out for shape in self.shapes])
        if mask.all() or not mask.any():
            return self.curve
        return self.curve.without(self.load, self.measured_us, mask)


@dataclass(frozen=True, slots=True, eq=False)
class _Whole:
    """Timings of a whole path."""

    load: Work
    shapes: tuple[Shape, ...]
    measured_us: Array

    def correction(self, curves: Iterable[Curve]) -> Correction:
        """From the sum of the stages to the whole."""
        return fit_correction(
            whole_path_coordinates(self.load), -log_ratio(_sum_us(curves, self.load), self.measured_us)
        )

    def error(self, parts: Sequence[_StageFit], correction: Correction | None) -> PredictionError:
        """Errors at every point, predicted by stages and a correction that know nothing of the fold that it is in."""
        where, left_out = whole_path_coordinates(self.load), folds(len(self.shapes))
        errors = np.zeros(len(self.shapes))
        for fold in left_out:
            hidden = {shape for shape, hide in zip(self.shapes, fold, strict=True) if hide}
            predicted_us = _sum_us([part.without(hidden) for part in parts], self.load)
            log_ratios = -log_ratio(predicted_us, self.measured_us)
            if correction is not None:
                kept = [axis[~fold] for axis in where]
                known = smooth_correction(kept, log_ratios[~fold], correction.smoothness)
                log_ratios[fold] -= known.log_factor([axis[fold] for axis in where])
            errors[fold] = log_ratios[fold]
        return prediction_error(where, errors, left_out)


def _sum_us(curves: Iterable[Curve], load: Work) -> Array:
    return np.asarray(sum((curve.latency_us(load) for curve in curves), np.zeros_like(load.num_qo_tokens)))
