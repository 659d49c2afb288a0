"""Rounds of samples: when there are enough, which are quarantined, and what can be said of the median.

Nothing here knows what it times. The works of one call take turns round by round, so that drift of clocks or
temperature meets all of them alike; samples are kept raw and statistics derived from them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mla_tune.bench.interference import Disturbance, NoWatch, Watch
from mla_tune.notice import say_once

MIN_SAMPLES = 6
"""Fewest samples whose range is a 95 % interval of the median: 1 - 2 * 0.5**6 = 0.97."""
_CAPPED_ROUNDS = 2
"""Rounds under the power cap, with a rest after each, from which on the cap counts as what this work always meets."""
HEAVY_ROUND_S = 0.02
"""A round that takes as long loads the GPU for a good part of the time over which its power is averaged (about 0.4 s on an
H200): it meets the cap by itself, at once and after any rest."""
_POLL_S = 0.02
NO_TIME = Disturbance("the timer gave no time above 0 for work that ran")


@dataclass(frozen=True, slots=True)
class Effort:
    """When sampling stops: at ``target`` relative confidence half-width, at ``max_samples``, or when time is up."""

    target: float = 0.01
    max_samples: int = 30
    seconds: float = 0.3
    """Time for all works of one call together; never cuts below :data:`MIN_SAMPLES`."""
    patience_s: float = 3.0
    """Further time that disturbed rounds, and the rests after them, may take."""
    rest_s: float = 0.5
    """Longest pause after a disturbed round, so that what disturbed it can pass; it ends when nothing is disturbed any
    more. An H200 needs about 0.4 s to leave its power cap."""
    power_capped: bool = False
    """The works are known to meet the power cap: no round under it is quarantined any more."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Median and its distribution-free confidence interval."""

    median_us: float
    low_us: float
    high_us: float

    @property
    def half_width(self) -> float:
        """Half of the interval over the median; 0 for a median of 0."""
        return (self.high_us - self.low_us) / 2 / self.median_us if self.median_us > 0 else 0.0


