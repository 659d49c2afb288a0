"""Where the predicted costs cross: the rows of one table.

Every shape of the training grid is charged to its cell: the slowdown of each candidate there. A candidate other than the
incumbent counts as slower by the noise band, or by the error of the predictions where that is larger, so that it is
chosen only where its win is beyond doubt. Thresholds minimize the mean of that charge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from mla_tune.fit.brackets import Brackets
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
    group_start,
    measured_range,
    training_grid,
)
from mla_tune.fit.work import Array
from mla_tune.policy.evidence import LimitEvidence, RowEvidence, WorkspaceCap
from mla_tune.policy.schema import Choice, Ineligible, Range, Row
from mla_tune.policy.threshold import Threshold
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import SiteName
from mla_tune.store.measurement import Role

_WORTH = 1e-3
"""A step or threshold that changes the mean charge of a table's shapes by less is dropped; README.md beside this file has
what other values give on held-out points."""
_MAX_CHARGE = 1000.0
"""Charge of a candidate that fails; bounds the sums to 64-bit integers."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a table chooses between, the incumbent first, and the bounds of each."""

    names: tuple[str, ...]
    incumbent: str
    noise_band: float
    limits: tuple[LimitEvidence, ...]
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
    """The training shapes inside the swept ranges, with predicted costs."""

    tokens: tuple[int, ...]
    """Query tokens of the columns."""
    bins: IntArray
    columns: IntArray
    groups: IntArray
    costs_us: Array
    """(num_candidates, num_shapes); infinite past a limit."""


@dataclass(frozen=True, slots=True)
class FittedRows:
    """The rows of one table with their evidence."""

    rows: tuple[Row, ...]
    evidence: tuple[RowEvidence, ...]
    cap: WorkspaceCap | None
    """What a cap on workspace meant."""


def table_rows(costs: CostModel, scope: Scope, candidates: Candidates, objective: Objective = PLAIN) -> FittedRows:
    """Rows of the table of ``scope``; the incumbent alone where none can be compared."""
    swept = swept_shapes(costs, scope, candidates.names)
    measured = measured_range(swept)
    grid = training_grid(scope.model.max_context, costs.environment.sm_count)
    mask = grid.inside(swept)
    where = grid.bins[mask], grid.columns[mask], grid.groups[mask]
    cap = _cap(costs, scope, candidates, objective, (where, grid.tokens, measured))
    note = cap.note(*where) if cap else None
    if len(candidates.names) < 2 or not mask.any():
        return FittedRows(
            (incumbent_row(candidates.names[0]),), (RowEvidence(num_reqs_from=0, kv_tokens_from=0),), note
        )
    shapes = tuple(grid.shapes[index] for index in np.flatnonzero(mask))
    works = [grid.work(site) for site, _ in scope.parts]
    costs_us = np.stack([scope.predicted_us(costs, name, works)[mask] for name in candidates.names])
    charged = _Charged(grid.tokens, *where, costs_us.copy())
    tokens = np.array(charged.tokens)[charged.columns]
    for index, name in enumerate(candidates.names):
        charged.costs_us[index, tokens > candidates.largest(name)] = np.inf
    weights = _weights(charged, scope, objective, measured)
    cells = _cells(charged, _handicaps(costs, scope, candidates), weights, measured.kv_tokens)
    cells = cap.charged(cells) if cap else cells
    first = int(charged.bins.min()), int(charged.groups.min())
    brackets = Brackets(candidates.names, costs, scope, shapes, np.log(costs_us), candidates.noise_band)
    found = list(_Rows(brackets, *first, measured.kv_tokens, cap).of(few_groups(cells), cells))
    return FittedRows(tuple(row for row, _ in found), tuple(evidence for _, evidence in found), note)


