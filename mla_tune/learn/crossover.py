"""Where the predicted costs cross: the rows of one table.

Every shape of the training grid is charged to its cell: the slowdown of each candidate there. A candidate other than the
incumbent counts as slower by the noise band, or by the error of the predictions where that is larger, so that it is
chosen only where its win is beyond doubt. Thresholds minimize the mean of that charge; a slowdown that would be felt
counts more than its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mla_tune.learn.costs import CostModel
from mla_tune.learn.scope import Scope
from mla_tune.learn.segments import COST_UNIT, Band, Cells, Segment, few_bands
from mla_tune.learn.training import QUERY_COUNTS, IntArray, bin_start, cells_of, training_grid
from mla_tune.learn.winner import overlapping
from mla_tune.learn.work import Array
from mla_tune.policy import Choice, Ineligible, Limit, Row
from mla_tune.shape import Shape
from mla_tune.store.measurement import Role

_FELT_SLOWDOWN = 1.1
_FELT_WEIGHT = 10.0
"""Beyond 1.1 each further unit of slowdown counts eleven times: a table answers for its worst shape as well as its mean."""
_MEASURED_WEIGHT = 4
"""Predicted shapes that a measured one outweighs: the sum is an estimate, and where a timing contradicts it, that wins."""
_MAX_CHARGE = 1000.0
"""Charge of a candidate that fails; bounds the sums to 64-bit integers."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a table chooses between, the incumbent first, and the bounds of each."""

    names: tuple[str, ...]
    incumbent: str
    noise_band: float
    limits: tuple[Limit, ...]
    ineligible: tuple[Ineligible, ...]

    def largest(self, name: str) -> float:
        """Query tokens up to which a candidate may be chosen; below any count for one that is not eligible."""
        if any(entry.candidate == name for entry in self.ineligible):
            return -np.inf
        return min((limit.num_qo_tokens for limit in self.limits if limit.candidate == name), default=np.inf)


@dataclass(frozen=True, slots=True, eq=False)
class _Charged:
    """The training shapes inside the swept ranges, with predicted costs."""

    bins: IntArray
    columns: IntArray
    costs_us: Array
    """(num_candidates, num_shapes); infinite past a limit."""


def table_rows(costs: CostModel, scope: Scope, candidates: Candidates) -> tuple[Row, ...]:
    """Rows of the table of ``scope``; the incumbent alone where nothing can be compared."""
    swept = swept_shapes(costs, scope, candidates.names)
    grid = training_grid(scope.model.max_context)
    inside = grid.inside(swept)
    if len(candidates.names) < 2 or not inside.any():
        return (Row(kv_tokens_from=0, choices=(Choice(num_qo_tokens_from=0, candidate=candidates.names[0]),)),)
    works = [grid.work(site) for site, _ in scope.parts]
    costs_us = np.stack([scope.predicted_us(costs, name, works)[inside] for name in candidates.names])
    measured = _measured(costs, scope, candidates, swept)
    charged = _with_measured(_Charged(grid.bins[inside], grid.columns[inside], costs_us), measured)
    # Predicted or measured, what may not serve costs without bound.
    tokens = np.array(QUERY_COUNTS)[charged.columns]
    for index, name in enumerate(candidates.names):
        charged.costs_us[index, tokens > candidates.largest(name)] = np.inf
    bands = few_bands(_cells(charged, _handicaps(costs, scope, candidates)))
    lowest = int(charged.bins.min())
    return tuple(_row(band, lowest, charged, candidates, measured) for band in bands)


def _with_measured(charged: _Charged, measured: list[tuple[Shape, Array]]) -> _Charged:
    """``charged`` and the whole-path timings of the fit points, each for :data:`_MEASURED_WEIGHT` predicted shapes."""
    if not measured:
        return charged
    shapes = [shape for shape, _ in measured for _ in range(_MEASURED_WEIGHT)]
    costs_us = np.stack([us for _, us in measured for _ in range(_MEASURED_WEIGHT)], axis=1)
    bins, columns = cells_of(shapes)
    return _Charged(
        bins=np.concatenate([charged.bins, bins.clip(charged.bins.min(), charged.bins.max())]),
        columns=np.concatenate([charged.columns, columns]),
        costs_us=np.concatenate([charged.costs_us, costs_us], axis=1),
    )


def swept_shapes(costs: CostModel, scope: Scope, names: Sequence[str]) -> list[Shape]:
    """Fit shapes at which at least one candidate ran at every site of the scope, sorted."""
    observations = costs.observations
    return [
        shape
        for shape in scope.swept(observations, Role.FIT)
        if any(scope.measured_us(observations, name, shape) is not None for name in names)
    ]


def _handicaps(costs: CostModel, scope: Scope, candidates: Candidates) -> Array:
    """Factor on the cost of each candidate when it competes: what is in doubt goes to the incumbent."""
    errors = {name: scope.error(costs, name) for name in candidates.names}
    doubt = [max(candidates.noise_band, errors[name], errors[candidates.incumbent]) for name in candidates.names]
    return np.array([1 + d * (name != candidates.incumbent) for name, d in zip(candidates.names, doubt, strict=True)])


