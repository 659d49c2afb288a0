"""Traces of candidates at one point: each is checked against the reference, run once more, then recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mla_tune.bench.profiling import record_trace
from mla_tune.errors import MlaTuneError
from mla_tune.kernels import binding
from mla_tune.sites.launch_parameters import Launches
from mla_tune.sweep.grid import Point
from mla_tune.sweep.worker.correctness import Judge
from mla_tune.sweep.worker.failure import one_line
from mla_tune.sweep.worker.point_measurer import PointMeasurer


def trace_candidates(kind: str, point: Point, launches: Launches, files: dict[str, Path], repeats: int) -> None:
    """Record one trace for each candidate of ``files``, all on the same inputs, in this process.

    ``launches`` are those of our own kernels. Raises :class:`MlaTuneError` for a candidate that cannot run here, fails
    or differs from the reference; traces of those before it are written by then.
    """
    measurer = PointMeasurer(kind, gpu_time_only=True)
    measurer.device = replace(measurer.device, launches=launches)
    for name in files:
        reason = binding.unsupported(point.site, name, measurer.device)
        if reason is not None:
            raise MlaTuneError(f"a traced candidate must run here: {name} does not: {reason}")
    try:
        measurer.require_memory(point)
        judge = measurer.judge(point)
    except (RuntimeError, MemoryError) as error:
        raise MlaTuneError(f"the inputs of this shape must fit here: {one_line(error)}; take fewer tokens") from None
    for name, path in files.items():
        _trace(kind, judge, name, path, repeats)


def _trace(kind: str, judge: Judge, name: str, path: Path, repeats: int) -> None:
    try:
        prepared = judge.prepare(name)
        prepared.run()
        wrong = judge.verdict(prepared.result())
        if wrong is None:
            prepared.run()  # what the first call compiles or allocates is no part of the trace
            record_trace(path, [(bound.stage.name, bound.run) for bound in prepared.stages], repeats, kind)
    except (MlaTuneError, OSError):
        raise
    except Exception as error:  # a candidate may raise anything
        raise MlaTuneError(f"{name} failed at this shape: {one_line(error)}") from None
    if wrong is not None:
        raise MlaTuneError(f"a traced candidate must match the reference: {name} does not: {wrong}")
