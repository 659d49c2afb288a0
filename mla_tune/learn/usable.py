"""Which measurements of an export belong into one policy."""

from __future__ import annotations

from collections.abc import Iterable

from mla_tune.launch import Launches
from mla_tune.stages import kernels
from mla_tune.store.measurement import Measurement
from mla_tune.store.tuned import Tuned, launches_from


def usable(
    measurements: Iterable[Measurement], tuned: Iterable[Tuned] = (), overlap: int = 0
) -> tuple[Measurement, ...]:
    """Those of inputs with this overlap of neighbouring selections, taken with the tuned launch parameters.

    Where there is no top-k nothing overlaps, so these count whatever the overlap. What was measured before a kernel was
    tuned, or tuned again, says nothing of how it will run.
    """
    launches = launches_from(tuned)
    return tuple(m for m in measurements if m.site.overlapping(overlap) == m.site and _current(m, launches))


def _current(measurement: Measurement, launches: Launches) -> bool:
    site, candidate = measurement.site, measurement.candidate
    ours = kernels(site, candidate) if candidate in site.candidates else ()
    return measurement.launches == launches.digest(ours)
