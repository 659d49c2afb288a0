"""Cost curves: a physical law with non-negative coefficients, times a local correction.

The law is fitted by relative least squares and carries the curve where nothing was measured. The correction
interpolates what the law misses (logarithm of measured over law) between the measured points, and fades away from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve, cholesky
from scipy.linalg.lapack import dtrtri
from scipy.optimize import nnls

from mla_tune.fit.bases import Basis
from mla_tune.fit.prediction_error import PredictionError, distances, prediction_error
from mla_tune.fit.work import Array, Mask, Work

_RANGES_OCTAVES = (0.5, 2.0, 8.0)
"""Distances over which a correction may fade by 1/e; leave-one-out error picks one."""
_NUGGETS = (0.01, 0.1, 1.0)
"""Variances of the noise, relative to that of the correction, to pick from in the same way."""
_BREAK_GAIN = 0.5
"""A break must at least halve the mean error of the law, else the law stays in one piece."""
_BREAK_ERROR = 0.05
"""A law that is off by less than this in the mean has no break worth a second piece."""
_APART_OCTAVES = 64.0
"""Distance put between the two sides of a break: so far that they never correct each other."""


@dataclass(frozen=True, slots=True)
class Smoothness:
    """How a correction interpolates."""

    range_octaves: float
    nugget: float


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """Interpolated logarithms of measured over predicted (kriging with an exponential covariance)."""

    points: Array
    """(num_points, num_axes), octaves."""
    weights: Array
    """(num_points,); empty for no correction."""
    smoothness: Smoothness | None
    """None for no correction."""

    def log_factor(self, coordinates: Sequence[Array]) -> Array:
        """Logarithm of the correction, (num_shapes,)."""
        where = np.stack(coordinates, axis=1)
        if self.smoothness is None:
            return np.zeros(len(where))
        if where.shape[1] == 1:  # many shapes share the one variable of a simple stage
            unique, inverse = np.unique(where[:, 0], return_inverse=True)
            return self._at(unique[:, None], self.smoothness)[inverse]
        return self._at(where, self.smoothness)

    def _at(self, where: Array, smoothness: Smoothness) -> Array:
        # einsum, not a matrix product: its order of summation does not depend on the BLAS at hand.
        covariance = _covariance(distances(where, self.points), smoothness)
        return np.asarray(np.einsum("ij,j->i", covariance, self.weights))


def fit_correction(coordinates: Sequence[Array], log_ratios: Array) -> Correction:
    """The correction whose leave-one-out error is least; none at all if that is no better than doing nothing."""
    points = np.stack(coordinates, axis=1)
    best, least = Correction(points, np.zeros(0), None), float(np.abs(log_ratios).mean())
    if len(points) < 3:
        return best
    apart = distances(points, points)
    for smoothness in (Smoothness(octaves, nugget) for octaves in _RANGES_OCTAVES for nugget in _NUGGETS):
        # With K = L L^T: weights are K^-1 times the ratios, and one left out is off by its weight over K^-1's diagonal.
        inverse, _ = dtrtri(cholesky(_noisy(apart, smoothness), lower=True, check_finite=False), lower=1)
        weights = np.einsum("ij,i->j", inverse, np.einsum("ij,j->i", inverse, log_ratios))
        error = float(np.abs(weights / (inverse**2).sum(axis=0)).mean())
        if error < least * (1 - 1e-9):
            best, least = Correction(points, weights, smoothness), error
    return best


def smooth_correction(coordinates: Sequence[Array], log_ratios: Array, smoothness: Smoothness | None) -> Correction:
    """The correction of these points with a smoothness that is known."""
    points = np.stack(coordinates, axis=1)
    if smoothness is None or len(points) < 3:
        return Correction(points, np.zeros(0), None)
    factor = cho_factor(_noisy(distances(points, points), smoothness), check_finite=False)
    weights = np.asarray(cho_solve(factor, log_ratios, check_finite=False), dtype=np.float64)
    return Correction(points, weights, smoothness)


def _covariance(octaves: Array, smoothness: Smoothness) -> Array:
    return np.asarray(np.exp(-octaves / smoothness.range_octaves))


def _noisy(octaves: Array, smoothness: Smoothness) -> Array:
    return _covariance(octaves, smoothness) + smoothness.nugget * np.eye(len(octaves))


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """Predicted latency of one stage."""

    basis: Basis
    coefficients: tuple[float, ...]
    """Microseconds per unit of each term; after a break the terms count a second time with coefficients of their own."""
    break_at: float | None
    """Query tokens above which the second set of coefficients applies in addition."""
    floor_us: float
    correction: Correction

    def latency_us(self, work: Work) -> Array:
        """Predicted latency, microseconds, (num_shapes,)."""
        law_us = _law_us(terms_of(self.basis, work, self.break_at), self.coefficients, self.floor_us)
        us = law_us * np.exp(self.correction.log_factor(_coordinates(self.basis, work, self.break_at)))
        return np.asarray(us if self.basis.runs is None else us * self.basis.runs(work))

    def without(self, work: Work, latencies_us: Array, left_out: Mask) -> Curve:
        """The curve that the same points give without some: another law, and another correction as smooth as this one."""
        kept = _where_it_runs(self.basis, work.where(~left_out), latencies_us[~left_out])
        return _fit(self.basis, *kept, self.correction.smoothness)

    def error(self, work: Work, latencies_us: Array, left_out: Sequence[Mask]) -> PredictionError:
        """Errors at the points that it was fitted on, each predicted without the fold that it is in."""
        errors = np.zeros(len(latencies_us))
        for fold in left_out:
            predicted_us = self.without(work, latencies_us, fold).latency_us(work.where(fold))
            errors[fold] = log_ratio(predicted_us, latencies_us[fold])
        return prediction_error(self.basis.coordinates(work), errors, left_out)


def fit_curve(basis: Basis, work: Work, latencies_us: Array) -> Curve:
    """Fit one stage. ``latencies_us`` (num_shapes,) are measured, positive and at least one."""
    return _fit(basis, *_where_it_runs(basis, work, latencies_us))


def _where_it_runs(basis: Basis, work: Work, latencies_us: Array) -> tuple[Work, Array]:
    """What was timed where the stage does not run is noise, and is left out as long as there is anything else."""
    if basis.runs is not None and (ran := basis.runs(work) > 0).any() and not ran.all():
        return work.where(ran), latencies_us[ran]
    return work, latencies_us


def _fit(basis: Basis, work: Work, latencies_us: Array, *known: Smoothness | None) -> Curve:
    """``known`` is the smoothness of the correction; without it the best one is looked for."""
    floor_us = float(latencies_us.min()) / 2
    break_at, coefficients = _fit_law(basis, work, latencies_us, floor_us)
    law_us = _law_us(terms_of(basis, work, break_at), coefficients, floor_us)
    where, log_ratios = _coordinates(basis, work, break_at), np.log(latencies_us / law_us)
    correction = smooth_correction(where, log_ratios, *known) if known else fit_correction(where, log_ratios)
    return Curve(basis, coefficients, break_at, floor_us, correction)


def _fit_law(basis: Basis, work: Work, latencies_us: Array, floor_us: float) -> tuple[float | None, tuple[float, ...]]:
    def attempt(break_at: float | None) -> tuple[float, tuple[float, ...]]:
        terms = terms_of(basis, work, break_at)
        coefficients = fit_nonnegative(terms, latencies_us)
        return float(np.abs(np.log(latencies_us / _law_us(terms, coefficients, floor_us))).mean()), coefficients

    whole_error, whole = attempt(None)
    if not basis.may_break or whole_error < _BREAK_ERROR:
        return None, whole
    counts = np.unique(work.num_qo_tokens)
    # Between two measured counts the break could be anywhere: halfway on the logarithmic axis.
    broken = [(*attempt(float(middle)), float(middle)) for middle in np.sqrt(counts[1:-2] * counts[2:-1])]
    if not broken:
        return None, whole
    error, coefficients, break_at = min(broken, key=lambda fit: (fit[0], fit[2]))
    return (break_at, coefficients) if error < _BREAK_GAIN * whole_error else (None, whole)


def fit_nonnegative(terms: Sequence[Array], latencies_us: Array) -> tuple[float, ...]:
    """Non-negative coefficients of least relative squared error."""
    columns = np.stack([term / latencies_us for term in terms], axis=1)
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    solution, _ = nnls(columns / scale, np.ones(len(columns)))
    return tuple(float(value) for value in solution / scale)


def log_ratio(predicted_us: Array, measured_us: Array) -> Array:
    """(num_shapes,) logarithm of predicted over measured; 0 where the prediction is that nothing runs."""
    runs = predicted_us > 0
    return np.asarray(np.log(np.where(runs, predicted_us / measured_us, 1.0)))


def _law_us(terms: Sequence[Array], coefficients: tuple[float, ...], floor_us: float) -> Array:
    law_us = np.zeros_like(terms[0])
    for term, coefficient in zip(terms, coefficients, strict=True):
        law_us += coefficient * term
    return np.maximum(law_us, floor_us)


def terms_of(basis: Basis, work: Work, break_at: float | None) -> list[Array]:
    """The terms of a law, each (num_shapes,); with a break, each a second time for the shapes above it."""
    terms = basis.terms(work)
    if break_at is None:
        return terms
    above = (work.num_qo_tokens > break_at).astype(np.float64)
    return terms + [term * above for term in terms]


def _coordinates(basis: Basis, work: Work, break_at: float | None) -> list[Array]:
    axes = basis.coordinates(work)
    if break_at is None:
        return axes
    return [*axes, _APART_OCTAVES * (work.num_qo_tokens > break_at).astype(np.float64)]
