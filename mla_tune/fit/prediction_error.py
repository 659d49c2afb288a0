"""How far a prediction may be off: errors at points that neither the law nor the correction had seen, and how they grow.

Points are left out in folds, and what each was off by is taken as the error at its distance from the nearest point that was
kept. From there it grows with the distance to shapes that nobody measured, without an end: far from every point nothing is
known, so the error is largest there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mla_tune.fit.work import Array, Mask

FOLDS = 8
_NEAR_OCTAVES = 1.0
"""Distance over which the error of one point says something of another."""
_LEAST_STEP_OCTAVES = 0.25
"""A prediction nearer than this to a point is no better than here: timings of two processes differ."""
_GROWTH = 0.25
"""Exponent of the growth with the distance: above 0, so that it never stops. Of the committed exports' own, SGLang's and
the CPU's, what is claimed at the held-out points is 1.20, 0.85 and 1.10 times what they show, at the median over the
candidates; with the 0.5 of a random walk 1.25, 0.96 and 1.24."""
_UNKNOWN = 1.0
"""Error where no point can be left out, since there is but one: a factor of e both ways, which nothing wins against."""


def folds(count: int) -> list[Mask]:
    """Masks of the points to leave out, each (count,): every point once, :data:`FOLDS` at most, neighbours apart."""
    rank = np.arange(count) % min(FOLDS, count)
    return [rank == fold for fold in range(min(FOLDS, count))] if count > 1 else []


@dataclass(frozen=True, slots=True, eq=False)
class PredictionError:
    """Errors of predictions at left-out points."""

    points: Array
    """(num_points, num_axes), octaves."""
    errors: Array
    """(num_points,) absolute error of the logarithm."""
    steps: Array
    """(num_points,) octaves from each to the nearest point that its prediction was made from."""
    doubt: float = 0.0
    """Added everywhere: what carrying the prediction to another GPU adds."""

    @property
    def mean(self) -> float:
        """Mean over the left-out points: what a prediction between the points is off by."""
        return float(self.errors.mean()) + self.doubt

    def at(self, coordinates: Sequence[Array]) -> Array:
        """(num_shapes,) expected absolute error there: by the errors around, and the distance to the nearest point."""
        where = np.stack(coordinates, axis=1)
        apart = distances(where, self.points)
        scale = self.errors / _growth(self.steps)
        weights = np.exp(-apart / _NEAR_OCTAVES)
        far = np.exp(-1.0)  # of nothing nearby the mean is known
        local = (np.einsum("ij,j->i", weights, scale) + far * scale.mean()) / (weights.sum(axis=1) + far)
        return np.asarray(local * _growth(apart.min(axis=1)) + self.doubt)

    def plus(self, doubt: float) -> PredictionError:
        """The same with ``doubt`` added everywhere."""
        return replace(self, doubt=self.doubt + doubt)


def prediction_error(coordinates: Sequence[Array], errors: Array, left_out: Sequence[Mask]) -> PredictionError:
    """``errors`` (num_points,) of predictions at each point while its fold of ``left_out`` was left out."""
    points = np.stack(coordinates, axis=1)
    if not left_out:
        return PredictionError(points, np.full(len(points), _UNKNOWN), np.ones(len(points)))
    apart, steps = distances(points, points), np.zeros(len(points))
    for fold in left_out:
        steps[fold] = apart[np.ix_(fold, ~fold)].min(axis=1)
    return PredictionError(points, np.abs(errors), steps)


def distances(a: Array, b: Array) -> Array:
    """(len(a), len(b)) distances between rows, octaves."""
    squared = np.zeros((len(a), len(b)))
    for axis in range(a.shape[1]):
        squared += (a[:, axis, None] - b[None, :, axis]) ** 2
    return np.asarray(np.sqrt(squared))


def _growth(octaves: Array) -> Array:
    return np.asarray(np.maximum(octaves, _LEAST_STEP_OCTAVES) ** _GROWTH)
