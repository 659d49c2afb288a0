"""The threshold search, against brute force and against its own promises."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.fit import segments as search
from mla_tune.fit.segments import Band, Cells, Segment, few_bands, few_groups
from mla_tune.fit.training import bin_middle, bin_start

WORTH = 1e-3
UNIT = 1_000_000
"""A mean cost of :data:`WORTH` of one shape, in units."""
TOKENS = np.array([1, 2, 4, 8, 16, 32, 64], dtype=np.int64)


def best_segments(costs: np.ndarray, threshold_cost: int) -> tuple[tuple[int, int], ...]:
    """Of one bin, searched together with others that must not matter."""
    bins = np.stack([costs[:, ::-1], costs, costs + 1])
    return search.best_segments(bins, np.array([3, threshold_cost, 0]))[1]


def _cost(costs: np.ndarray, choice: tuple[int, ...], threshold_cost: int) -> int:
    switches = sum(a != b for a, b in pairwise(choice))
    return sum(int(costs[c, j]) for j, c in enumerate(choice)) + switches * threshold_cost


def _choice(segments: tuple[tuple[int, int], ...], num_columns: int) -> tuple[int, ...]:
    starts = [column for column, _ in segments]
    return tuple(segments[int(np.searchsorted(starts, j, side="right")) - 1][1] for j in range(num_columns))


cost_tables = st.integers(1, 3).flatmap(
    lambda candidates: st.lists(
        st.lists(st.integers(0, 9), min_size=5, max_size=5), min_size=candidates, max_size=candidates
    )
)


@settings(max_examples=80, deadline=None)
@given(cost_tables, st.integers(0, 6))
def test_segments_are_as_cheap_as_the_best_of_all_assignments(table: list[list[int]], threshold_cost: int) -> None:
    costs = np.array(table, dtype=np.int64)
    segments = best_segments(costs, threshold_cost)
    assert segments[0][0] == 0
    found = _cost(costs, _choice(segments, 5), threshold_cost)
    assert found == min(_cost(costs, c, threshold_cost) for c in product(range(len(costs)), repeat=5))


@settings(max_examples=50, deadline=None)
@given(cost_tables, st.integers(0, 6))
def test_a_dominated_candidate_changes_nothing(table: list[list[int]], threshold_cost: int) -> None:
    costs = np.array(table, dtype=np.int64)
    worse = np.vstack([costs, costs.max(axis=0, keepdims=True)])
    assert best_segments(worse, threshold_cost) == best_segments(costs, threshold_cost)


def test_a_tie_goes_to_the_incumbent() -> None:
    assert best_segments(np.full((3, 6), 4, dtype=np.int64), 1) == ((0, 0),)


def test_a_threshold_that_gains_less_than_it_costs_is_left_out() -> None:
    costs = np.array([[0, 0, 3, 3], [9, 9, 0, 0]], dtype=np.int64)
    assert best_segments(costs, 7) == ((0, 0),)
    assert best_segments(costs, 5) == ((0, 0), (2, 1))


def _cells(costs: np.ndarray, shapes: int | None = None) -> Cells:
    """Bins 10, 11, ... of context tokens; ``costs`` (num_bins, num_candidates, num_columns)."""
    num_bins, _, num_columns = costs.shape
    return Cells(
        costs=costs,
        counts=np.full(num_bins, num_columns),
        tokens=TOKENS[:num_columns],
        starts=np.array([bin_start(10 + index) for index in range(num_bins + 1)]),
        middles=np.array([bin_middle(10 + index) for index in range(num_bins)]),
        worth=WORTH,
        shapes=num_bins * num_columns if shapes is None else shapes,
    )


def _random_cells(num_bins: int, seed: int, groups: int = 1, candidates: int = 2) -> list[Cells]:
    random = np.random.default_rng(seed)
    shape = (num_bins, candidates, len(TOKENS))
    drawn = [random.integers(0, 20 * UNIT, shape) for _ in range(groups)]
    return [_cells(costs, groups * num_bins * len(TOKENS)) for costs in drawn]


def _by_hand(cells: Cells, bands: tuple[Band, ...]) -> int:
    """What the bands cost, threshold by threshold and cell by cell."""
    total = 0
    for band in bands:
        start, end = cells.starts[band.first_bin], cells.starts[band.end_bin]
        for index in range(band.first_bin, band.end_bin):
            share = (cells.middles[index] - start) / (end - start)
            for column, tokens in enumerate(cells.tokens):
                chosen = [s.candidate for s in band.segments if tokens >= s.first + (s.last - s.first) * share][-1]
                total += int(cells.costs[index, chosen, column])
    return total


seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), seeds, st.integers(2, 3))
def test_rows_cover_every_bin_once_and_cost_what_they_say(num_bins: int, seed: int, candidates: int) -> None:
    (cells,) = _random_cells(num_bins, seed, candidates=candidates)
    bands = few_bands(cells)
    assert [band.first_bin for band in bands] == [0, *(band.end_bin for band in bands)][: len(bands)]
    assert bands[-1].end_bin == num_bins
    assert sum(band.cost for band in bands) == _by_hand(cells, bands)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), seeds, st.integers(2, 3))
def test_thresholds_ascend_at_both_ends_of_a_row(num_bins: int, seed: int, candidates: int) -> None:
    (cells,) = _random_cells(num_bins, seed, candidates=candidates)
    for band in few_bands(cells):
        assert (band.segments[0].first, band.segments[0].last) == (0, 0)
        for before, after in pairwise(band.segments):
            assert before.first < after.first
            assert before.last < after.last
            assert before.candidate != after.candidate


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), seeds)
def test_no_threshold_that_is_left_could_go_for_less_than_it_is_worth(num_bins: int, seed: int) -> None:
    (cells,) = _random_cells(num_bins, seed)
    for band in few_bands(cells):
        for index in range(len(band.segments) if len(band.segments) > 1 else 0):
            kept = [segment for i, segment in enumerate(band.segments) if i != index]
            kept[0] = Segment(kept[0].candidate, 0, 0)
            shorter = cells.judged(band.first_bin, band.end_bin, tuple(kept))
            assert shorter.cost - band.cost >= WORTH * 1e9 * cells.shapes


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), seeds, st.integers(1, 4))
def test_groups_cover_every_range_of_requests_once(num_bins: int, seed: int, groups: int) -> None:
    found = few_groups(_random_cells(num_bins, seed, groups))
    firsts = [first for first, _ in found]
    assert firsts[0] == 0
    assert firsts == sorted(set(firsts))
    assert firsts[-1] < groups


def test_bins_and_request_ranges_that_agree_become_one_row() -> None:
    costs = np.tile(np.array([[0, 0, 8], [8, 8, 0]]) * 100 * UNIT, (5, 1, 1))
    ((first, bands),) = few_groups([_cells(costs, shapes=45)] * 3)
    assert first == 0
    assert len(bands) == 1


def test_a_crossover_that_rises_with_the_context_is_one_slanted_row() -> None:
    costs = np.zeros((6, 2, len(TOKENS)), dtype=np.int64)
    for index in range(6):
        costs[index, 0, bin_middle(10 + index) / 8 > TOKENS] = 50 * UNIT
        costs[index, 1, bin_middle(10 + index) / 8 <= TOKENS] = 50 * UNIT
    (band,) = few_bands(_cells(costs))
    assert band.cost == 0
    assert [segment.candidate for segment in band.segments] == [1, 0]
    assert band.segments[1].first < band.segments[1].last
