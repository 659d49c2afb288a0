"""Timers: works take turns, each sample is flushed and waited for, baselines are subtracted. No duration is asserted."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.bench.sampling import MIN_SAMPLES, Effort
from mla_tune.bench.timing import TimedWork, WallTimer

ENDLESS_S = 3600.0


@pytest.mark.parametrize("count", [1, 3])
def test_all_works_get_the_same_number_of_samples_between_the_least_and_the_most(count: int) -> None:
    works = [TimedWork(lambda: sum(range(100))) for _ in range(count)]
    taken = WallTimer().measure(works, Effort(target=0.05, max_samples=9, seconds=ENDLESS_S))
    sizes = {len(entry.samples_us) for entry in taken}
    assert len(taken) == count
    assert len(sizes) == 1
    assert MIN_SAMPLES <= sizes.pop() <= 9
    assert all(sample >= 0 for entry in taken for sample in entry.samples_us)


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(MIN_SAMPLES, 9))
def test_works_take_turns_round_by_round(count: int, rounds: int) -> None:
    calls: list[int] = []
    works = [TimedWork(lambda n=n: calls.append(n)) for n in range(count)]  # type: ignore[misc]
    WallTimer().measure(works, Effort(target=0.0, max_samples=rounds, seconds=ENDLESS_S))
    assert calls == list(range(count)) * rounds


def test_each_run_is_flushed_and_waited_for_before_and_waited_for_after() -> None:
    log: list[str] = []

    def says(word: str) -> Callable[[], None]:
        return lambda: log.append(word)

    timer = WallTimer(synchronize=says("wait"), before=says("flush"))
    timer.measure([TimedWork(says("run"), baseline=says("base"))], Effort(target=0.0, max_samples=MIN_SAMPLES))
    one = ["flush", "wait", "run", "wait", "flush", "wait", "base", "wait"]
    assert log == one * MIN_SAMPLES


def test_a_baseline_that_costs_more_leaves_zero_and_never_a_negative_time() -> None:
    work = TimedWork(lambda: None, baseline=lambda: time.sleep(0.002))
    (taken,) = WallTimer().measure([work], Effort(target=0.0, max_samples=MIN_SAMPLES))
    assert taken.samples_us == (0.0,) * MIN_SAMPLES


def test_an_error_of_a_work_is_the_callers_to_handle() -> None:
    with pytest.raises(ZeroDivisionError):
        WallTimer().measure([TimedWork(lambda: 1 // 0)], Effort())


def test_nothing_to_time_gives_nothing() -> None:
    assert WallTimer().measure([], Effort()) == []


@pytest.mark.gpu
def test_graph_replay_runs_the_captured_work_for_every_sample() -> None:
    import torch

    from mla_tune.bench.timing import GraphTimer

    counter = torch.zeros((), dtype=torch.int64, device="cuda")
    timer = GraphTimer(l2_bytes=1 << 20)
    works = [
        TimedWork(lambda: counter.add_(1)),
        TimedWork(lambda: counter.add_(1000), baseline=lambda: counter.add_(1000)),
    ]
    for work in works:
        work.run()
    taken = timer.measure(works, Effort(target=0.0, max_samples=MIN_SAMPLES))
    assert [len(entry.samples_us) for entry in taken] == [MIN_SAMPLES] * 2
    assert all(sample >= 0 for entry in taken for sample in entry.samples_us)
    replays, rest = divmod(int(counter) - 1001, 1 + 2 * 1000)
    assert rest == 0
    assert replays >= MIN_SAMPLES


@pytest.mark.gpu
def test_a_work_finds_what_another_made_for_as_long_as_both_are_timed() -> None:
    import torch

    from mla_tune.bench.timing import GraphTimer
    from mla_tune.kernels.adapters.provided import Captured

    ones, wrong, kept = torch.ones(1 << 20, device="cuda"), torch.zeros((), device="cuda"), Captured()
    made = [ones.clone()]

    def make() -> None:
        fresh = ones.clone()
        kept.add(made[0], fresh)
        made[0] = fresh

    def read() -> None:
        wrong.add_((made[0] != 1).any())

    def overwrite() -> None:
        torch.full_like(ones, 7.0)  # takes whatever memory of the graphs is free

    def everything() -> None:
        make()
        overwrite()
        read()

    timer = GraphTimer(l2_bytes=1 << 20)
    for _ in range(2):  # the second time what the first left is still alive
        works = [TimedWork(run) for run in (read, make, read, everything, overwrite)]
        timer.measure(works, Effort(target=0.0, max_samples=MIN_SAMPLES))
    assert int(wrong) == 0
