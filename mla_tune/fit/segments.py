"""The best few thresholds: exact dynamic programming over query tokens, greedy merging over contexts and requests.

Works on a grid of cells (bin of context tokens, count of query tokens) that holds, for every candidate, what choosing it
there costs. A threshold may rise with the context, linearly, so that one row follows a crossover over many bins. Costs are
integers, so that the result depends neither on the order of a sum nor on a library's rounding.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

COST_UNIT = 1e-9
"""What one unit of cost stands for."""
_UNITS = 1_000_000_000
_REACH = 3
"""Columns (of six an octave) by which a merged row's thresholds may move from those that its halves had."""
_ROUNDS = 4
"""Times that every threshold of a row is looked at again after the others moved; it settles after two."""


@dataclass(frozen=True, slots=True)
class Segment:
    """From one threshold on (until the next segment) choose one candidate, an index."""

    candidate: int
    first: int
    """Query tokens of the threshold at the start of the band."""
    last: int
    """At its end; linear in context tokens between the two, never falling."""


@dataclass(frozen=True, slots=True)
class Band:
    """Adjacent bins that share their segments."""

    first_bin: int
    end_bin: int
    """One past the last bin."""
    segments: tuple[Segment, ...]
    """Thresholds ascend at both ends; the first is 0."""
    cost: int
    """Summed over its shapes, in :data:`COST_UNIT`."""


@dataclass(frozen=True, eq=False)
class Cells:
    """What each choice costs in each cell. Candidate 0 is the incumbent: it wins every tie."""

    costs: IntArray
    """(num_bins, num_candidates, num_columns), summed over the shapes of a cell."""
    counts: IntArray | npt.NDArray[np.float64]
    """(num_bins,) shapes of each bin, by weight."""
    tokens: IntArray
    """(num_columns,) query tokens of the columns, ascending."""
    starts: IntArray
    """(num_bins + 1,) context tokens at which each bin starts, and at which the last one ends."""
    middles: IntArray
    """(num_bins,) context tokens that stand for each bin."""
    worth: float
    """Mean cost that a step must save: over the shapes of its bin to be placed, over the whole table's to stay."""
    shapes: int
    """Shapes of the whole table."""

    def __add__(self, other: Cells) -> Cells:
        return replace(
            self,
            costs=self.costs + other.costs,
            counts=self.counts + other.counts,
        )

    @cached_property
    def _thresholds(self) -> list[int]:
        """Between each column but the first and the one before it."""
        return [int(tokens) for tokens in threshold(self.tokens, np.arange(1, len(self.tokens)))]

    @cached_property
    def _sums(self) -> IntArray:
        """Costs of all columns below each, (num_bins, num_candidates, num_columns + 1)."""
        return np.pad(self.costs, ((0, 0), (0, 0), (1, 0))).cumsum(axis=2)

    def judged(self, first_bin: int, end_bin: int, segments: tuple[Segment, ...]) -> Band:
        """A band with these segments and what it costs."""
        columns = [self._columns(first_bin, end_bin, s.first, s.last) for s in segments]
        return Band(first_bin, end_bin, segments, int(self._total(first_bin, segments, columns).sum()))

    def fitted(self, first_bin: int, end_bin: int, segments: tuple[Segment, ...]) -> Band:
        """``segments`` with their thresholds moved, by at most some columns at each end, to where they cost least."""
        found = segments
        for _ in range(_ROUNDS):
            before = found
            for index in range(1, len(found)):
                found = self._moved(first_bin, end_bin, found, index)
            if found == before:
                break
        return self.judged(first_bin, end_bin, found)

    def _moved(self, first_bin: int, end_bin: int, segments: tuple[Segment, ...], index: int) -> tuple[Segment, ...]:
        """``segments`` with the threshold of one at the best place between those of its neighbours."""
        segment = segments[index]
        floor, ceiling = segments[index - 1], segments[index + 1] if index + 1 < len(segments) else None
        firsts = self._near(segment.first, floor.first, ceiling.first if ceiling else None)
        lasts = self._near(segment.last, floor.last, ceiling.last if ceiling else None)
        if not (firsts.size and lasts.size):
            return segments
        sums = self._sums
        columns = self._columns(first_bin, end_bin, firsts[:, None], lasts[None, :])
        before = sums[first_bin:end_bin, segments[index - 1].candidate]
        after = sums[first_bin:end_bin, segment.candidate]
        # What moving the threshold changes: columns below it go to the candidate before, those above to this one.
        rows = np.arange(end_bin - first_bin)[:, None, None]
        costs = (before[rows, columns] - after[rows, columns]).sum(axis=0)
        level = end_bin - first_bin == 1
        allowed = np.equal.outer(firsts, lasts) if level else np.less_equal.outer(firsts, lasts)
        if not allowed.any():
            return segments
        costs = np.where(allowed, costs, costs.max() + 1)
        best = np.unravel_index(int(costs.argmin()), costs.shape)
        moved = Segment(segment.candidate, int(firsts[best[0]]), int(lasts[best[1]]))
        here = self._columns(first_bin, end_bin, np.array([[segment.first]]), np.array([[segment.last]]))
        now = int((before[rows, here] - after[rows, here]).sum())
        return _with(segments, index, moved) if int(costs[best]) < now else segments

    def _near(self, tokens: int, floor: int, ceiling: int | None) -> IntArray:
        """Thresholds to try instead of ``tokens``: halfway between neighbouring columns."""
        at = int(self.tokens.searchsorted(tokens))
        low, high = max(at - _REACH, 1) - 1, min(at + _REACH, len(self.tokens) - 1)
        low = bisect_right(self._thresholds, floor, low, high)
        high = high if ceiling is None else bisect_left(self._thresholds, ceiling, low, high)
        return np.array(self._thresholds[low:high], dtype=np.int64)

    def _columns(self, first_bin: int, end_bin: int, first: int | IntArray, last: int | IntArray) -> IntArray:
        """First column at or above a threshold in each bin, (end_bin - first_bin, ...) with the shape of the ends."""
        start, end = self.starts[first_bin], self.starts[end_bin]
        share = (self.middles[first_bin:end_bin] - start) / (end - start)
        if isinstance(first, int):
            return np.asarray(self.tokens.searchsorted(first + (last - first) * share))
        return np.asarray(self.tokens.searchsorted(first + (last - first) * share.reshape(-1, 1, 1)))

    def _total(self, first_bin: int, segments: tuple[Segment, ...], columns: Sequence[IntArray]) -> IntArray:
        """(num_bins of the band,) what the segments cost in each bin."""
        rows = np.arange(first_bin, first_bin + len(columns[0]))
        ends = [*columns[1:], np.full_like(columns[0], len(self.tokens))]
        total = np.zeros(len(rows), dtype=np.int64)
        for segment, start, end in zip(segments, columns, ends, strict=True):
            of = self._sums[:, segment.candidate]
            total += of[rows, np.maximum(end, start)] - of[rows, start]
        return total

    def cell_bands(self) -> list[Band]:
        """Every bin by itself, with the best segments for it."""
        costs = (self.worth * _UNITS * self.counts).astype(np.int64)
        return [
            self.judged(index, index + 1, tuple(self._level(column, candidate) for column, candidate in segments))
            for index, segments in enumerate(best_segments(self.costs, costs))
        ]

    def _level(self, column: int, candidate: int) -> Segment:
        tokens = int(threshold(self.tokens, np.array([column]))[0]) if column else 0
        return Segment(candidate, tokens, tokens)


