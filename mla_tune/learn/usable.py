"""Which measurements of an export belong into one policy."""

from __future__ import annotations

from collections.abc import Iterable

from mla_tune.launch import Launches
from mla_tune.stages import kernels, stage_kernels, stages
from mla_tune.store.measurement import Measurement
from mla_tune.store.tuned import Tuned, launches_from


def usable(
    measurements: Iterable[Measurement], tuned: Iterable[Tuned] = (), overlap: int = 0
) -> tuple[Measurement, ...]:
    """Those of inputs with this overlap of neighbouring selections, taken with the tuned launch parameters.

    Where there is no top-k nothing overlaps, so these count whatever the overlap. What was measured before a kernel was
    tuned, or tuned again, says nothing of how it will run; a stage that runs none of our kernels is not concerned.
    """
    launches = launches_from(tuned)
    return tuple(m for m in measurements if m.site.overlapping(overlap) == m.site and _current(m, launches))


def _current(measurement: Measurement, launches: Launches) -> bool:
    site, candidate, part = measurement.site, measurement.candidate, measurement.part
    if candidate not in site.candidates:
        return not measurement.launches
    if measurement.launches == launches.digest(kernels(site, candidate)):
        return True
    is_stage = any(stage.name == part for stage in stages(site, candidate))
    return is_stage and not stage_kernels(site, candidate, part)
