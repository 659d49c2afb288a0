"""One measured (or failed) timing, as every part of the project passes it on."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Annotated, Any, get_args, get_type_hints

from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Site

PER_LAYER_TOTAL = "per_layer"
"""Part name of a candidate's per-layer stages, run one after the other as the engine runs them."""
PER_FORWARD_TOTAL = "per_forward"
"""Part name of all its stages that run once per forward or once per forward and layer type."""
_INT64_MAX = 2**63 - 1


class Regime(StrEnum):
    """How time was taken."""

    GRAPH = "graph"
    """GPU time by CUDA-graph replay with a cold L2."""
    EAGER = "eager"
    """Host-inclusive time from the first launch to a synchronized device; on the CPU plain wall time."""


class Outcome(StrEnum):
    """How a measurement ended. Anything but ``OK`` carries its reason in ``detail`` and no latency."""

    OK = "ok"
    UNSUPPORTED = "unsupported"
    """The candidate says why it cannot serve this shape here (package, architecture or shape rule)."""
    NO_MEMORY = "no_memory"
    """The inputs or the workspace do not fit; nothing was launched, or the allocation failed."""
    COMPILE_ERROR = "compile_error"
    RUNTIME_ERROR = "runtime_error"
    WRONG_RESULT = "wrong_result"
    """The output differs from the reference, or part of it was never written."""
    TIMEOUT = "timeout"
    CRASH = "crash"
    """The worker process died."""
    DISTURBED = "disturbed"
    """Something outside the candidate spoiled it: other work, a fallen clock or a throttled GPU (the samples are in
    quarantine), a signal, the driver, the disk. The next sweep measures again."""


CAPABILITY = frozenset({Outcome.RUNTIME_ERROR, Outcome.CRASH, Outcome.WRONG_RESULT, Outcome.COMPILE_ERROR})
"""Outcomes that bound what a build can do: not memory (a matter of what else is on the device), not time-outs (of
patience), not unsupported (never launched)."""


class Stop(StrEnum):
    """Why sampling ended."""

    PRECISION = "precision"
    """The median's relative confidence half-width fell under the target."""
    BUDGET = "budget"
    """The time or the number of samples that the task had was used up first: the median is known less well."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Samples that were taken under a disturbance: kept, and part of no statistic."""

    reason: str
    """One line: what disturbed them."""
    samples_us: tuple[float, ...]


class Role(StrEnum):
    """What a point was measured for. The fit never sees a held-out point; the held-out table sees nothing else."""

    FIT = "fit"
    HELD_OUT = "held_out"


class Level(StrEnum):
    """Where a field of a measurement stands, in the database and in an export alike."""

    POINT = "point"
    """Once for a point: the columns of ``points``, the head of a line."""
    KEY = "key"
    """What tells the measurements of a point apart."""
    RESULT = "result"
    """What those of one candidate share as a rule; a line has it once for each group that does."""
    TIMING = "timing"
    """Of each measurement alone."""
    SAMPLES = "samples"
    """Raw samples: the database keeps them, an export does not."""
    APART = "apart"
    """In a table of its own, and in no export."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One part of one candidate at one point in one regime.

    The only place that declares what a measurement has: columns and lines follow from these fields and their levels.
    """

    site: Annotated[Site, Level.POINT]
    shape: Annotated[Shape, Level.POINT]
    role: Annotated[Role, Level.POINT]
    candidate: Annotated[str, Level.KEY]
    part: Annotated[str, Level.KEY]
    """A stage's name, :data:`PER_LAYER_TOTAL` or :data:`PER_FORWARD_TOTAL`."""
    regime: Annotated[Regime, Level.KEY]
    outcome: Annotated[Outcome, Level.RESULT]
    detail: Annotated[str, Level.RESULT] = ""
    """One line: why the outcome is not ``ok``; empty otherwise."""
    latency_us: Annotated[float | None, Level.TIMING] = None
    """Median of the samples, microseconds."""
    ci_low_us: Annotated[float | None, Level.TIMING] = None
    ci_high_us: Annotated[float | None, Level.TIMING] = None
    """Distribution-free 95 % confidence interval of the median (order statistics)."""
    num_samples: Annotated[int, Level.TIMING] = 0
    samples_us: Annotated[tuple[float, ...], Level.SAMPLES] = ()
    """Raw samples in the order taken; empty when read back from an export, which keeps only the summary."""
    first_call_s: Annotated[float | None, Level.RESULT] = None
    """Seconds of the first call in its process, compilation and module load included. Once per candidate."""
    workspace_bytes: Annotated[int | None, Level.RESULT] = None
    """Peak device memory of the candidate beyond its inputs and output, bytes. Once per candidate."""
    stopped_by: Annotated[Stop | None, Level.RESULT] = None
    """Why sampling ended; None for a failure, and for what was measured before this was recorded."""
    power_capped: Annotated[bool, Level.RESULT] = False
    """Some of the samples were taken under the GPU's power cap, which did not go away: what a heavy kernel meets."""
    launches: Annotated[str, Level.RESULT] = ""
    """Digest of the tuned launch parameters that its kernels ran with; empty for the defaults."""
    quarantined: Annotated[tuple[Quarantined, ...], Level.APART] = ()
    """Disturbed samples of the same timing. Empty when read back: :meth:`Database.quarantined` has them."""

    @property
    def key(self) -> tuple[str, Shape, str, str, str]:
        """What makes two measurements of one environment the same: (site, shape, candidate, part, regime)."""
        return (self.site.key, self.shape, self.candidate, self.part, self.regime)

    @property
    def label(self) -> str:
        """The key as messages show it: ``prefill_attention/swa_only/h64 (1, 64, 8192) sparse_fwd attention graph``."""
        shape = f"({self.shape.num_reqs}, {self.shape.num_qo_tokens}, {self.shape.kv_tokens})"
        return f"{self.site.key} {shape} {self.candidate} {self.part} {self.regime}"


