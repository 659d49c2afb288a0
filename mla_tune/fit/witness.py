"""What speaks for a threshold: the bracket that holds every crossing, a confidence interval, the win at the edges.

A row's thresholds follow the context, so everything here is a factor on the threshold: at ``0.8`` a shape has four fifths
of the query tokens at which its row switches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mla_tune.fit.costs import CostModel
from mla_tune.fit.scope import Scope
from mla_tune.fit.segments import Segment
from mla_tune.fit.work import Array, work
from mla_tune.policy.schema import Choice, Row
from mla_tune.policy.threshold import Threshold
from mla_tune.sites.shape import Shape

_RESAMPLES = 400
"""Bootstrap replicates: the ends of a 95 % interval move by a tenth of its width at most from one seed to another."""
_SEED = 2025
_LOCAL = np.log(4.0)
"""How far from a threshold its costs count as near it: a factor of 4 in query tokens, where their ratio is a line."""
_LEAST_RESIDUALS = 4
"""Fewer measured points near a threshold say too little: then those of the whole table speak."""
_BEYOND = 4.0
"""How far beyond the measured query tokens a crossover is looked for, as a factor: the curves' laws carry no further."""

Ends = tuple[int, int | None]


@dataclass(frozen=True, slots=True, eq=False)
class Witnesses:
    """The shapes of one table with their predicted costs, and how far measured ones contradict these."""

    names: tuple[str, ...]
    costs: CostModel
    scope: Scope
    shapes: tuple[Shape, ...]
    log_us: Array
    """(num_candidates, num_shapes) logarithm of the predicted cost."""
    measured: tuple[Shape, ...]
    residuals: Array
    """(num_candidates, num_measured) logarithm of measured over predicted."""

    @classmethod
    def of(
        cls,
        costs: CostModel,
        scope: Scope,
        names: Sequence[str],
        predicted: tuple[Sequence[Shape], Array],
        measured: Sequence[tuple[Shape, Array]],
    ) -> Witnesses:
        """``predicted`` are shapes and (num_candidates, num_shapes) costs, ``measured`` fit points with every cost."""
        points = [shape for shape, _ in measured]
        log_measured = np.log(np.array([us for _, us in measured])).T.reshape(len(names), len(points))
        return cls(
            names=tuple(names),
            costs=costs,
            scope=scope,
            shapes=tuple(predicted[0]),
            log_us=np.log(predicted[1]),
            measured=tuple(points),
            residuals=log_measured - _log_predicted(costs, scope, names, points),
        )

    def row(self, segments: tuple[Segment, ...], reqs: Ends, kv_tokens: Ends, noise_band: float) -> Row:
        """The row with these segments; ``reqs`` and ``kv_tokens`` are where it starts and ends."""
        segments = _served(segments, kv_tokens)
        near = _Near(segments, reqs, kv_tokens)
        choices = [Choice(num_qo_tokens_from=0, candidate=self.names[segments[0].candidate])]
        choices += [self._choice(near, before, after, noise_band) for before, after in pairwise(segments)]
        censored = self._censored(near, segments[0].candidate, noise_band) if len(segments) == 1 else None
        return Row(num_reqs_from=reqs[0], kv_tokens_from=kv_tokens[0], censored=censored, choices=tuple(choices))

    def _choice(self, near: _Near, before: Segment, after: Segment, noise_band: float) -> Choice:
        inside = near.between(self.shapes, before, after)
        factors = near.factors(self.shapes, after)[inside]
        gains = (self.log_us[before.candidate] - self.log_us[after.candidate])[inside]
        margin = float(np.log1p(noise_band))
        bracket = _bracket(factors, gains, margin)
        return Choice(
            num_qo_tokens_from=after.first,
            num_qo_tokens_to=after.last if after.last != after.first else None,
            candidate=self.names[after.candidate],
            bracket=bracket,
            interval=self._interval(near, before, after, factors, gains),
            win=(
                _win(-gains[(factors <= bracket[0]) & (factors >= bracket[0] / 2)]),
                _win(gains[(factors >= bracket[1]) & (factors <= bracket[1] * 2)]),
            ),
        )

    def _interval(
        self, near: _Near, before: Segment, after: Segment, factors: Array, gains: Array
    ) -> tuple[float, float] | None:
        """Where the mean gain crosses zero, 95 %: it is a line near the threshold, moved by what timings said otherwise."""
        logs = np.log(factors)
        local = np.abs(logs) <= _LOCAL
        if len(np.unique(np.rint(logs[local] * 8))) < 3:
            return None
        slope, offset = np.polyfit(logs[local], gains[local], 1)
        residuals = self.residuals[before.candidate] - self.residuals[after.candidate]
        here = near.covers(self.measured) & (np.abs(np.log(near.factors(self.measured, after))) <= 2 * _LOCAL)
        if here.sum() >= _LEAST_RESIDUALS:
            residuals = residuals[here]
        if slope <= 0 or not residuals.size:
            return None
        random = np.random.default_rng(_SEED)
        picks = random.integers(0, residuals.size, (_RESAMPLES, residuals.size))
        crossings = np.exp(np.clip(-(offset + residuals[picks].mean(axis=1)) / slope, -_LOCAL, _LOCAL))
        low, high = np.percentile(crossings, (2.5, 97.5))
        return min(1.0, _floor(float(low))), max(1.0, _ceil(float(high)))

    def _censored(self, near: _Near, winner: int, noise_band: float) -> str | None:
        """Whether another candidate overtakes beyond the measured counts: ``above`` or ``below`` them."""
        inside = np.flatnonzero(near.covers(self.shapes))
        if not inside.size or len(self.names) < 2:
            return None
        tokens = np.array([self.shapes[i].num_qo_tokens for i in inside])
        for word, count, factor in (("above", tokens.max(), _BEYOND), ("below", tokens.min(), 1 / _BEYOND)):
            edge = [self.shapes[i] for i, t in zip(inside, tokens, strict=True) if t == count]
            beyond = [s for s in (_scaled(shape, factor) for shape in edge) if s is not None]
            if not beyond:
                continue
            log_us = _log_predicted(self.costs, self.scope, self.names, beyond).mean(axis=1)
            if log_us[winner] - log_us.min() > np.log1p(noise_band):
                return word
        return None