def threshold(tokens: IntArray, columns: IntArray) -> IntArray:
    """Halfway between a column above 0 and the one before it on the logarithmic axis, rounded up."""
    return np.asarray(np.ceil(np.sqrt(tokens[columns - 1] * tokens[columns])), dtype=np.int64)


def best_segments(costs: IntArray, threshold_costs: IntArray) -> list[tuple[tuple[int, int], ...]]:
    """For each bin the segments over all columns of least total cost, each one after the first costing something more.

    ``costs`` is (num_bins, num_candidates, num_columns), ``threshold_costs`` (num_bins,). Gives (first column, candidate)
    of each segment. On equal totals fewer segments win, then the lower index.
    """
    num_bins, num_candidates, num_columns = costs.shape
    bins = np.arange(num_bins)
    total = costs[:, :, 0].copy()
    came_from = np.tile(np.arange(num_candidates), (num_columns, num_bins, 1))
    for column in range(1, num_columns):
        cheapest = total.argmin(axis=1)
        switching = (total[bins, cheapest] + threshold_costs)[:, None]
        switched = switching < total
        came_from[column] = np.where(switched, cheapest[:, None], came_from[column])
        total = np.where(switched, switching, total) + costs[:, :, column]
    return [_followed_back(came_from[:, index], int(total[index].argmin())) for index in range(num_bins)]


def _followed_back(came_from: IntArray, candidate: int) -> tuple[tuple[int, int], ...]:
    """The segments that end with ``candidate``; ``came_from`` is (num_columns, num_candidates)."""
    segments: list[tuple[int, int]] = []
    for column in range(len(came_from) - 1, -1, -1):
        before = int(came_from[column, candidate])
        if column == 0 or before != candidate:
            segments.append((column, candidate))
        candidate = before
    return tuple(reversed(segments))


