"""Timing of interleaved works: GPU time by CUDA-graph replay with a cold L2, and host-inclusive eager time.

Nothing here knows what it times. How many samples are taken, and which of them count, is
:mod:`mla_tune.bench.sampling`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mla_tune.bench.interference import Watch
from mla_tune.bench.sampling import Effort, Sampled, sample_rounds

if TYPE_CHECKING:
    import torch

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class TimedWork:
    """Something to time. With ``baseline`` a sample is the difference of two runs taken back to back.

    The difference serves a step that cannot be launched alone, such as one that a library runs inside the first call
    of another: it is that call less the same call with the step already done, or 0 where that is negative (the step is
    then below what the difference resolves).
    """

    run: Run
    baseline: Run | None = None


class Timer(Protocol):
    """Takes samples of several works in turn."""

    def measure(self, works: Sequence[TimedWork], effort: Effort) -> list[Sampled]:
        """Samples of each work in microseconds."""
        ...


class WallTimer:
    """Host-inclusive time of an eager run: from the first launch to a finished device. On the CPU plain wall time."""

    def __init__(self, synchronize: Run | None = None, before: Run | None = None, watch: Watch | None = None) -> None:
        """``synchronize`` waits for the device; ``before`` runs untimed ahead of each sample (a cache flush)."""
        self._synchronize = synchronize or _nothing
        self._before = before or _nothing
        self._watch = watch

    def measure(self, works: Sequence[TimedWork], effort: Effort) -> list[Sampled]:
        """Samples of each work in microseconds."""
        takes = [self._take(work) for work in works]
        return sample_rounds(takes, effort, self._watch, may_be_zero=_differences(works))

    def _take(self, work: TimedWork) -> Callable[[], float]:
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

    def __init__(self, l2_bytes: int, watch: Watch | None = None) -> None:
        import torch

        self._torch = torch
        self._watch = watch
        self._flush_source = torch.ones(max(2 * l2_bytes, 1 << 20) // 4, dtype=torch.int32, device="cuda")
        self._flush_sink = torch.empty((), dtype=torch.int64, device="cuda")

    def flush(self) -> None:
        """Evict everything from the L2 (asynchronously, on the current stream)."""
        self._torch.sum(self._flush_source, dim=None, out=self._flush_sink)

    def measure(self, works: Sequence[TimedWork], effort: Effort) -> list[Sampled]:
        """Samples of each work in microseconds. Each run must have been called before (warm)."""
        self._torch.cuda.synchronize()
        # One for all captures of a call, whose works may read what another left; the next call's must not share it: a
        # pool without graphs in which tensors live on takes no new ones.
        pool = self._torch.cuda.graph_pool_handle()
        takes = []
        for work in works:
            run = self._capture(work.run, pool)
            baseline = None if work.baseline is None else self._capture(work.baseline, pool)
            takes.append(self._take(run, baseline))
        self._torch.cuda.synchronize()
        for take in takes:
            take()
        return sample_rounds(takes, effort, self._watch, may_be_zero=_differences(works))

    def _capture(self, run: Run, pool: tuple[int, int]) -> Callable[[], float]:
        """A function that replays ``run`` once and gives its microseconds."""
        torch = self._torch
        graph = torch.cuda.CUDAGraph()
        start, end = (_external_event(torch) for _ in range(2))
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=pool):
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


def _differences(works: Sequence[TimedWork]) -> list[bool]:
    """Of which works a sample is a difference, which may be 0."""
    return [work.baseline is not None for work in works]


def _external_event(torch_module: object) -> torch.cuda.Event:
    """An event whose record becomes a node of the graph being captured (``cudaEventRecordExternal``)."""
    event: torch.cuda.Event = torch_module.cuda.Event(enable_timing=True, external=True)  # type: ignore[attr-defined]
    return event


def _nothing() -> None:
    return None