def _cells(charged: _Charged, handicaps: Array) -> Cells:
    """Charges of every cell; ``handicaps`` is (num_candidates,)."""
    competing = charged.costs_us * handicaps[:, None]
    with np.errstate(invalid="ignore"):  # where every candidate is past its limit: infinity over infinity
        slowdowns = np.nan_to_num(competing / competing.min(axis=0), nan=_MAX_CHARGE, posinf=_MAX_CHARGE)
    felt = slowdowns - 1 + _FELT_WEIGHT * np.maximum(slowdowns - _FELT_SLOWDOWN, 0)
    lowest = int(charged.bins.min())
    bins = charged.bins - lowest
    counts = np.bincount(bins, minlength=int(charged.bins.max()) - lowest + 1)
    return Cells(
        costs=_summed(felt, bins, charged.columns, len(counts)),
        slowdowns=_summed(slowdowns - 1, bins, charged.columns, len(counts)),
        counts=counts,
    )


def _summed(charges: Array, bins: IntArray, columns: IntArray, num_bins: int) -> IntArray:
    """Charges (num_candidates, num_shapes) in units, summed by cell: (num_bins, num_candidates, num_columns)."""
    units = np.rint(np.minimum(charges, _MAX_CHARGE) / COST_UNIT).astype(np.int64)
    cells = np.zeros((num_bins, len(charges), len(QUERY_COUNTS)), dtype=np.int64)
    for index in range(len(charges)):
        np.add.at(cells[:, index], (bins, columns), units[index])
    return cells


def _row(
    band: Band, lowest: int, charged: _Charged, candidates: Candidates, measured: list[tuple[Shape, Array]]
) -> Row:
    inside = (charged.bins >= lowest + band.first_bin) & (charged.bins < lowest + band.end_bin)
    here = _Charged(charged.bins[inside], charged.columns[inside], charged.costs_us[:, inside])
    kv_from, kv_end = bin_start(lowest + band.first_bin), bin_start(lowest + band.end_bin)
    points = [(shape.num_qo_tokens, us) for shape, us in measured if kv_from <= shape.kv_tokens < kv_end]
    choices = [Choice(num_qo_tokens_from=0, candidate=candidates.names[band.segments[0].candidate])]
    for index, (before, after) in enumerate(pairwise(band.segments)):
        following = band.segments[index + 2 :]
        end = following[0].first_column if following else int(here.columns.max()) + 1
        choices.append(
            Choice(
                num_qo_tokens_from=_threshold(after.first_column),
                candidate=candidates.names[after.candidate],
                bracket=_bracket(here, before, after, end, candidates.noise_band, points),
            )
        )
    return Row(kv_tokens_from=kv_from if band.first_bin else 0, choices=tuple(choices))


def _threshold(column: int) -> int:
    """Halfway between two counts of the grid on the logarithmic axis, rounded up."""
    return int(np.ceil(np.sqrt(QUERY_COUNTS[column - 1] * QUERY_COUNTS[column])))


def _bracket(
    here: _Charged, before: Segment, after: Segment, end: int, noise_band: float, points: list[tuple[int, Array]]
) -> tuple[int, int]:
    """Query tokens around a threshold between which not every shape of the row agrees on the winner.

    ``points`` are fit points of the row, (query tokens, measured cost of each candidate): where one contradicts the
    predictions, the bracket widens to take it in.
    """
    counts, margin = np.array(QUERY_COUNTS), np.log1p(noise_band)
    with np.errstate(invalid="ignore"):
        gain = np.log(here.costs_us[before.candidate]) - np.log(here.costs_us[after.candidate])
    undecided_below = here.columns[~(gain < -margin)]
    undecided_above = here.columns[~(gain > margin)]
    # Strict on both sides: a staircase may cross more than once, and the bracket holds all of its crossings.
    first_doubt = min((c for c in undecided_below.tolist() if c >= before.first_column), default=after.first_column)
    last_doubt = max((c for c in undecided_above.tolist() if c < end), default=after.first_column - 1)
    low = int(counts[max(min(first_doubt, after.first_column) - 1, before.first_column)])
    high = int(counts[min(max(last_doubt + 1, after.first_column), end - 1)])
    first, last = int(counts[before.first_column]), int(counts[end - 1])
    for tokens, costs_us in points:
        measured_gain = float(np.log(costs_us[before.candidate] / costs_us[after.candidate]))
        if measured_gain > margin and first <= tokens < low:
            low = tokens
        if measured_gain < -margin and high < tokens <= last:
            high = tokens
    return low, high


def _measured(
    costs: CostModel, scope: Scope, candidates: Candidates, swept: Sequence[Shape]
) -> list[tuple[Shape, Array]]:
    """Fit shapes at which every candidate ran, with the measured cost of each.

    One that cannot be told from the incumbent there costs at least as much: what is ambiguous is no reason to switch.
    None where the costs are modelled: what was measured is another GPU's.
    """
    if costs.modelled:
        return []
    points = []
    for shape in swept:
        row = [scope.measured_us(costs.observations, name, shape) for name in candidates.names]
        if None not in row:
            us = np.array(row, dtype=np.float64)
            alike = [overlapping(costs.observations, scope, candidates.incumbent, n, shape) for n in candidates.names]
            points.append((shape, np.where(alike, np.maximum(us, us[0]), us)))
    return points
