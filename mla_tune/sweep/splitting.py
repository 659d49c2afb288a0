"""Batches in two parts beside both single paths: the sweep's inputs, reference, timers and fairness, in this process.

Nothing is stored, and no worker stands between: a batch that takes the device down ends the measurement.
"""

from __future__ import annotations

from collections.abc import Sequence

from mla_tune.errors import MlaTuneError
from mla_tune.kernels import binding
from mla_tune.kernels.inputs import AttentionInputs
from mla_tune.kernels.prepared import PreparedPath
from mla_tune.kernels.split_batch import NAME
from mla_tune.sites.shape import RaggedShape
from mla_tune.sites.site import Site
from mla_tune.store.measurement import Measurement
from mla_tune.sweep.grid import Point
from mla_tune.sweep.worker.failure import DeviceLostError
from mla_tune.sweep.worker.messages import Task
from mla_tune.sweep.worker.point_measurer import PointMeasurer


class SplitMeasurer:
    """Measures a batch by each single path and in two parts."""

    def __init__(self, kind: str, seed: int) -> None:
        """``kind`` is ``cpu`` or ``cuda``, ``seed`` that of the inputs."""
        self._measurer = PointMeasurer(kind, seed, gpu_time_only=True)
        self._cached: tuple[int, ...] = ()
        binding.add(NAME, self._prepare)

    def measure(
        self, site: Site, batch: RaggedShape, cached: Sequence[int], singles: Sequence[str]
    ) -> list[Measurement]:
        """Rows of every part of ``singles``, and of ``split`` with the requests ``cached`` read from the cache.

        All are compared with the reference before and after they are timed; what is wrong or fails has a row that says so.
        They are of one regime: GPU time, or the CPU's. Raises :class:`MlaTuneError` if the device is lost.
        """
        self._cached = tuple(cached)
        task = Task(Point(site, batch.evened(), ragged=batch), (*singles, NAME))
        try:
            return list(self._measurer.measure(task, lambda name: None))
        except DeviceLostError as lost:
            raise MlaTuneError(f"the device was lost at {site.key}, {batch.evened()}: {lost}; start again") from lost

    def _prepare(self, inputs: AttentionInputs, device: binding.Device) -> PreparedPath:
        return binding.prepare_split(inputs, self._cached, device)
