"""Measuring one point: build inputs, check every candidate against the reference, then time them in turn.

Runs inside the worker process. Correct before fast: a candidate that differs from the reference, or leaves output
unwritten, is not timed, and one that does so after it was timed loses its timings. A failure is an outcome of that
candidate and not an exception, unless it has taken the device's context with it.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mla_tune.bench.interference import NoWatch, Watch, watch_gpu
from mla_tune.bench.numerics import poisoned_memory
from mla_tune.bench.sampling import MIN_SAMPLES, Effort, Sampled, summarize
from mla_tune.bench.timing import GraphTimer, TimedWork, Timer, WallTimer
from mla_tune.kernels import binding
from mla_tune.kernels.inputs import InputBuilder, required_bytes
from mla_tune.kernels.prepared import BoundStage, PreparedPath
from mla_tune.sites.site import SiteName
from mla_tune.store.measurement import (
    PER_FORWARD_TOTAL,
    PER_LAYER_TOTAL,
    Measurement,
    Outcome,
    Quarantined,
    Regime,
    Stop,
)
from mla_tune.sweep.grid import Point
from mla_tune.sweep.outcomes import NO_SAMPLES, Failure, failures, too_large, total_part
from mla_tune.sweep.worker.correctness import AttentionJudge, IndexerJudge, Judge
from mla_tune.sweep.worker.failure import failure_of, is_out_of_memory, one_line
from mla_tune.sweep.worker.messages import TIMING, Task


@dataclass(frozen=True, slots=True)
class _Ready:
    """A candidate that gave the right answer, with what its first call cost."""

    prepared: PreparedPath
    judge: Judge
    first_call_s: float
    workspace_bytes: int


class PointMeasurer:
    """Measures points on one device, keeping the input pools between them."""

    def __init__(
        self, kind: str, seed: int | None = None, watch: Watch | None = None, gpu_time_only: bool = False
    ) -> None:
        """``seed`` of the random inputs, drawn where there is none; ``watch`` sees what disturbs samples.

        ``gpu_time_only`` leaves host-inclusive samples out on a GPU.
        """
        self.device = binding.Device.current(kind)
        self._builder = InputBuilder(self.device.torch_device, secrets.randbits(62) if seed is None else seed)
        self._timers: list[tuple[Regime, Timer, Effort]] = []
        if kind == "cpu":
            wall = WallTimer(watch=watch or NoWatch())
            self._timers.append((Regime.EAGER, wall, Effort(seconds=0.25, max_samples=15)))
        else:
            l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
            torch.zeros(1, device="cuda")  # the context, which the watch must know as this process's own
            watch = watch or watch_gpu()
            graph = GraphTimer(l2_bytes, watch)
            eager = WallTimer(torch.cuda.synchronize, before=graph.flush, watch=watch)
            self._timers.append((Regime.GRAPH, graph, Effort()))
            # Host time scatters by a few percent whatever is done: more samples would only spend the budget.
            if not gpu_time_only:
                self._timers.append((Regime.EAGER, eager, Effort(max_samples=MIN_SAMPLES)))

    @property
    def regimes(self) -> tuple[Regime, ...]:
        """Timing regimes of this device."""
        return tuple(regime for regime, _, _ in self._timers)

    @property
    def gpu_time(self) -> tuple[InputBuilder, Timer, Effort]:
        """What one kernel alone is timed with: the inputs' builder, and the first timer, of GPU time where there is one."""
        _, timer, effort = self._timers[0]
        return self._builder, timer, effort

    def measure(self, task: Task, enter: Callable[[str], None]) -> Iterator[Measurement]:
        """Rows of every candidate of the task. ``enter`` is told which one runs next, in case it kills this process."""
        point, names = task.point, task.candidates
        self.device = replace(self.device, launches=task.launches)
        ready: dict[str, _Ready] = {}
        try:
            self.require_memory(point)
            judge = self.judge(point)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._builder.release()
            for name in names:
                yield from failures(point, name, Failure(Outcome.NO_MEMORY, one_line(error)), self.regimes)
            return
        for name in names:
            enter(name)
            result = self._prepare(point, name, judge)
            if isinstance(result, Failure):
                yield from failures(point, name, result, self.regimes)
            else:
                ready[name] = result
        if not task.timed:
            yield from (_right(point, name, entry) for name, entry in ready.items())
            return
        enter(TIMING)
        yield from self._time_fairly(task, ready)

    def require_memory(self, point: Point) -> None:
        """Raise ``torch.OutOfMemoryError`` for inputs that would not fit, before any is built."""
        if point.site.name is SiteName.INDEXER_METADATA:
            return
        needed = required_bytes(point.site, point.built)
        capacity = _memory_bytes(self.device)
        if needed > capacity:
            raise torch.OutOfMemoryError(too_large(needed, capacity))

    def judge(self, point: Point) -> Judge:
        """Fresh inputs of ``point`` and the judge of what candidates make of them."""
        if point.site.name is SiteName.INDEXER_METADATA:
            return IndexerJudge(point.site, self._builder.context_lens(point.site, point.built), self.device)
        return AttentionJudge(self._builder.attention(point.site, point.built), self.device)

    def _prepare(self, point: Point, name: str, judge: Judge) -> _Ready | Failure:
        reason = binding.unsupported(point.site, name, self.device)
        if reason is not None:
            return Failure(Outcome.UNSUPPORTED, reason)
        try:
            prepared = judge.prepare(name)
            judge.poison()
            prepared.poison()
            with poisoned_memory():
                start = time.perf_counter()
                peak = self._peak_bytes(prepared.run)
                first_call_s = time.perf_counter() - start
            wrong = judge.verdict(prepared.result())
        except Exception as error:  # a candidate may raise anything; its failure must cost its own row only
            return failure_of(error, self.device.kind)
        if wrong is not None:
            return Failure(Outcome.WRONG_RESULT, wrong)
        output_bytes = prepared.result().nbytes
        return _Ready(prepared, judge, first_call_s, prepared.buffer_bytes() + max(0, peak - output_bytes))

    def _peak_bytes(self, run: Callable[[], object]) -> int:
        """Run once and give the device memory that it took on top, output included; 0 on the CPU (not observable)."""
        if self.device.kind == "cpu":
            run()
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _time_fairly(self, task: Task, ready: dict[str, _Ready]) -> Iterator[Measurement]:
        """Time all candidates in turn; if that fails, each alone, so that the failure falls on the one that fails."""
        point = task.point
        try:
            rows = self._time(task, ready)
            wrong = {name: reason for name, entry in ready.items() if (reason := self._wrong_by_now(entry)) is not None}
        except Exception as error:  # see _prepare
            failure = failure_of(error, self.device.kind)
            if len(ready) == 1:
                yield from failures(point, next(iter(ready)), failure, self.regimes)
                return
            for name, entry in ready.items():
                yield from self._time_fairly(task, {name: entry})
            return
        yield from (row for row in rows if row.candidate not in wrong)
        for name, reason in wrong.items():
            failure = Failure(Outcome.WRONG_RESULT, f"right before it was timed, then: {reason}")
            yield from failures(point, name, failure, self.regimes)

    @staticmethod
    def _wrong_by_now(entry: _Ready) -> str | None:
        """What is wrong with another run after all the timed ones; None if nothing is."""
        entry.judge.poison()
        entry.prepared.poison()
        with poisoned_memory():
            entry.prepared.run()
        return entry.judge.verdict(entry.prepared.result())

    def _time(self, task: Task, ready: dict[str, _Ready]) -> list[Measurement]:
        labels, works = [], []
        for name, entry in ready.items():
            for part, work in parts(entry.prepared).items():
                labels.append((name, part))
                works.append(work)
        rows: list[Measurement] = []
        power_capped = heavy = False
        for regime, timer, effort in self._timers:
            if heavy and regime is Regime.EAGER:  # milliseconds of GPU time: some 70 us of launches are lost in them
                continue
            # What met the power cap in one regime meets it in the next.
            seconds = effort.seconds if task.sampling_s is None else min(effort.seconds, task.sampling_s)
            effort = replace(effort, power_capped=power_capped, seconds=seconds)
            samples = dict(zip(labels, timer.measure(works, effort), strict=True)) if works else {}
            power_capped = any(taken.power_capped for taken in samples.values())
            heavy = any(taken.heavy for taken in samples.values())
            rows += [
                _row(task.point, ready[name], name, label, regime, taken)
                for (name, part), taken in samples.items()
                for label in (part, *_aliases(ready[name].prepared, part))
            ]
        return rows


