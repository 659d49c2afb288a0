"""Which measurements of an export belong into one policy."""

from __future__ import annotations

from collections.abc import Iterable

from mla_tune.errors import UsageError
from mla_tune.notice import say_once
from mla_tune.sites.candidates import candidate_at, names_at
from mla_tune.sites.launch_parameters import Launches
from mla_tune.sites.provider import OWN, Provider
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import PLAIN, Conditions, SiteName
from mla_tune.store.measurement import PER_FORWARD_TOTAL, PER_LAYER_TOTAL, Measurement
from mla_tune.store.outside_cause import judged_again
from mla_tune.store.tuned import Tuned, launches_from


def usable(
    measurements: Iterable[Measurement], tuned: Iterable[Tuned] = (), conditions: Conditions = PLAIN
) -> tuple[Measurement, ...]:
    """Those under ``conditions`` (overlap of neighbouring selections, provider), taken with the tuned launch parameters.

    Where there is no top-k nothing overlaps, so these count whatever the overlap. What was measured before a kernel was
    tuned, or tuned again, says nothing of how it will run; a stage that runs none of our kernels is not concerned.
    A failure that did not come from the candidate comes as ``disturbed``: see :mod:`mla_tune.store.outside_cause`. Where a
    whole path took no time (a broken timer, which sampling refuses since 0.3.0) nothing of that candidate's counts there,
    which is said once.
    """
    launches = launches_from(tuned)
    found = [judged_again(m) for m in measurements if conditions.at(m.site) == m.site and _current(m, launches)]
    timeless = {_timing(m): m for m in found if _is_timeless(m)}
    if timeless:
        first = min(timeless.values(), key=lambda m: m.key)
        say_once(
            f"{len(timeless)} whole paths took 0 us and are left out, as the timer was broken: the first is {first.label}; "
            "next: sweep into a new database"
        )
    return tuple(m for m in found if _timing(m) not in timeless)


def _timing(measurement: Measurement) -> tuple[str, Shape, str, str]:
    """What one timer gave of one candidate."""
    return (measurement.site.key, measurement.shape, measurement.candidate, measurement.regime)


def _is_timeless(measurement: Measurement) -> bool:
    """Whether it is a whole path that took no time. A stage that is timed as a difference may take none."""
    whole = PER_FORWARD_TOTAL if measurement.site.name is SiteName.INDEXER_METADATA else PER_LAYER_TOTAL
    return measurement.part == whole and measurement.latency_us is not None and measurement.latency_us <= 0


def stored_provider(measurements: Iterable[Measurement], word: str) -> Provider | None:
    """The provider that ``word`` names among those of ``measurements``: ``own``, an engine, or a whole key.

    Raises :class:`UsageError` where there is none, and where an engine is there in several releases.
    """
    if word == OWN:
        return None
    found = sorted({m.site.provider for m in measurements if m.site.provider}, key=lambda provider: provider.key)
    named = [provider for provider in found if word in (provider.name, provider.key)]
    if len(named) == 1:
        return named[0]
    accepted = ", ".join([OWN, *(provider.key for provider in found)])
    raise UsageError(
        f"--provider must name one whose kernels were measured: got {word!r}; accepted: {accepted}; next: "
        "`mla-tune sweep --provider sglang` measures SGLang's"
    )


def _current(measurement: Measurement, launches: Launches) -> bool:
    site, candidate, part = measurement.site, measurement.candidate, measurement.part
    if candidate not in names_at(site):
        return not measurement.launches
    found = candidate_at(site, candidate)
    if measurement.launches == launches.digest(found.own_kernels(site)):
        return True
    return any(stage.name == part and not stage.own_kernels(site) for stage in found.stages(site))
