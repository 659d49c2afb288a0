"""The union of intervals."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mla_tune.trace.busy_time import union_ns

INTERVALS = st.lists(st.tuples(st.integers(-40, 40), st.integers(0, 20)).map(lambda pair: (pair[0], sum(pair))))


@given(INTERVALS)
def test_the_union_is_the_number_of_instants_that_some_interval_covers(intervals: list[tuple[int, int]]) -> None:
    assert union_ns(intervals) == len({instant for begin, end in intervals for instant in range(begin, end)})


@given(INTERVALS, st.randoms())
def test_the_union_is_at_most_the_sum_and_the_order_does_not_matter(
    intervals: list[tuple[int, int]], rng: object
) -> None:
    union = union_ns(intervals)
    assert max((end - begin for begin, end in intervals), default=0) <= union
    assert union <= sum(end - begin for begin, end in intervals)
    assert union_ns(reversed(intervals)) == union


def test_nothing_takes_no_time() -> None:
    assert union_ns([]) == 0
