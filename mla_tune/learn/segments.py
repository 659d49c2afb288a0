"""The best few thresholds: exact dynamic programming over query tokens, greedy merging over context tokens.

Works on a grid of cells (bin of context tokens, count of query tokens) that holds, for every candidate, what choosing it
there costs. Costs are integers, so that the result depends neither on the order of a sum nor on a library's rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

COST_UNIT = 1e-9
"""Slowdown that one unit of cost stands for."""
PER_MILLE = 1_000_000
"""A mean slowdown of 0.1 %, in units a shape: a step of the table that changes it by less is dropped."""


@dataclass(frozen=True, slots=True)
class Segment:
    """From one column on (until the next segment) choose one candidate; both are indices."""

    first_column: int
    candidate: int


@dataclass(frozen=True, slots=True)
class Band:
    """Adjacent bins that share their segments."""

    first_bin: int
    end_bin: int
    """One past the last bin."""
    segments: tuple[Segment, ...]
    slowdown: int
    """Summed over its shapes, in :data:`COST_UNIT`."""


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """What each choice costs in each cell. Candidate 0 is the incumbent: it wins every tie."""

    costs: IntArray
    """(num_bins, num_candidates, num_columns) what thresholds are placed by, summed over the shapes of a cell."""
    slowdowns: IntArray
    """The same shape: the plain slowdown beyond 1, by which it is judged what a step is worth."""
    counts: IntArray
    """(num_bins,) shapes of each bin."""

    @property
    def negligible(self) -> int:
        """What a step must change the table's summed slowdown by to be worth having."""
        return PER_MILLE * int(self.counts.sum())

    def band(self, first_bin: int, end_bin: int) -> Band:
        """The bins ``first_bin`` to ``end_bin`` as one row, with the best segments for it."""
        costs = self.costs[first_bin:end_bin].sum(axis=0)
        segments = best_segments(costs, PER_MILLE * int(self.counts[first_bin:end_bin].sum()))
        return self.judged(first_bin, end_bin, segments)

    def judged(self, first_bin: int, end_bin: int, segments: tuple[Segment, ...]) -> Band:
        """A row with these segments and what it loses."""
        slowdowns = self.slowdowns[first_bin:end_bin].sum(axis=0)
        ends = [segment.first_column for segment in segments[1:]] + [slowdowns.shape[1]]
        pieces = zip(segments, ends, strict=True)
        total = sum(int(slowdowns[s.candidate, s.first_column : end].sum()) for s, end in pieces)
        return Band(first_bin, end_bin, segments, total)


def best_segments(costs: IntArray, threshold_cost: int) -> tuple[Segment, ...]:
    """Segments over all columns of least total cost, each one after the first costing ``threshold_cost`` more.

    ``costs`` is (num_candidates, num_columns). On equal totals fewer segments win, then the lower index.
    """
    num_candidates, num_columns = costs.shape
    total = costs[:, 0].copy()
    came_from = np.tile(np.arange(num_candidates), (num_columns, 1))
    for column in range(1, num_columns):
        cheapest = int(total.argmin())
        switched = total[cheapest] + threshold_cost < total
        came_from[column, switched] = cheapest
        total = np.where(switched, total[cheapest] + threshold_cost, total) + costs[:, column]
    candidate = int(total.argmin())
    segments: list[Segment] = []
    for column in range(num_columns - 1, -1, -1):
        before = int(came_from[column, candidate])
        if column == 0 or before != candidate:
            segments.append(Segment(column, candidate))
        candidate = before
    return tuple(reversed(segments))


def few_bands(cells: Cells) -> tuple[Band, ...]:
    """The rows of a table: no step between two of them, and no threshold in one, could go for less than 0.1 %.

    One band per bin at first; then, always the cheapest first, neighbours are merged and thresholds dropped as long as
    doing so changes the table's mean slowdown by less than that.
    """
    bands = [cells.band(index, index + 1) for index in range(len(cells.counts))]
    before: list[Band] = []
    while bands != before:  # rows that lost a threshold may now merge with others
        before = list(bands)
        _merge(cells, bands)
        bands = [_without_idle_thresholds(cells, band) for band in bands]
    return tuple(bands)


def _merge(cells: Cells, bands: list[Band]) -> None:
    """Join neighbours in place, the cheapest pair first, until each further one would cost too much."""
    joined = [cells.band(a.first_bin, b.end_bin) for a, b in pairwise(bands)]
    while joined:
        losses = [joined[i].slowdown - bands[i].slowdown - bands[i + 1].slowdown for i in range(len(joined))]
        index = losses.index(min(losses))
        if losses[index] >= cells.negligible:
            return
        bands[index : index + 2] = [joined[index]]
        joined = _rejoin(cells, bands, joined, index)


def _rejoin(cells: Cells, bands: list[Band], joined: list[Band], index: int) -> list[Band]:
    """``joined`` after the bands at ``index`` and ``index + 1`` became one: only its two neighbours change."""
    result = joined[:index] + joined[index + 1 :]
    for left in (index - 1, index):
        if 0 <= left < len(result):
            result[left] = cells.band(bands[left].first_bin, bands[left + 1].end_bin)
    return result


def _without_idle_thresholds(cells: Cells, band: Band) -> Band:
    """``band`` less the segments that hardly change the table's mean slowdown, the least useful first."""
    while len(band.segments) > 1:
        shorter = [
            cells.judged(band.first_bin, band.end_bin, _without(band.segments, index))
            for index in range(len(band.segments))
        ]
        best = min(shorter, key=lambda candidate: candidate.slowdown)
        if best.slowdown - band.slowdown >= cells.negligible:
            break
        band = best
    return band


def _without(segments: tuple[Segment, ...], index: int) -> tuple[Segment, ...]:
    """``segments`` with one taken out: the one before it (or behind the first) takes its columns."""
    kept = [*segments[:index], *segments[index + 1 :]]
    kept[0] = Segment(0, kept[0].candidate)
    return tuple(s for i, s in enumerate(kept) if i == 0 or s.candidate != kept[i - 1].candidate)