_ANNOTATIONS = get_type_hints(Measurement, include_extras=True)


@dataclass(frozen=True, slots=True)
class StoredField:
    """A field of a measurement, as whoever stores it needs to know it."""

    name: str
    kind: Any
    """Its annotation."""
    default: Any
    """``dataclasses.MISSING`` where it must be given."""


def stored(*levels: Level) -> tuple[StoredField, ...]:
    """The fields of a measurement at these levels, in the order in which they are declared."""
    return tuple(
        StoredField(entry.name, get_args(_ANNOTATIONS[entry.name])[0], entry.default)
        for entry in fields(Measurement)
        if get_args(_ANNOTATIONS[entry.name])[1] in levels
    )


@dataclass(frozen=True, slots=True)
class QuarantinedTiming:
    """Disturbed samples as a database gives them back, whatever became of their measurement later."""

    site: Site
    shape: Shape
    candidate: str
    part: str
    regime: Regime
    reason: str
    samples_us: tuple[float, ...]


def fault(measurement: Measurement) -> str | None:
    """Why a measurement may not be stored, in one line; None for a sound one.

    An ``ok`` one has a latency of at least zero inside its interval (or no interval at all); any other has a reason and
    no latency. The database and the export both hold to it, so that no NaN and no reasonless failure gets into either.
    """
    return (
        _text_fault(measurement)
        or _number_fault(measurement)
        or _outcome_fault(measurement)
        or _quarantine_fault(measurement)
    )


def _text_fault(measurement: Measurement) -> str | None:
    for name in ("candidate", "part", "detail"):
        text: str = getattr(measurement, name)
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"{name} must be valid Unicode: got {text!r}"
        if not text and name != "detail":
            return f"{name} must not be empty"
    return None


def _number_fault(measurement: Measurement) -> str | None:
    shape = measurement.shape
    optional = (
        measurement.latency_us,
        measurement.ci_low_us,
        measurement.ci_high_us,
        measurement.first_call_s,
        measurement.workspace_bytes,
    )
    numbers = (
        *(number for number in optional if number is not None),
        *measurement.samples_us,
        measurement.num_samples,
        shape.kv_tokens,
    )
    for number in numbers:
        if not (math.isfinite(number) and 0 <= number <= _INT64_MAX):
            return f"numbers must be finite, at least 0 and below 2^63: got {number!r}"
    return None


def _outcome_fault(measurement: Measurement) -> str | None:
    latency, low, high = measurement.latency_us, measurement.ci_low_us, measurement.ci_high_us
    if measurement.outcome is not Outcome.OK:
        if not measurement.detail:
            return f"outcome {measurement.outcome} must say its reason in detail: got none"
        if (latency, low, high) != (None, None, None) or measurement.num_samples or measurement.samples_us:
            return f"outcome {measurement.outcome} must come without latency and samples: got latency_us={latency}"
        if measurement.stopped_by is not None:
            return f"outcome {measurement.outcome} must come without stopped_by: got {measurement.stopped_by}"
        if measurement.power_capped:
            return f"outcome {measurement.outcome} must come without power_capped: it is set"
        return None
    if measurement.detail:
        return f"outcome ok must come without detail: got {measurement.detail!r}"
    if latency is None:
        return "outcome ok must come with latency_us: got none"
    if (low is None) != (high is None):
        return f"an interval must have both ends or none: got {low} to {high}"
    if low is not None and high is not None and not low <= latency <= high:
        return f"latency_us must lie inside its interval: got {latency}, interval {low} to {high}"
    return None


def _quarantine_fault(measurement: Measurement) -> str | None:
    if measurement.quarantined and measurement.outcome not in (Outcome.OK, Outcome.DISTURBED):
        return f"outcome {measurement.outcome} must come without quarantined samples: it has some"
    for entry in measurement.quarantined:
        if not entry.reason or not entry.reason.isprintable():
            return f"quarantined samples must say their reason in one line: got {entry.reason!r}"
        if not entry.samples_us or not all(math.isfinite(us) and us >= 0 for us in entry.samples_us):
            return f"quarantined samples must be finite and at least 0: got {entry.samples_us!r}"
    return None
