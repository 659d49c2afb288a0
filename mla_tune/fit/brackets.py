"""Evidence stored with each threshold: the bracket that holds every crossing, and the win at its edges.

A row's thresholds follow the context, so everything here is a factor on the threshold: at ``0.8`` a shape has four fifths
of the query tokens at which its row switches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mla_tune.fit.costs import CostModel
from mla_tune.fit.scope import Scope
from mla_tune.fit.work import Array, work
from mla_tune.policy.evidence import RowEvidence, ThresholdEvidence
from mla_tune.policy.schema import Row
from mla_tune.sites.shape import Shape

_BEYOND = 4.0
"""How far beyond the measured query tokens a crossover is looked for, as a factor: the curves' laws carry no further."""


@dataclass(frozen=True, slots=True, eq=False)
class Brackets:
    """The shapes of one table with their predicted costs."""

    names: tuple[str, ...]
    costs: CostModel
    scope: Scope
    shapes: tuple[Shape, ...]
    log_us: Array
    """(num_candidates, num_shapes) logarithm of the predicted cost."""
    noise_band: float

    def row(self, row: Row, num_reqs_end: int | None, kv_tokens_end: int) -> RowEvidence:
        """Evidence of ``row``, which serves up to these ends."""
        near = _Near(row, num_reqs_end, kv_tokens_end)
        thresholds = tuple(self._threshold(near, index) for index in range(1, len(row.choices)))
        return RowEvidence(
            num_reqs_from=row.num_reqs_from,
            kv_tokens_from=row.kv_tokens_from,
            censored=None if thresholds else self._censored(near, self.names.index(row.choices[0].candidate)),
            thresholds=thresholds,
        )

    def _threshold(self, near: _Near, choice: int) -> ThresholdEvidence:
        before, after = (self.names.index(near.row.choices[index].candidate) for index in (choice - 1, choice))
        inside = near.around(self.shapes, choice)
        factors = near.factors(self.shapes, choice)[inside]
        gains = (self.log_us[before] - self.log_us[after])[inside]
        bracket = _bracket(factors, gains, float(np.log1p(self.noise_band)))
        return ThresholdEvidence(
            bracket=bracket,
            win=(
                _win(-gains[(factors <= bracket[0]) & (factors >= bracket[0] / 2)]),
                _win(gains[(factors >= bracket[1]) & (factors <= bracket[1] * 2)]),
            ),
        )

    def _censored(self, near: _Near, winner: int) -> str | None:
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
            log_us = log_predicted(self.costs, self.scope, self.names, beyond).mean(axis=1)
            if log_us[winner] - log_us.min() > np.log1p(self.noise_band):
                return word
        return None


@dataclass(frozen=True, slots=True)
class _Near:
    """Which shapes a row serves, and where they lie relative to its thresholds."""

    row: Row
    num_reqs_end: int | None
    kv_tokens_end: int | None

    def covers(self, shapes: Sequence[Shape]) -> npt.NDArray[np.bool_]:
        """(num_shapes,) whether each is in the row."""
        reqs, kv = [s.num_reqs for s in shapes], [s.kv_tokens for s in shapes]
        return _within(reqs, self.row.num_reqs_from, self.num_reqs_end) & _within(
            kv, self.row.kv_tokens_from, self.kv_tokens_end
        )

    def factors(self, shapes: Sequence[Shape], choice: int) -> Array:
        """(num_shapes,) query tokens over the threshold of a choice, an index, at each shape's context."""
        threshold = self.row.choices[choice].threshold
        return np.array([shape.num_qo_tokens / max(threshold.at(shape.kv_tokens), 1) for shape in shapes])

    def around(self, shapes: Sequence[Shape], choice: int) -> npt.NDArray[np.bool_]:
        """Shapes of the row from the threshold of the choice before up to that of the one behind."""
        mask = self.covers(shapes)
        if choice > 1:
            mask &= self.factors(shapes, choice - 1) >= 1
        if choice + 1 < len(self.row.choices):
            mask &= self.factors(shapes, choice + 1) < 1
        return mask


def _within(values: Sequence[int], start: int, end: int | None) -> npt.NDArray[np.bool_]:
    array = np.array(values)
    return np.asarray((array >= start) & (array < (np.inf if end is None else end)))


def _scaled(shape: Shape, factor: float) -> Shape | None:
    """``shape`` with ``factor`` times its query tokens; None where no forward has that many."""
    tokens = round(shape.num_qo_tokens * factor)
    return Shape(shape.num_reqs, tokens, shape.kv_tokens) if shape.num_reqs <= tokens <= shape.kv_tokens else None


def log_predicted(costs: CostModel, scope: Scope, names: Sequence[str], shapes: Sequence[Shape]) -> Array:
    """(num_candidates, num_shapes) logarithm of predicted microseconds."""
    works = [work(site, shapes) for site, _ in scope.parts]
    return np.asarray(np.log(np.stack([scope.predicted_us(costs, name, works) for name in names])))


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
