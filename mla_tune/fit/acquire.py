"""Where to measure next: the shapes at which a wrong choice is likely and would cost most.

At every shape of a grid the gain of the winner over the runner-up is predicted (logarithm of the ratio of their costs),
and how far that prediction may be off: by the errors at points that the curves had not seen, the more the farther the
nearest measured shape lies (:mod:`mla_tune.fit.prediction_error`). Were the error normal, the choice would lose

    sigma * pdf(gain / sigma) - gain * cdf(-gain / sigma)

on average (the expected opportunity loss of a selection between two normal means). It is largest around the crossovers
that are known least, and falls everywhere as measurements come in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from mla_tune.fit.costs import CostModel
from mla_tune.fit.interval import LEAST_DIFFERENCE
from mla_tune.fit.observations import shares
from mla_tune.fit.refine import engine_choices
from mla_tune.fit.work import Array, work
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import ModelConfig, Site

SETTLED = 0.75 * LEAST_DIFFERENCE
"""Expected loss below which another measurement is not worth its time: less than what two processes differ by anyway.

By replay of an H200's measurements: with 1.0 of that 214 points, after which the worst choice elsewhere costs 1.118; with
0.75 249 points and 1.058; with 0.5 269 points and 1.058."""
_DEVIATION = float(np.sqrt(np.pi / 2))
"""Standard deviation of a normal error over its mean absolute value."""
_TOLD_OCTAVES = 1.0
"""A shape that is going to be measured leaves less doubt around it, up to this far."""
_REQUESTS_OCTAVE = 0.5
"""Octaves of requests that count like one of query tokens: costs depend on them less."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """A shape, and what the choice there is expected to lose."""

    site: Site
    shape: Shape
    expected_loss: float
    """Mean of the logarithm of the slowdown, times the weight of the shape."""


def doubts(
    costs: CostModel,
    model: ModelConfig,
    site: Site,
    shapes: Sequence[Shape],
    count: int,
    weights: Array | float = 1.0,
) -> list[Doubt]:
    """The ``count`` most doubtful of ``shapes``, none twice or beside another; fewer where the rest is settled.

    ``weights`` (num_shapes,), of mean 1, are how much a loss at each shape counts.
    """
    names = costs.candidates(site)
    if not any(engine_choices(costs, site)) or not shapes:
        return []
    gains = _gains(costs, model, site, shapes)
    errors = np.stack([costs.costs(site, name).error_at(work(site, shapes)) for name in names])
    scale = _DEVIATION * np.maximum(np.sqrt((np.sort(errors, axis=0)[-2:] ** 2).sum(axis=0)), LEAST_DIFFERENCE)
    places, chosen = _places(shapes), _places([])
    found: list[Doubt] = []
    while len(found) < count:
        told = np.sqrt(np.minimum(_nearest(places, chosen) / _TOLD_OCTAVES, 1.0))
        sigma = scale * told + LEAST_DIFFERENCE / 4
        loss = weights * _expected_loss(gains, sigma)
        index = int(loss.argmax())
        if loss[index] < SETTLED:
            break
        found.append(Doubt(site, shapes[index], float(loss[index])))
        chosen = np.vstack([chosen, places[index : index + 1]])
    return found


def _gains(costs: CostModel, model: ModelConfig, site: Site, shapes: Sequence[Shape]) -> Array:
    """(num_shapes,) logarithm of the runner-up's predicted cost over the winner's, for the engine with the closest call."""
    load, share = work(site, shapes), shares(model, site)
    gains = []
    for names in engine_choices(costs, site):
        us = np.stack([costs.costs(site, name).amortized_us(load, share) for name in names])
        ordered = np.sort(np.log(us), axis=0)
        gains.append(ordered[1] - ordered[0])
    return np.asarray(np.min(gains, axis=0))


def _expected_loss(gains: Array, sigma: Array) -> Array:
    z = gains / sigma
    density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    return np.asarray(sigma * density - gains * ndtr(-z))


def _places(shapes: Sequence[Shape]) -> Array:
    """(num_shapes, 3) octaves of query tokens, context of a request, and requests."""
    rows = [(s.num_qo_tokens, s.kv_tokens / s.num_reqs, s.num_reqs**_REQUESTS_OCTAVE) for s in shapes]
    return np.log2(np.array(rows, dtype=np.float64).reshape(len(rows), 3))


def _nearest(places: Array, known: Array) -> Array:
    """(num_shapes,) octaves to the nearest of the places ``known``; infinite without any."""
    if not len(known):
        return np.full(len(places), np.inf)
    squared = ((places[:, None, :] - known[None, :, :]) ** 2).sum(axis=2)
    return np.asarray(np.sqrt(squared.min(axis=1)))
