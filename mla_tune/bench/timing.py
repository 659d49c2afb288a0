"""Timing of interleaved works: GPU time by CUDA-graph replay with a cold L2, and host-inclusive eager time.

Nothing here knows what it times. The works of one call take turns round by round, so that drift of clocks or
temperature meets all of them alike; samples are kept raw and statistics derived from them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

Run = Callable[[], object]

MIN_SAMPLES = 6
"""Fewest samples whose range is a 95 % interval of the median: 1 - 2 * 0.5**6 = 0.97."""


@dataclass(frozen=True, slots=True)
class Work:
    """Something to time. With ``baseline`` a sample is the difference of two runs taken back to back.

    The difference serves a step that cannot be launched alone, such as one that a library runs inside the first call
    of another: it is that call less the same call with the step already done, or 0 where that is negative (the step is
    then below what the difference resolves).
    """

    run: Run
    baseline: Run | None = None


@dataclass(frozen=True, slots=True)
class Effort:
    """When sampling stops: at ``target`` relative confidence half-width, at ``max_samples``, or when time is up."""

    target: float = 0.01
    max_samples: int = 30
    seconds: float = 0.3
    """Time for all works of one call together; never cuts below :data:`MIN_SAMPLES`."""


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


class Timer(Protocol):
    """Takes samples of several works in turn."""

    def measure(self, works: Sequence[Work], effort: Effort) -> list[tuple[float, ...]]:
        """Samples of each work in microseconds, in the order taken."""
        ...


def _sample_rounds(takes: Sequence[Callable[[], float]], effort: Effort) -> list[tuple[float, ...]]:
    """Round-robin over ``takes`` until every median is known well enough or time is up."""
    samples: list[list[float]] = [[] for _ in takes]
    deadline = time.perf_counter() + effort.seconds
    for taken in range(1, effort.max_samples + 1):
        for take, store in zip(takes, samples, strict=True):
            store.append(take())
        if taken < MIN_SAMPLES:
            continue
        if time.perf_counter() > deadline or all(summarize(s).half_width < effort.target for s in samples):
            break
    return [tuple(store) for store in samples]


class WallTimer:
    """Host-inclusive time of an eager run: from the first launch to a finished device. On the CPU plain wall time."""

    def __init__(self, synchronize: Run | None = None, before: Run | None = None) -> None:
        """``synchronize`` waits for the device; ``before`` runs untimed ahead of each sample (a cache flush)."""
        self._synchronize = synchronize or _nothing
        self._before = before or _nothing

    def measure(self, works: Sequence[Work], effort: Effort) -> list[tuple[float, ...]]:
        """Samples of each work in microseconds, in the order taken."""
        return _sample_rounds([self._take(work) for work in works], effort)

    def _take(self, work: Work) -> Callable[[], float]:
        def take() -> float:
            elapsed = self._once(work.run)
            return elapsed if work.baseline is None else max(0.0, elapsed - self._once(work.baseline))

        return take

    def _once(self, run: Run) -> float:
        self._before()
        self._synchronize()
        start = time.perf_counter()
        run()
        self._synchronize()
        return (time.perf_counter() - start) * 1e6


class GraphTimer:
    """GPU time of a captured CUDA graph between two event nodes inside it, L2 cold at the start.

    The events are part of the graph, so the launch of the graph itself is not in the sample. The L2 is made cold by
    *reading* twice its size: what the cache then holds is clean, as it is after the previous layer's weights went
    through; a memset would leave it full of dirty lines, whose write-back the timed kernel would pay for.
    """

    def __init__(self, l2_bytes: int) -> None:
        import torch

        self._torch = torch
        self._flush_source = torch.ones(max(2 * l2_bytes, 1 << 20) // 4, dtype=torch.int32, device="cuda")
        self._flush_sink = torch.empty((), dtype=torch.int64, device="cuda")
        self._pool = torch.cuda.graph_pool_handle()

    def flush(self) -> None:
        """Evict everything from the L2 (asynchronously, on the current stream)."""
        self._torch.sum(self._flush_source, dim=None, out=self._flush_sink)

    def measure(self, works: Sequence[Work], effort: Effort) -> list[tuple[float, ...]]:
        """Samples of each work in microseconds, in the order taken. Each run must have been called before (warm)."""
        self._torch.cuda.synchronize()
        takes = []
        for work in works:
            run = self._capture(work.run)
            baseline = None if work.baseline is None else self._capture(work.baseline)
            takes.append(self._take(run, baseline))
        self._torch.cuda.synchronize()
        for take in takes:
            take()
        return _sample_rounds(takes, effort)

    def _capture(self, run: Run) -> Callable[[], float]:
        """A function that replays ``run`` once and gives its microseconds."""
        torch = self._torch
        graph = torch.cuda.CUDAGraph()
        start, end = (_external_event(torch) for _ in range(2))
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool):
            start.record()
            run()
            end.record()

        def once() -> float:
            self.flush()
            graph.replay()
            torch.cuda.synchronize()
            return float(start.elapsed_time(end)) * 1e3

        return once

    def _take(self, run: Callable[[], float], baseline: Callable[[], float] | None) -> Callable[[], float]:
        if baseline is None:
            return run
        return lambda: max(0.0, run() - baseline())


def _external_event(torch_module: object) -> torch.cuda.Event:
    """An event whose record becomes a node of the graph being captured (``cudaEventRecordExternal``)."""
    event: torch.cuda.Event = torch_module.cuda.Event(enable_timing=True, external=True)  # type: ignore[attr-defined]
    return event


def _nothing() -> None:
    return None
