"""The threshold search, against brute force and against its own promises."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.learn.segments import PER_MILLE, Cells, Segment, best_segments, few_bands


def _cost(costs: np.ndarray, choice: tuple[int, ...], threshold_cost: int) -> int:
    switches = sum(a != b for a, b in pairwise(choice))
    return sum(int(costs[c, j]) for j, c in enumerate(choice)) + switches * threshold_cost


def _choice(segments: tuple[Segment, ...], num_columns: int) -> tuple[int, ...]:
    starts = [segment.first_column for segment in segments]
    return tuple(segments[int(np.searchsorted(starts, j, side="right")) - 1].candidate for j in range(num_columns))


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
    assert segments[0].first_column == 0
    found = _cost(costs, _choice(segments, 5), threshold_cost)
    assert found == min(_cost(costs, c, threshold_cost) for c in product(range(len(costs)), repeat=5))


@settings(max_examples=50, deadline=None)
@given(cost_tables, st.integers(0, 6))
def test_a_dominated_candidate_changes_nothing(table: list[list[int]], threshold_cost: int) -> None:
    costs = np.array(table, dtype=np.int64)
    worse = np.vstack([costs, costs.max(axis=0, keepdims=True)])
    assert best_segments(worse, threshold_cost) == best_segments(costs, threshold_cost)


def test_a_tie_goes_to_the_incumbent() -> None:
    assert best_segments(np.full((3, 6), 4, dtype=np.int64), 1) == (Segment(0, 0),)


def test_a_threshold_that_gains_less_than_it_costs_is_left_out() -> None:
    costs = np.array([[0, 0, 3, 3], [9, 9, 0, 0]], dtype=np.int64)
    assert best_segments(costs, 7) == (Segment(0, 0),)
    assert best_segments(costs, 5) == (Segment(0, 0), Segment(2, 1))


def _random_cells(num_bins: int, seed: int) -> Cells:
    slowdowns = np.random.default_rng(seed).integers(0, 20 * PER_MILLE, (num_bins, 2, 7))
    return Cells(2 * slowdowns, slowdowns, np.full(num_bins, 7))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_rows_cover_every_bin_once(num_bins: int, seed: int) -> None:
    bands = few_bands(_random_cells(num_bins, seed))
    assert [band.first_bin for band in bands] == [0, *(band.end_bin for band in bands)][: len(bands)]
    assert bands[-1].end_bin == num_bins


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_no_step_that_is_left_could_go_for_less_than_a_tenth_of_a_percent(num_bins: int, seed: int) -> None:
    cells = _random_cells(num_bins, seed)
    bands = few_bands(cells)
    for before, after in pairwise(bands):
        joined = cells.band(before.first_bin, after.end_bin)
        assert joined.slowdown - before.slowdown - after.slowdown >= cells.negligible
    for band in bands:
        for index in range(len(band.segments) if len(band.segments) > 1 else 0):
            kept = [segment for i, segment in enumerate(band.segments) if i != index]
            kept[0] = Segment(0, kept[0].candidate)
            shorter = cells.judged(band.first_bin, band.end_bin, tuple(kept))
            assert shorter.slowdown - band.slowdown >= cells.negligible


def test_bins_that_agree_become_one_row() -> None:
    costs = np.tile(np.array([[0, 0, 8], [8, 8, 0]]) * 100 * PER_MILLE, (5, 1, 1))
    assert len(few_bands(Cells(costs, costs, np.full(5, 3)))) == 1
