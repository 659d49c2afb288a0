"""Sampling: the interval covers what it says, rounds stop by their rules, and what was disturbed counts for nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tune.bench.interference import Disturbance
from mla_tune.bench.sampling import MIN_SAMPLES, NO_TIME, Effort, Sampled, Summary, sample_rounds, summarize

ENDLESS_S = 3600.0
BUSY = Disturbance("another process used the GPU: pid 482")
CAPPED = Disturbance("throttled: power cap", power_capped=True)
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


class Scripted:
    """A watch that sees what it was told to, round by round, and nothing after that; calm while nobody samples."""

    def __init__(self, found: Iterable[Disturbance | None]) -> None:
        self._found: Iterator[Disturbance | None] = iter(found)
        self.sampled = False

    def disturbance(self) -> Disturbance | None:
        if not self.sampled:
            return None
        self.sampled = False
        return next(self._found, None)


def sampled(found: Iterable[Disturbance | None], effort: Effort, round_s: float = 0.0) -> tuple[Sampled, list[float]]:
    """What is taken of one work whose samples count up from 100 and last ``round_s`` each, and the rests in between."""
    rests: list[float] = []
    samples = iter(range(100, 10_000))
    now_s = 0.0
    watch = Scripted(found)

    def take() -> float:
        nonlocal now_s
        now_s += round_s
        watch.sampled = True
        return float(next(samples))

    (taken,) = sample_rounds([take], effort, watch, rest=rests.append, clock=lambda: now_s)
    return taken, rests


def test_without_time_there_are_still_enough_samples_for_an_interval() -> None:
    taken, _ = sampled([], Effort(target=0.0, max_samples=30, seconds=0.0), round_s=1.0)
    assert len(taken.samples_us) == MIN_SAMPLES
    assert not taken.precise


def test_an_unreachable_target_ends_at_the_most_samples_and_says_that_it_was_not_reached() -> None:
    taken, _ = sampled([], Effort(target=0.0, max_samples=11, seconds=ENDLESS_S))
    assert (len(taken.samples_us), taken.precise) == (11, False)


def test_a_target_that_anything_meets_ends_at_the_fewest_samples() -> None:
    taken, _ = sampled([], Effort(target=float("inf"), seconds=ENDLESS_S))
    assert (len(taken.samples_us), taken.precise) == (MIN_SAMPLES, True)


def test_sampling_goes_on_until_the_half_width_is_under_the_target() -> None:
    samples = iter([100.0, 140.0] * 3 + [120.0] * 40)
    (taken,) = sample_rounds([lambda: next(samples)], Effort(target=0.01, max_samples=40, seconds=ENDLESS_S))
    assert taken.precise
    assert MIN_SAMPLES < len(taken.samples_us) < 40
    assert summarize(taken.samples_us).half_width < 0.01
    assert summarize(taken.samples_us[:-1]).half_width >= 0.01


def test_of_two_works_each_says_for_itself_whether_it_is_precise() -> None:
    noisy = iter([100.0, 200.0] * 20)
    quiet, loud = sample_rounds(
        [lambda: 5.0, lambda: next(noisy)], Effort(target=0.01, max_samples=9, seconds=ENDLESS_S)
    )
    assert (quiet.precise, loud.precise) == (True, False)
    assert len(quiet.samples_us) == len(loud.samples_us) == 9


@given(st.lists(st.sampled_from([None, BUSY, CAPPED]), max_size=40), st.integers(MIN_SAMPLES, 12))
def test_every_sample_is_kept_once_and_a_disturbed_one_is_in_no_statistic(
    found: list[Disturbance | None], most: int
) -> None:
    taken, rests = sampled(found, Effort(target=0.0, max_samples=most, seconds=ENDLESS_S, patience_s=ENDLESS_S))
    quarantined = [sample for _, samples in taken.quarantined for sample in samples]
    assert sorted([*taken.samples_us, *quarantined]) == list(range(100, 100 + most + len(rests)))
    assert len(taken.samples_us) == most
    assert len(rests) == len(quarantined)
    # Round n gave sample 100 + n. All that was not seen to be disturbed counts, and of the rest only what came under
    # the power cap once two rests had not helped.
    capped = 0
    for number, disturbance in enumerate(found[: most + len(rests)]):
        counts = disturbance is None or (disturbance is CAPPED and capped >= 2)
        capped += disturbance is CAPPED
        assert (100.0 + number in taken.samples_us) is counts
    assert taken.power_capped is (capped > 2)


def test_work_that_is_known_to_meet_the_power_cap_is_timed_under_it_at_once() -> None:
    effort = Effort(target=0.0, max_samples=8, seconds=ENDLESS_S, power_capped=True)
    taken, rests = sampled([None, CAPPED, CAPPED, BUSY, CAPPED], effort)
    assert (len(taken.samples_us), taken.power_capped, len(rests)) == (8, True, 1)
    assert [reason for reason, _ in taken.quarantined] == [BUSY.reason]
    calm, _ = sampled([], effort)
    assert not calm.power_capped


def test_a_round_long_enough_to_meet_the_power_cap_by_itself_is_taken_again_at_once_and_then_counts() -> None:
    effort = Effort(target=0.0, max_samples=8, seconds=ENDLESS_S)
    taken, rests = sampled([CAPPED] * 20, effort, round_s=0.05)
    assert (len(taken.samples_us), taken.power_capped, taken.heavy, rests) == (8, True, True, [])
    assert taken.quarantined == ((CAPPED.reason, (100.0,)),)
    light, rests = sampled([CAPPED] * 20, effort, round_s=0.001)
    assert (light.heavy, len(rests)) == (False, 2)
    assert light.quarantined == ((CAPPED.reason, (100.0, 101.0)),)


@pytest.mark.parametrize(("readings", "pauses"), [(1, 1), (4, 4), (1000, 25)])
def test_a_rest_ends_when_nothing_is_disturbed_any_more_or_when_it_has_lasted_long_enough(
    readings: int, pauses: int
) -> None:
    class Lasting:
        """Calm, then disturbed for so many readings."""

        left = readings + 1

        def disturbance(self) -> Disturbance | None:
            if self.left > readings:  # the one before the first round
                self.left -= 1
                return None
            self.left -= 1
            return BUSY if self.left >= 0 else None

    rests: list[float] = []
    effort = Effort(max_samples=1, rest_s=0.5, patience_s=-1.0)
    sample_rounds([lambda: 1.0], effort, Lasting(), rest=rests.append, clock=lambda: 0.0)
    assert len(rests) == pauses
    assert sum(rests) <= 0.5 + 1e-9


def test_a_disturbance_that_does_not_end_leaves_quarantined_samples_only() -> None:
    taken, _ = sampled([BUSY] * 1000, Effort(patience_s=3.0), round_s=0.25)
    assert taken.samples_us == ()
    assert not taken.precise
    assert taken.quarantined == ((BUSY.reason, tuple(float(100 + n) for n in range(13))),)


def test_fewer_undisturbed_samples_than_make_an_interval_are_quarantined_too() -> None:
    taken, _ = sampled([None, None, *[BUSY] * 1000], Effort(target=0.0, patience_s=3.0), round_s=0.25)
    assert taken.samples_us == ()
    assert dict(taken.quarantined)["only 2 undisturbed rounds"] == (100.0, 101.0)


def test_disturbances_do_not_shorten_the_time_for_undisturbed_samples() -> None:
    effort = Effort(target=0.0, max_samples=30, seconds=2.0, patience_s=ENDLESS_S)
    calm, _ = sampled([], effort, round_s=0.1)
    late, _ = sampled([BUSY] * 5, effort, round_s=0.1)
    assert len(late.samples_us) == len(calm.samples_us) > MIN_SAMPLES


@pytest.mark.parametrize("broken", [0.0, -0.0, -3.5, float("nan"), float("inf"), float("-inf")])
def test_a_whole_path_that_took_no_time_is_no_evidence(
    broken: float, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mla_tune.notice._said", set())
    effort = Effort(target=0.0, max_samples=8, seconds=0.0, patience_s=0.0)
    good, bad = sample_rounds([lambda: 5.0, lambda: broken], effort, rest=lambda _: None)
    assert good.samples_us == bad.samples_us == ()
    for taken in (good, bad):  # a row that a database takes
        (reason, samples), *_ = taken.quarantined
        assert reason == NO_TIME.reason
        assert all(sample >= 0 and sample < float("inf") for sample in samples)
    assert caplog.messages == [f"{NO_TIME.reason}: such rounds do not count"]


def test_a_timer_that_stands_still_for_a_moment_costs_those_rounds() -> None:
    samples = iter([5.0, 0.0, 6.0, -1.0, *[7.0] * 40])
    effort = Effort(target=0.0, max_samples=8, seconds=ENDLESS_S, patience_s=ENDLESS_S)
    (taken,) = sample_rounds([lambda: next(samples)], effort, rest=lambda _: None)
    assert taken.samples_us == (5.0, 6.0, *[7.0] * 6)
    assert taken.quarantined == ((NO_TIME.reason, (0.0, 0.0)),)


def test_a_difference_may_be_zero_and_not_less() -> None:
    effort = Effort(target=0.0, max_samples=8, seconds=ENDLESS_S, patience_s=0.0)
    (taken,) = sample_rounds([lambda: 0.0], effort, may_be_zero=[True])
    assert taken.samples_us == (0.0,) * 8
    (taken,) = sample_rounds([lambda: -1.0], effort, rest=lambda _: None, may_be_zero=[True])
    assert taken.samples_us == ()


def test_nothing_to_time_gives_nothing() -> None:
    assert sample_rounds([], Effort()) == []