@dataclass(frozen=True, slots=True)
class _Near:
    """Which shapes a row serves, and where they lie relative to its thresholds."""

    segments: tuple[Segment, ...]
    reqs: Ends
    kv_tokens: Ends

    def covers(self, shapes: Sequence[Shape]) -> npt.NDArray[np.bool_]:
        """(num_shapes,) whether each is in the row."""
        reqs, kv = [s.num_reqs for s in shapes], [s.kv_tokens for s in shapes]
        return _within(reqs, self.reqs) & _within(kv, self.kv_tokens)

    def thresholds(self, shapes: Sequence[Shape], segment: Segment) -> Array:
        """(num_shapes,) query tokens at which ``segment`` begins at each shape's context."""
        start, end = self.kv_tokens[0], self.kv_tokens[1] or self.kv_tokens[0] + 1
        share = (np.array([s.kv_tokens for s in shapes], dtype=np.float64) - start) / (end - start)
        return np.maximum(segment.first + (segment.last - segment.first) * share, 1.0)

    def factors(self, shapes: Sequence[Shape], segment: Segment) -> Array:
        """(num_shapes,) query tokens over the threshold of ``segment``."""
        return np.array([s.num_qo_tokens for s in shapes]) / self.thresholds(shapes, segment)

    def between(self, shapes: Sequence[Shape], before: Segment, after: Segment) -> npt.NDArray[np.bool_]:
        """Shapes of the row from the threshold of ``before`` up to that which follows ``after``."""
        mask = self.covers(shapes)
        if before.first or before.last:
            mask &= self.factors(shapes, before) >= 1
        index = self.segments.index(after)
        if index + 1 < len(self.segments):
            mask &= self.factors(shapes, self.segments[index + 1]) < 1
        return mask


def _served(segments: tuple[Segment, ...], kv_tokens: Ends) -> tuple[Segment, ...]:
    """``segments`` with level thresholds, should rounding to integers make slanted ones pass each other in the row."""
    end = kv_tokens[1] or kv_tokens[0] + 1
    lines = [Threshold.through((kv_tokens[0], end), (s.first, s.last)) for s in segments]
    if not any(line.is_below(before, end) for before, line in pairwise(lines)):
        return segments
    return tuple(Segment(s.candidate, s.first, s.first) for s in segments)


def _within(values: Sequence[int], ends: Ends) -> npt.NDArray[np.bool_]:
    array = np.array(values)
    return (array >= ends[0]) & (array < (np.inf if ends[1] is None else ends[1]))


def _scaled(shape: Shape, factor: float) -> Shape | None:
    """``shape`` with ``factor`` times its query tokens; None where no forward has that many."""
    tokens = round(shape.num_qo_tokens * factor)
    return Shape(shape.num_reqs, tokens, shape.kv_tokens) if shape.num_reqs <= tokens <= shape.kv_tokens else None


def _log_predicted(costs: CostModel, scope: Scope, names: Sequence[str], shapes: Sequence[Shape]) -> Array:
    if not shapes:
        return np.zeros((len(names), 0))
    works = [work(site, shapes) for site, _ in scope.parts]
    return np.log(np.stack([scope.predicted_us(costs, name, works) for name in names]))


def _bracket(factors: Array, gains: Array, margin: float) -> tuple[float, float]:
    """The last factor below which every shape has clearly lost, and the first above which every one has clearly won.

    Between two counts of the grid a crossing could be anywhere, so the bracket reaches from one decided shape to the other.
    """
    first_doubt = min(factors[gains >= -margin], default=np.inf)
    last_doubt = max(factors[gains <= margin], default=0.0)
    low = max(factors[factors < first_doubt], default=min(first_doubt, 1.0))
    high = min(factors[factors > last_doubt], default=max(last_doubt, 1.0))
    return min(1.0, _floor(low)), max(1.0, _ceil(high))


def _win(gains: Array) -> float:
    """Mean relative win; 0 where no shape lies at the edge."""
    return round(float(np.expm1(gains.mean())), 3) if gains.size else 0.0


def _floor(value: float) -> float:
    return float(np.floor(value * 1000) / 1000)


def _ceil(value: float) -> float:
    return float(np.ceil(value * 1000) / 1000)