def _row(point: Point, entry: _Ready, name: str, part: str, regime: Regime, taken: Sampled) -> Measurement:
    row = Measurement(
        site=point.site,
        shape=point.shape,
        role=point.role,
        candidate=name,
        part=part,
        regime=regime,
        outcome=Outcome.OK,
        first_call_s=entry.first_call_s,
        workspace_bytes=entry.workspace_bytes,
        quarantined=tuple(Quarantined(reason, samples_us) for reason, samples_us in taken.quarantined),
    )
    if not taken.samples_us:
        reasons = "; ".join(entry.reason for entry in row.quarantined)
        return replace(row, outcome=Outcome.DISTURBED, detail=f"{NO_SAMPLES}{reasons}")
    summary = summarize(taken.samples_us)
    return replace(
        row,
        latency_us=summary.median_us,
        ci_low_us=summary.low_us,
        ci_high_us=summary.high_us,
        num_samples=len(taken.samples_us),
        samples_us=taken.samples_us,
        stopped_by=Stop.PRECISION if taken.precise else Stop.BUDGET,
        power_capped=taken.power_capped,
    )


def _right(point: Point, name: str, entry: _Ready) -> Measurement:
    """A row that says only that a candidate's output is right, and what its first call cost."""
    part, regime = total_part(point), Regime.EAGER
    return Measurement(
        point.site, point.shape, point.role, name, part, regime, Outcome.OK, first_call_s=entry.first_call_s
    )