def few_bands(cells: Cells) -> tuple[Band, ...]:
    """The rows of one range of requests: no step between two of them, and no threshold in one, is worth less than asked.

    One band per bin at first; then, always the cheapest first, neighbours are merged and thresholds dropped as long as
    doing so changes the mean cost by less than :attr:`Cells.worth`.
    """
    bands = cells.cell_bands()
    before: list[Band] = []
    while bands != before:  # rows that lost a threshold may now merge with others
        before = list(bands)
        _merge(cells, bands)
        bands = [_without_idle_thresholds(cells, band) for band in bands]
    return tuple(bands)


def few_groups(cells: Sequence[Cells]) -> tuple[tuple[int, tuple[Band, ...]], ...]:
    """The rows of a whole table: ``cells`` are those of each range of requests, ascending.

    Gives the index of the first range of each group with its bands: ranges are merged, the cheapest pair first, as long
    as that costs the table less than a step is worth.
    """
    groups = [(index, one, few_bands(one)) for index, one in enumerate(cells)]
    joined = [_together(a, b) for a, b in pairwise(groups)]
    worth = _worth(cells[0])
    while joined:
        losses = [_lost(joined[i][2]) - _lost(groups[i][2]) - _lost(groups[i + 1][2]) for i in range(len(joined))]
        index = losses.index(min(losses))
        if losses[index] >= worth:
            break
        groups[index : index + 2] = [joined[index]]
        joined[index : index + 1] = []
        for left in (index - 1, index):
            if 0 <= left < len(joined):
                joined[left] = _together(groups[left], groups[left + 1])
    return tuple((first, bands) for first, _, bands in groups)


_Group = tuple[int, Cells, tuple[Band, ...]]


def _together(one: _Group, other: _Group) -> _Group:
    cells = one[1] + other[1]
    return one[0], cells, few_bands(cells)


def _worth(cells: Cells) -> int:
    return int(cells.worth * _UNITS * cells.shapes)


def _lost(bands: Sequence[Band]) -> int:
    return sum(band.cost for band in bands)


def _merge(cells: Cells, bands: list[Band]) -> None:
    """Join neighbours in place, the cheapest pair first, until each further one would cost too much."""
    joined = [_joined(cells, a, b) for a, b in pairwise(bands)]
    worth = _worth(cells)
    while joined:
        losses = [joined[i].cost - bands[i].cost - bands[i + 1].cost for i in range(len(joined))]
        index = losses.index(min(losses))
        if losses[index] >= worth:
            return
        bands[index : index + 2] = [joined[index]]
        joined[index : index + 1] = []
        for left in (index - 1, index):
            if 0 <= left < len(joined):
                joined[left] = _joined(cells, bands[left], bands[left + 1])


def _joined(cells: Cells, one: Band, other: Band) -> Band:
    """Two neighbours as one row: lines through what both had, or the segments of either stretched over both."""
    attempts = [cells.fitted(one.first_bin, other.end_bin, segments) for segments in _joints(one, other)]
    return min(attempts, key=lambda band: (band.cost, len(band.segments)))


def _joints(one: Band, other: Band) -> Iterator[tuple[Segment, ...]]:
    mine, theirs = ([s.candidate for s in band.segments] for band in (one, other))
    if mine == theirs:
        pairs = zip(one.segments, other.segments, strict=True)
        yield tuple(Segment(a.candidate, min(a.first, b.last), b.last) for a, b in pairs)
        return
    for band in (one, other):
        yield tuple(Segment(s.candidate, s.first, s.last) for s in band.segments)


def _without_idle_thresholds(cells: Cells, band: Band) -> Band:
    """``band`` less the segments that hardly change the mean cost, the least useful first."""
    worth = _worth(cells)
    while len(band.segments) > 1:
        shorter = [
            cells.judged(band.first_bin, band.end_bin, _without(band.segments, index))
            for index in range(len(band.segments))
        ]
        best = min(shorter, key=lambda candidate: candidate.cost)
        if best.cost - band.cost >= worth:
            break
        band = best
    return band


def _with(segments: tuple[Segment, ...], index: int, segment: Segment) -> tuple[Segment, ...]:
    return (*segments[:index], segment, *segments[index + 1 :])


def _without(segments: tuple[Segment, ...], index: int) -> tuple[Segment, ...]:
    """``segments`` with one taken out: the one before it (or behind the first) takes its columns."""
    kept = [*segments[:index], *segments[index + 1 :]]
    kept[0] = Segment(kept[0].candidate, 0, 0)
    return tuple(s for i, s in enumerate(kept) if i == 0 or s.candidate != kept[i - 1].candidate)
