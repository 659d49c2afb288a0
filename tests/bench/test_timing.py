"""Timing: the interval covers what it says, sampling stops by its rules, and works take turns. No duration is asserted."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.bench.timing import MIN_SAMPLES, Effort, Summary, WallTimer, Work, summarize

samples = st.lists(st.floats(0, 1e9), min_size=1, max_size=40)
ENDLESS_S = 3600.0


def coverage(n: int, low: int, high: int) -> float:
    """How often the median lies between two order statistics: each sample is below it with probability 1/2."""
    below = [sum(sides) for sides in product((0, 1), repeat=n)]
    return sum(low < count <= high for count in below) / len(below)


def ranks(n: int) -> tuple[int, int]:
    summary = summarize(list(range(n)))
    return int(summary.low_us), int(summary.high_us)


@pytest.mark.parametrize("n", range(MIN_SAMPLES, 17))
def test_the_interval_is_the_narrowest_symmetric_pair_that_covers_the_median_with_95_percent(n: int) -> None:
    low, high = ranks(n)
    assert low + high == n - 1
    assert coverage(n, low, high) >= 0.95
    if low + 1 < high - 1:
        assert coverage(n, low + 1, high - 1) < 0.95


@pytest.mark.parametrize("n", range(1, MIN_SAMPLES))
def test_too_few_samples_give_their_whole_range(n: int) -> None:
    assert ranks(n) == (0, n - 1)
    assert coverage(n, 0, n - 1) < 0.95


@given(samples, st.randoms())
def test_a_summary_depends_on_the_samples_and_not_on_their_order(taken: list[float], random: object) -> None:
    shuffled = sorted(taken, key=lambda _: random.random())  # type: ignore[attr-defined]
    summary = summarize(taken)
    assert summarize(shuffled) == summary
    assert min(taken) <= summary.low_us <= summary.median_us <= summary.high_us <= max(taken)
    assert summary.half_width >= 0


def test_no_samples_are_refused_and_a_median_of_zero_has_no_relative_width() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarize([])
    assert Summary(0.0, 0.0, 5.0).half_width == 0


@pytest.mark.parametrize("count", [1, 3])
def test_all_works_get_the_same_number_of_samples_between_the_least_and_the_most(count: int) -> None:
    works = [Work(lambda: sum(range(100))) for _ in range(count)]
    taken = WallTimer().measure(works, Effort(target=0.05, max_samples=9, seconds=ENDLESS_S))
    sizes = {len(store) for store in taken}
    assert len(taken) == count
    assert len(sizes) == 1
    assert MIN_SAMPLES <= sizes.pop() <= 9
    assert all(sample >= 0 for store in taken for sample in store)


def test_without_time_there_are_still_enough_samples_for_an_interval() -> None:
    (taken,) = WallTimer().measure([Work(lambda: None)], Effort(target=0.0, max_samples=30, seconds=0.0))
    assert len(taken) == MIN_SAMPLES


def test_an_unreachable_target_ends_at_the_most_samples() -> None:
    (taken,) = WallTimer().measure([Work(lambda: None)], Effort(target=0.0, max_samples=11, seconds=ENDLESS_S))
    assert len(taken) == 11


def test_a_target_that_anything_meets_ends_at_the_fewest_samples() -> None:
    (taken,) = WallTimer().measure([Work(lambda: None)], Effort(target=float("inf"), seconds=ENDLESS_S))
    assert len(taken) == MIN_SAMPLES


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(MIN_SAMPLES, 9))
def test_works_take_turns_round_by_round(count: int, rounds: int) -> None:
    calls: list[int] = []
    works = [Work(lambda n=n: calls.append(n)) for n in range(count)]  # type: ignore[misc]
    WallTimer().measure(works, Effort(target=0.0, max_samples=rounds, seconds=ENDLESS_S))
    assert calls == list(range(count)) * rounds


def test_each_run_is_flushed_and_waited_for_before_and_waited_for_after() -> None:
    log: list[str] = []

    def says(word: str) -> Callable[[], None]:
        return lambda: log.append(word)

    timer = WallTimer(synchronize=says("wait"), before=says("flush"))
    timer.measure([Work(says("run"), baseline=says("base"))], Effort(target=0.0, max_samples=MIN_SAMPLES))
    one = ["flush", "wait", "run", "wait", "flush", "wait", "base", "wait"]
    assert log == one * MIN_SAMPLES


def test_a_baseline_that_costs_more_leaves_zero_and_never_a_negative_time() -> None:
    work = Work(lambda: None, baseline=lambda: time.sleep(0.002))
    (taken,) = WallTimer().measure([work], Effort(target=0.0, max_samples=MIN_SAMPLES))
    assert taken == (0.0,) * MIN_SAMPLES


def test_an_error_of_a_work_is_the_callers_to_handle() -> None:
    with pytest.raises(ZeroDivisionError):
        WallTimer().measure([Work(lambda: 1 // 0)], Effort())


def test_nothing_to_time_gives_nothing() -> None:
    assert WallTimer().measure([], Effort()) == []


@pytest.mark.gpu
def test_graph_replay_runs_the_captured_work_for_every_sample() -> None:
    import torch

    from mla_tune.bench.timing import GraphTimer

    counter = torch.zeros((), dtype=torch.int64, device="cuda")
    timer = GraphTimer(l2_bytes=1 << 20)
    works = [Work(lambda: counter.add_(1)), Work(lambda: counter.add_(1000), baseline=lambda: counter.add_(1000))]
    for work in works:
        work.run()
    taken = timer.measure(works, Effort(target=0.0, max_samples=MIN_SAMPLES))
    assert [len(store) for store in taken] == [MIN_SAMPLES] * 2
    assert all(sample >= 0 for store in taken for sample in store)
    replays, rest = divmod(int(counter) - 1001, 1 + 2 * 1000)
    assert rest == 0
    assert replays >= MIN_SAMPLES