def incumbent_row(incumbent: str) -> Row:
    """The row that answers ``incumbent`` everywhere."""
    return Row(choices=(Choice(candidate=incumbent),))


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Makes the rows of a table from its bands."""

    brackets: Brackets
    first_bin: int
    first_group: int
    kv_tokens: tuple[int, int]
    """Least and most context tokens that the table serves."""
    cap: CappedCells | None

    def of(
        self, groups: Sequence[tuple[int, tuple[Band, ...]]], cells: Sequence[Cells]
    ) -> Iterator[tuple[Row, RowEvidence]]:
        """``groups`` as :func:`few_groups` gave them for ``cells``, those of each range of requests."""
        for index, (group, bands) in enumerate(groups):
            members = range(group, groups[index + 1][0] if index + 1 < len(groups) else len(cells))
            reqs_from = group_start(self.first_group + group) if index else 0
            reqs_end = group_start(self.first_group + members.stop) if members.stop < len(cells) else None
            for band in bands:
                for row, end in self._of_band(band, reqs_from, members, cells, last=band is bands[-1]):
                    yield row, self.brackets.row(row, reqs_end, end)

    def _of_band(
        self, band: Band, reqs_from: int, members: range, cells: Sequence[Cells], *, last: bool
    ) -> Iterator[tuple[Row, int]]:
        """The row of one band, and the context tokens at which it ends.

        Where its slanted thresholds cut into cells that a cap bars, rows of level ones instead.
        """
        end = self.kv_tokens[1] + 1 if last else bin_start(self.first_bin + band.end_bin)
        row = self._row(band, reqs_from, end)
        if self.cap is None or not self.cap.breaks(row, end, members):
            yield row, end
            return
        together = reduce(Cells.__add__, [cells[member] for member in members])
        for level in level_bands(together, band):
            inner = level.end_bin < band.end_bin
            level_end = bin_start(self.first_bin + level.end_bin) if inner else end
            yield self._row(level, reqs_from, level_end), level_end

    def _row(self, band: Band, reqs_from: int, end: int) -> Row:
        start = bin_start(self.first_bin + band.first_bin) if band.first_bin else 0
        # A line is named at contexts that the table serves: the first row begins below them, the last ends behind.
        ends = max(start, self.kv_tokens[0]), min(end, self.kv_tokens[1])
        choices = (
            Choice(
                threshold=Threshold.through(ends, (segment.first, segment.last)),
                candidate=self.brackets.names[segment.candidate],
            )
            for segment in band.segments
        )
        return Row(num_reqs_from=reqs_from, kv_tokens_from=start, choices=tuple(choices))


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


def _cells(charged: _Charged, handicaps: Array, weights: Array, kv_tokens: tuple[int, int]) -> list[Cells]:
    """Charges of every cell, one grid for each range of requests.

    ``handicaps`` is (num_candidates,), ``weights`` (num_shapes,). The first bin of a table starts at the least context that
    it serves, and the last ends at the most, whatever bins do elsewhere.
    """
    competing = charged.costs_us * handicaps[:, None]
    with np.errstate(invalid="ignore"):  # where every candidate is past its limit: infinity over infinity
        slowdowns = np.nan_to_num(competing / competing.min(axis=0), nan=_MAX_CHARGE, posinf=_MAX_CHARGE)
    lowest, highest = int(charged.bins.min()), int(charged.bins.max())
    bins = range(lowest, highest + 1)
    starts = [min(kv_tokens[0], bin_middle(lowest)), *(bin_start(index) for index in bins[1:])]
    starts.append(max(kv_tokens[1], starts[-1] + 1))
    middles = [min(bin_middle(index), starts[-1]) for index in bins]
    found = []
    for group in range(int(charged.groups.min()), int(charged.groups.max()) + 1):
        here = charged.groups == group
        where = charged.bins[here] - lowest, charged.columns[here]
        found.append(
            Cells(
                costs=_summed(slowdowns[:, here] - 1, weights[here], *where, (len(bins), len(charged.tokens))),
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
