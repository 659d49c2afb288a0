"""Where the predicted costs cross: the rows of one table.

Every shape of the training grid is charged to its cell: the slowdown of each candidate there. A candidate other than the
incumbent counts as slower by the noise band, or by the error of the predictions where that is larger, so that it is
chosen only where its win is beyond doubt. Thresholds minimize the mean of that charge; a slowdown that would be felt
counts more than its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from mla_tune.fit.cap import CappedCells, Frame, capped_cells, level_bands
from mla_tune.fit.costs import CostModel
from mla_tune.fit.limits import Suspect
from mla_tune.fit.objective import PLAIN, Objective, cell_weights, inside
from mla_tune.fit.objective import Cells as CellsOfShapes
from mla_tune.fit.scope import Scope
from mla_tune.fit.segments import COST_UNIT, Band, Cells, few_groups
from mla_tune.fit.training import (
    COLUMN_REACH,
    IntArray,
    bin_middle,
    bin_start,
    cells_of,
    group_start,
    measured_range,
    training_grid,
)
from mla_tune.fit.winner import overlapping
from mla_tune.fit.witness import Ends, Witnesses
from mla_tune.fit.work import Array
from mla_tune.policy.evidence import WorkspaceCap
from mla_tune.policy.schema import Choice, Ineligible, Limit, Range, Row
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import SiteName
from mla_tune.store.measurement import Role

_WORTH = 1e-3
"""A step or threshold that changes the mean charge of a table's shapes by less is dropped. On 3000 random shapes at each of
four of an H200's tables, by their cost curves: 1e-3 keeps 40 rows, of which 0.18 % of the shapes lose more than 10 %; 4e-3
keeps 15, and 0.40 % do. A lookup takes as many comparisons as the logarithm of the rows."""
_FELT_SLOWDOWN = 1.04
_FELT_WEIGHT = 20.0
"""Beyond 1.04 each further unit of slowdown counts 21 times: a table answers for its worst shapes as well as its mean."""
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
    suspects: tuple[Suspect, ...] = ()

    def largest(self, name: str) -> float:
        """Query tokens up to which a candidate may be chosen; below any count for one that is not eligible.

        A suspect has no limit in the policy that would be exact, so its last column must end before the failure.
        """
        if any(entry.candidate == name for entry in self.ineligible):
            return -np.inf
        proven = [float(limit.num_qo_tokens) for limit in self.limits if limit.candidate == name]
        seen = [entry.runs_at / COLUMN_REACH for entry in self.suspects if entry.candidate == name]
        return min([*proven, *seen], default=np.inf)


@dataclass(frozen=True, slots=True, eq=False)
class _Charged:
    """The training shapes inside the swept ranges, with predicted costs; measured ones count several times."""

    tokens: tuple[int, ...]
    """Query tokens of the columns."""
    bins: IntArray
    columns: IntArray
    groups: IntArray
    costs_us: Array
    """(num_candidates, num_shapes); infinite past a limit."""


def table_rows(
    costs: CostModel, scope: Scope, candidates: Candidates, objective: Objective = PLAIN
) -> tuple[tuple[Row, ...], WorkspaceCap | None]:
    """Rows of the table of ``scope``, and what a cap on workspace meant; the incumbent alone where none can be compared."""
    swept = swept_shapes(costs, scope, candidates.names)
    grid = training_grid(scope.model.max_context, costs.environment.sm_count)
    mask = grid.inside(swept)
    where = grid.bins[mask], grid.columns[mask], grid.groups[mask]
    cap = _cap(costs, scope, candidates, objective, (where, grid.tokens, measured_range(swept)))
    note = cap.note(*where) if cap else None
    if len(candidates.names) < 2 or not mask.any():
        return (incumbent_row(candidates.names[0]),), note
    works = [grid.work(site) for site, _ in scope.parts]
    costs_us = np.stack([scope.predicted_us(costs, name, works)[mask] for name in candidates.names])
    measured = _measured(costs, scope, candidates, swept)
    charged = _with_measured(_Charged(grid.tokens, *where, costs_us.copy()), measured)
    # Predicted or measured, what may not serve costs without bound.
    tokens = np.array(charged.tokens)[charged.columns]
    for index, name in enumerate(candidates.names):
        charged.costs_us[index, tokens > candidates.largest(name)] = np.inf
    weights = _weights(charged, scope, objective, measured_range(swept))
    kv_end = measured_range(swept).kv_tokens[1] + 1
    cells = _cells(charged, _handicaps(costs, scope, candidates), weights, kv_end)
    cells = cap.charged(cells) if cap else cells
    groups = few_groups(cells)
    predicted = [grid.shapes[index] for index in np.flatnonzero(mask)], costs_us
    witnesses = Witnesses.of(costs, scope, candidates.names, predicted, measured)
    first = int(charged.bins.min()), int(charged.groups.min())
    rows = _Rows(witnesses, candidates.noise_band, *first, kv_end, cap)
    return rows.of(groups, cells), note


def incumbent_row(incumbent: str) -> Row:
    """The row that answers ``incumbent`` everywhere."""
    only = Choice(num_qo_tokens_from=0, candidate=incumbent)
    return Row(num_reqs_from=0, kv_tokens_from=0, choices=(only,))


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Makes the rows of a table from its bands."""

    witnesses: Witnesses
    noise_band: float
    first_bin: int
    first_group: int
    kv_end: int
    """Context tokens at which the table ends."""
    cap: CappedCells | None

    def of(self, groups: Sequence[tuple[int, tuple[Band, ...]]], cells: Sequence[Cells]) -> tuple[Row, ...]:
        """``groups`` as :func:`few_groups` gave them for ``cells``, those of each range of requests."""
        rows: list[Row] = []
        for index, (group, bands) in enumerate(groups):
            members = range(group, groups[index + 1][0] if index + 1 < len(groups) else len(cells))
            requests = (
                group_start(self.first_group + group) if index else 0,
                group_start(self.first_group + members.stop) if members.stop < len(cells) else None,
            )
            for band in bands:
                rows += self._of_band(band, requests, members, cells, last=band is bands[-1])
        return tuple(rows)

    def _of_band(
        self, band: Band, requests: Ends, members: range, cells: Sequence[Cells], *, last: bool
    ) -> Iterator[Row]:
        """The row of one band. Where its slanted thresholds cut into cells that a cap bars, rows of level ones instead."""
        end = self.kv_end if last else bin_start(self.first_bin + band.end_bin)
        row = self._row(band, requests, end)
        if self.cap is None or not self.cap.breaks(row, end, members):
            yield row
            return
        together = reduce(Cells.__add__, [cells[member] for member in members])
        for level in level_bands(together, band):
            inner = level.end_bin < band.end_bin
            yield self._row(level, requests, bin_start(self.first_bin + level.end_bin) if inner else end)

    def _row(self, band: Band, requests: Ends, end: int) -> Row:
        start = bin_start(self.first_bin + band.first_bin) if band.first_bin else 0
        return self.witnesses.row(band.segments, requests, (start, end), self.noise_band)