def parts(prepared: PreparedPath) -> dict[str, TimedWork]:
    """Every stage alone, and the per-layer and per-forward sequences where they have more than one stage."""
    works = {bound.stage.name: TimedWork(bound.run, bound.baseline) for bound in prepared.stages}
    for total, sequence in _totals(prepared):
        if len(sequence) > 1:
            works[total] = TimedWork(_in_order(sequence))
    return works


def _totals(prepared: PreparedPath) -> list[tuple[str, tuple[BoundStage, ...]]]:
    return [(PER_LAYER_TOTAL, prepared.per_layer()), (PER_FORWARD_TOTAL, prepared.per_forward())]


def _aliases(prepared: PreparedPath, part: str) -> list[str]:
    """Totals that are this very stage: a sequence of one needs no timing of its own."""
    return [t for t, sequence in _totals(prepared) if len(sequence) == 1 and sequence[0].stage.name == part]


def _in_order(sequence: tuple[BoundStage, ...]) -> Callable[[], None]:
    runs = [bound.run for bound in sequence]

    def run() -> None:
        for stage in runs:
            stage()

    return run


def _memory_bytes(device: binding.Device) -> int:
    if device.kind == "cpu":
        return _available_bytes(Path("/proc/meminfo"))
    return int(torch.cuda.get_device_properties(0).total_memory * 0.95)


def _available_bytes(meminfo: Path) -> int:
    """Memory to be had without swapping, the page cache counted as free; all there is without a ``meminfo``."""
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(available.split()[1]) * 1024
