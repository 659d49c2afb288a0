"""One measured (or failed) timing, as every part of the project passes it on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mla_tune.shape import Shape
from mla_tune.site import Site

PER_LAYER_TOTAL = "per_layer"
"""Part name of a candidate's per-layer stages, run one after the other as the engine runs them."""
PER_FORWARD_TOTAL = "per_forward"
"""Part name of all its stages that run once per forward or once per forward and layer type."""


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


class Role(StrEnum):
    """What a point was measured for. The fit never sees a held-out point; the held-out table sees nothing else."""

    FIT = "fit"
    HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One part of one candidate at one point in one regime."""

    site: Site
    shape: Shape
    role: Role
    candidate: str
    part: str
    """A stage's name, :data:`PER_LAYER_TOTAL` or :data:`PER_FORWARD_TOTAL`."""
    regime: Regime
    outcome: Outcome
    detail: str = ""
    """One line: why the outcome is not ``ok``; empty otherwise."""
    latency_us: float | None = None
    """Median of the samples, microseconds."""
    ci_low_us: float | None = None
    ci_high_us: float | None = None
    """Distribution-free 95 % confidence interval of the median (order statistics)."""
    num_samples: int = 0
    samples_us: tuple[float, ...] = ()
    """Raw samples in the order taken; empty when read back from an export, which keeps only the summary."""
    first_call_s: float | None = None
    """Seconds of the first call in its process, compilation and module load included. Once per candidate."""
    workspace_bytes: int | None = None
    """Peak device memory of the candidate beyond its inputs and output, bytes. Once per candidate."""

    @property
    def key(self) -> tuple[str, Shape, str, str, str]:
        """What makes two measurements of one environment the same: (site, shape, candidate, part, regime)."""
        return (self.site.key, self.shape, self.candidate, self.part, self.regime)