def _cap(
    costs: CostModel,
    scope: Scope,
    candidates: Candidates,
    objective: Objective,
    where: tuple[CellsOfShapes, Sequence[int], Range],
) -> CappedCells | None:
    """What a cap bars in the cells of these shapes; None without one, and where a candidate is no attention."""
    (bins, _, groups), tokens, measured = where
    if objective.max_workspace_bytes is None or scope.name is not SiteName.PREFILL_ATTENTION or not bins.size:
        return None
    largest = {name: candidates.largest(name) for name in candidates.names}
    frame = Frame.of(bins, groups, tokens, measured)
    device = costs.environment.sm_count, costs.architecture
    return capped_cells(scope, largest, objective.max_workspace_bytes, device, frame)


def _weights(charged: _Charged, scope: Scope, objective: Objective, measured: Range) -> Array:
    """(num_shapes,) how much each shape counts: 1 without traffic at this site of this model."""
    recorded = inside(objective.recorded(scope.name, scope.model.name), measured)
    if not recorded:
        return np.ones(len(charged.bins))
    return cell_weights(recorded, (charged.bins, charged.columns, charged.groups), charged.tokens)


def _with_measured(charged: _Charged, measured: list[tuple[Shape, Array]]) -> _Charged:
    """``charged`` and the whole-path timings of the fit points, each for :data:`_MEASURED_WEIGHT` predicted shapes."""
    if not measured:
        return charged
    shapes = [shape for shape, _ in measured for _ in range(_MEASURED_WEIGHT)]
    costs_us = np.stack([us for _, us in measured for _ in range(_MEASURED_WEIGHT)], axis=1)
    bins, columns, groups = cells_of(shapes, charged.tokens)
    return _Charged(
        tokens=charged.tokens,
        bins=np.concatenate([charged.bins, bins.clip(charged.bins.min(), charged.bins.max())]),
        columns=np.concatenate([charged.columns, columns]),
        groups=np.concatenate([charged.groups, groups.clip(charged.groups.min(), charged.groups.max())]),
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


def _cells(charged: _Charged, handicaps: Array, weights: Array, kv_end: int) -> list[Cells]:
    """Charges of every cell, one grid for each range of requests.

    ``handicaps`` is (num_candidates,), ``weights`` (num_shapes,). The first row of a table starts at no context at all, and
    the last ends at ``kv_end``, whatever their bins do.
    """
    competing = charged.costs_us * handicaps[:, None]
    with np.errstate(invalid="ignore"):  # where every candidate is past its limit: infinity over infinity
        slowdowns = np.nan_to_num(competing / competing.min(axis=0), nan=_MAX_CHARGE, posinf=_MAX_CHARGE)
    felt = slowdowns - 1 + _FELT_WEIGHT * np.maximum(slowdowns - _FELT_SLOWDOWN, 0)
    lowest, highest = int(charged.bins.min()), int(charged.bins.max())
    bins = range(lowest, highest + 1)
    starts = [0, *(bin_start(index) for index in bins[1:]), kv_end]
    middles = [min(bin_middle(index), kv_end - 1) for index in bins]
    found = []
    for group in range(int(charged.groups.min()), int(charged.groups.max()) + 1):
        here = charged.groups == group
        where = charged.bins[here] - lowest, charged.columns[here]
        found.append(
            Cells(
                costs=_summed(felt[:, here], weights[here], *where, (len(bins), len(charged.tokens))),
                counts=np.bincount(where[0], weights[here], len(bins)),
                tokens=np.array(charged.tokens, dtype=np.int64),
                starts=np.array(starts, dtype=np.int64),
                middles=np.array(middles, dtype=np.int64),
                worth=_WORTH,
                shapes=len(charged.bins),
            )
        )
    return found


def _summed(charges: Array, weights: Array, bins: IntArray, columns: IntArray, size: tuple[int, int]) -> IntArray:
    """Charges (num_candidates, num_shapes) in units, weighed and summed: (num_bins, num_candidates, num_columns)."""
    num_bins, num_columns = size
    units = np.rint(np.minimum(charges, _MAX_CHARGE) / COST_UNIT * weights).astype(np.int64)
    cells = np.zeros((num_bins, len(charges), num_columns), dtype=np.int64)
    for index in range(len(charges)):
        np.add.at(cells[:, index], (bins, columns), units[index])
    return cells


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