def summarize(samples_us: Sequence[float]) -> Summary:
    """Median with the narrowest symmetric pair of order statistics that covers it with at least 95 %.

    Coverage of (k-th smallest, k-th largest) is 1 - 2 * P(Binomial(n, 1/2) < k); see any text on distribution-free
    inference. Below :data:`MIN_SAMPLES` samples the whole range is given, which covers less.
    """
    ordered = sorted(samples_us)
    n = len(ordered)
    if n == 0:
        raise ValueError("no samples to summarize")
    rank, tail = 0, 0.5**n
    while rank + 1 < n / 2:
        next_tail = tail + math.comb(n, rank + 1) * 0.5**n
        if 2 * next_tail > 0.05:
            break
        rank, tail = rank + 1, next_tail
    return Summary(statistics.median(ordered), ordered[rank], ordered[n - 1 - rank])


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was taken of one work."""

    samples_us: tuple[float, ...]
    """At least :data:`MIN_SAMPLES`, or none where every round was disturbed; in the order taken."""
    precise: bool
    """Sampling reached its target; otherwise time or samples ran out first."""
    quarantined: tuple[tuple[str, tuple[float, ...]], ...] = ()
    """Disturbed samples by reason."""
    power_capped: bool = False
    """Some of the samples were taken under the power cap, which did not go away."""
    heavy: bool = False
    """A round of all works took :data:`HEAVY_ROUND_S` or more."""


class _Rounds:
    """The samples of all works so far, the disturbed ones apart."""

    def __init__(self, count: int, power_capped: bool) -> None:
        self._clean: list[list[float]] = [[] for _ in range(count)]
        self._disturbed: dict[str, list[list[float]]] = {}
        self._capped = _CAPPED_ROUNDS if power_capped else 0
        self._counted_capped = False
        self._heavy = False

    @property
    def taken(self) -> int:
        return len(self._clean[0])

    def add(self, samples: Sequence[float], disturbance: Disturbance | None, took_s: float) -> bool:
        """Keep one round; false if it went into quarantine."""
        self._heavy |= took_s >= HEAVY_ROUND_S
        if disturbance is None or (disturbance.power_capped and self._capped >= _CAPPED_ROUNDS):
            self._counted_capped |= disturbance is not None
            for store, sample in zip(self._clean, samples, strict=True):
                store.append(sample)
            return True
        if disturbance.power_capped:
            self._capped += _CAPPED_ROUNDS if self._heavy else 1
        stores = self._disturbed.setdefault(disturbance.reason, [[] for _ in samples])
        for store, sample in zip(stores, samples, strict=True):
            store.append(sample)
        return False

    def precise(self, target: float) -> bool:
        return all(_half_width(store) < target for store in self._clean)

    def results(self, target: float) -> list[Sampled]:
        if self.taken < MIN_SAMPLES:  # the interval of so few would cover less than it says
            reason = f"only {self.taken} undisturbed rounds"
            self._disturbed |= {reason: self._clean} if self.taken else {}
            self._clean = [[] for _ in self._clean]
        return [
            Sampled(
                samples_us=tuple(store),
                precise=bool(store) and _half_width(store) < target,
                quarantined=tuple((reason, tuple(kept[index])) for reason, kept in self._disturbed.items()),
                power_capped=self._counted_capped and bool(store),
                heavy=self._heavy,
            )
            for index, store in enumerate(self._clean)
        ]


def sample_rounds(
    takes: Sequence[Callable[[], float]],
    effort: Effort,
    watch: Watch | None = None,
    rest: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.perf_counter,
    may_be_zero: Sequence[bool] = (),
) -> list[Sampled]:
    """Round-robin over ``takes``, each giving one sample in microseconds, until every median is known well enough.

    A round that ``watch`` says was disturbed goes into quarantine and is taken again after a rest. The power cap is
    given two rests to go away, or none where a round is long enough to meet it by itself; work that meets it all the
    same is timed under it, as it will be served under it.

    Nothing runs in no time: a round in which a sample is not above 0 goes into quarantine too, unless ``may_be_zero`` says
    of that work that its samples are differences.
    """
    if not takes:
        return []
    may_be_zero = may_be_zero or [False] * len(takes)
    watch = watch or NoWatch()
    rounds = _Rounds(len(takes), effort.power_capped)
    watch.disturbance()  # what happened before the first round is none of its business
    deadline, lost_s = clock() + effort.seconds, 0.0
    while rounds.taken < effort.max_samples:
        start = clock()
        samples = [take() for take in takes]
        took_s = clock() - start
        disturbance = watch.disturbance()
        if any(not _is_a_time(sample, zero) for sample, zero in zip(samples, may_be_zero, strict=True)):
            samples, disturbance = [_storable(sample) for sample in samples], NO_TIME
            say_once(f"{NO_TIME.reason}: such rounds do not count")
        if not rounds.add(samples, disturbance, took_s):
            if took_s < HEAVY_ROUND_S:
                _rest(effort.rest_s, watch, rest)
            lost_s += clock() - start
            if lost_s > effort.patience_s:
                break
        elif rounds.taken >= MIN_SAMPLES and (clock() > deadline + lost_s or rounds.precise(effort.target)):
            break
    return rounds.results(effort.target)


def _is_a_time(sample_us: float, may_be_zero: bool) -> bool:
    return math.isfinite(sample_us) and (sample_us > 0 or (may_be_zero and sample_us == 0))


def _storable(sample_us: float) -> float:
    """What a quarantine can hold of a sample that no timer should give."""
    return max(0.0, sample_us) if math.isfinite(sample_us) else 0.0


def _rest(longest_s: float, watch: Watch, rest: Callable[[float], None]) -> None:
    """Pause until nothing is disturbed any more, or as long as allowed."""
    for _ in range(max(1, round(longest_s / _POLL_S))):
        rest(_POLL_S)
        if watch.disturbance() is None:
            return


def _half_width(samples_us: Sequence[float]) -> float:
    return summarize(samples_us).half_width
