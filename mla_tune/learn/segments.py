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
"""A slowdown of 0.1 %, in units: what a threshold must gain over its row to be worth having, and what merging rows may
lose over the table."""


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
    cost: int


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Costs to choose by. Candidate 0 is the incumbent: it wins every tie."""

    costs: IntArray
    """(num_bins, num_candidates, num_columns), summed over the shapes of a cell, in :data:`COST_UNIT`."""
    counts: IntArray
    """(num_bins,) shapes of each bin."""

    def band(self, first_bin: int, end_bin: int) -> Band:
        """The bins ``first_bin`` to ``end_bin`` as one row, with the best segments for it."""
        costs = self.costs[first_bin:end_bin].sum(axis=0)
        segments = best_segments(costs, PER_MILLE * int(self.counts[first_bin:end_bin].sum()))
        ends = [segment.first_column for segment in segments[1:]] + [costs.shape[1]]
        cost = sum(int(costs[s.candidate, s.first_column : end].sum()) for s, end in zip(segments, ends, strict=True))
        return Band(first_bin, end_bin, segments, cost)


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


def merged_bands(cells: Cells) -> tuple[Band, ...]:
    """One band per bin, then the cheapest neighbours merged as long as the whole table loses no more than 0.1 %."""
    bands = [cells.band(index, index + 1) for index in range(len(cells.counts))]
    budget = PER_MILLE * int(cells.counts.sum())
    joined = [cells.band(a.first_bin, b.end_bin) for a, b in pairwise(bands)]
    while joined:
        losses = [joined[i].cost - bands[i].cost - bands[i + 1].cost for i in range(len(joined))]
        index = losses.index(min(losses))
        if losses[index] > budget:
            break
        budget -= losses[index]
        bands[index : index + 2] = [joined[index]]
        joined = _rejoin(cells, bands, joined, index)
    return tuple(bands)


def _rejoin(cells: Cells, bands: list[Band], joined: list[Band], index: int) -> list[Band]:
    """``joined`` after the bands at ``index`` and ``index + 1`` became one: only its two neighbours change."""
    result = joined[:index] + joined[index + 1 :]
    for left in (index - 1, index):
        if 0 <= left < len(result):
            result[left] = cells.band(bands[left].first_bin, bands[left + 1].end_bin)
    return result
