"""Cost curves: a physical law with non-negative coefficients, times a local correction.

The law is fitted by relative least squares and carries the curve where nothing was measured. The correction
interpolates what the law misses (logarithm of measured over law) between the measured points, and fades away from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mla_tune.fit.bases import Basis
from mla_tune.fit.work import Array, Work

_RANGES_OCTAVES = (0.5, 2.0, 8.0)
"""Distances over which a correction may fade by 1/e; leave-one-out error picks one."""
_ERROR_RANGE_OCTAVES = 1.0
"""Distance over which the error of one point says something of another."""
_NUGGETS = (0.01, 0.1, 1.0)
"""Variances of the noise, relative to that of the correction, to pick from in the same way."""
_BREAK_GAIN = 0.5
"""A break must at least halve the mean error of the law, else the law stays in one piece."""
_BREAK_ERROR = 0.05
"""A law that is off by less than this in the mean has no break worth a second piece."""
_APART_OCTAVES = 64.0
"""Distance put between the two sides of a break: so far that they never correct each other."""


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """Interpolated logarithms of measured over predicted (kriging with an exponential covariance)."""

    points: Array
    """(num_points, num_axes), octaves."""
    weights: Array
    """(num_points,); empty for no correction."""
    range_octaves: float
    error: float
    """Mean absolute leave-one-out error of the logarithm: what a prediction between the points is off by."""
    left_out: Array
    """(num_points,) that error of each point."""

    def error_at(self, coordinates: Sequence[Array]) -> Array:
        """(num_shapes,) absolute error of predictions there: that of the measured points around, the nearer the more."""
        where = np.stack(coordinates, axis=1)
        weights = _covariance(where, self.points, _ERROR_RANGE_OCTAVES)
        far = np.exp(-_ERROR_RANGE_OCTAVES)  # of nothing nearby the mean is known
        total = np.einsum("ij,j->i", weights, np.abs(self.left_out)) + far * self.error
        return np.asarray(total / (weights.sum(axis=1) + far))

    def log_factor(self, coordinates: Sequence[Array]) -> Array:
        """Logarithm of the correction, (num_shapes,)."""
        where = np.stack(coordinates, axis=1)
        if not self.weights.size:
            return np.zeros(len(where))
        if where.shape[1] == 1:  # many shapes share the one variable of a simple stage
            unique, inverse = np.unique(where[:, 0], return_inverse=True)
            return self._at(unique[:, None])[inverse]
        return self._at(where)

    def _at(self, where: Array) -> Array:
        # einsum, not a matrix product: its order of summation does not depend on the BLAS at hand.
        return np.asarray(np.einsum("ij,j->i", _covariance(where, self.points, self.range_octaves), self.weights))


def fit_correction(coordinates: Sequence[Array], log_ratios: Array) -> Correction:
    """The correction whose leave-one-out error is least; none at all if that is no better than doing nothing."""
    points = np.stack(coordinates, axis=1)
    least = float(np.abs(log_ratios).mean())
    best = Correction(points, np.zeros(0), _RANGES_OCTAVES[0], least, log_ratios)
    if len(points) < 3:
        return best
    for range_octaves in _RANGES_OCTAVES:
        covariance = _covariance(points, points, range_octaves)
        for nugget in _NUGGETS:
            inverse = np.linalg.inv(covariance + nugget * np.eye(len(points)))
            weights = np.einsum("ij,j->i", inverse, log_ratios)
            left_out = weights / np.diag(inverse)
            error = float(np.abs(left_out).mean())
            if error < least * (1 - 1e-9):
                best, least = Correction(points, weights, range_octaves, error, left_out), error
    return best


def _covariance(a: Array, b: Array, range_octaves: float) -> Array:
    squared = np.zeros((len(a), len(b)))
    for axis in range(a.shape[1]):
        squared += (a[:, axis, None] - b[None, :, axis]) ** 2
    return np.asarray(np.exp(-np.sqrt(squared) / range_octaves))


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

    def error_at(self, work: Work) -> Array:
        """(num_shapes,) absolute error of the logarithm of predictions there."""
        return self.correction.error_at(_coordinates(self.basis, work, self.break_at))


def fit_curve(basis: Basis, work: Work, latencies_us: Array) -> Curve:
    """Fit one stage. ``latencies_us`` (num_shapes,) are measured, positive and at least one.

    What was timed where the stage does not run is noise, and is left out as long as there is anything else.
    """
    if basis.runs is not None and (ran := basis.runs(work) > 0).any() and not ran.all():
        return fit_curve(basis, work.where(ran), latencies_us[ran])
    floor_us = float(latencies_us.min()) / 2
    break_at, coefficients = _fit_law(basis, work, latencies_us, floor_us)
    law_us = _law_us(terms_of(basis, work, break_at), coefficients, floor_us)
    correction = fit_correction(_coordinates(basis, work, break_at), np.log(latencies_us / law_us))
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
    """Non-negative coefficients of least relative squared error, exact: every set of terms is tried."""
    columns = np.stack([term / latencies_us for term in terms], axis=1)
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    best, least = tuple(0.0 for _ in terms), float(len(latencies_us)) + 1.0
    for size in range(1, len(terms) + 1):
        for chosen in map(list, combinations(range(len(terms)), size)):
            scaled = columns[:, chosen] / scale[chosen]
            solution = np.linalg.lstsq(scaled, np.ones(len(scaled)), rcond=None)[0]
            error = float(((np.einsum("ij,j->i", scaled, solution) - 1) ** 2).sum())
            if solution.min() >= 0 and error < least * (1 - 1e-9):
                full = np.zeros(len(terms))
                full[chosen] = solution / scale[chosen]
                best, least = tuple(map(float, full)), error
    return best


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
