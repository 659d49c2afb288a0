"""What the parent and its worker process say to each other."""

from __future__ import annotations

from dataclasses import dataclass

from mla_tune.hardware.sku import Environment
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES, Config, Launches
from mla_tune.sites.provider import Provider
from mla_tune.sites.site import Site, SiteName
from mla_tune.store.measurement import Measurement, Outcome, Regime
from mla_tune.sweep.grid import Point

TIMING = ""
"""In :class:`Entering`: no single candidate, all that gave the right answer are being timed in turn."""


@dataclass(frozen=True, slots=True)
class Added:
    """Attention candidates besides the project's own, for a sweep to measure too."""

    module: str
    """Importable name; importing it calls :func:`mla_tune.kernels.binding.add` for each of them."""
    candidates: tuple[str, ...]

    def at(self, point: Point) -> tuple[str, ...]:
        """Those of them that can be tried at ``point``."""
        return self.candidates if point.site.name is SiteName.PREFILL_ATTENTION else ()


NOTHING_ADDED = Added("", ())


@dataclass(frozen=True, slots=True)
class Task:
    """One point with the candidates to measure at it."""

    point: Point
    candidates: tuple[str, ...]
    timed: bool = True
    """False: only compare with the reference; right candidates then give one row without a latency."""
    sampling_s: float | None = None
    """Time for the samples of each regime, if less than the worker's own."""
    launches: Launches = DEFAULT_LAUNCHES
    """Launch parameters that our own kernels run with."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One configuration of a kernel to check and to time, in turn with the default."""

    kernel: str
    size: int
    config: Config
    default: Config
    samples: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """The question whether an engine's kernels can run here; the answer is :class:`Offer` or :class:`Refused`."""

    provider: str


@dataclass(frozen=True, slots=True)
class Offer:
    """An engine's kernels that can run here."""

    provider: Provider
    left_out: str = ""
    """One line: which stage it cannot run here, and why."""


@dataclass(frozen=True, slots=True)
class SupportQuery:
    """The question which candidates this machine cannot run at all; the answer is :class:`Support`. No inputs are built."""

    pairs: tuple[tuple[Site, str], ...]
    """(site, candidate)."""


@dataclass(frozen=True, slots=True)
class Support:
    """What this machine can run."""

    reasons: tuple[str | None, ...]
    """Of each pair: why it cannot run, in one line; None where it can."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of a :class:`Trial`."""

    outcome: Outcome
    detail: str = ""
    """One line: why the outcome is not ``ok``."""
    samples_us: tuple[float, ...] = ()
    default_us: tuple[float, ...] = ()
    """Samples of the default, taken in turn with those of the configuration."""


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a worker: it is ready, and this is where it runs."""

    environment: Environment
    regimes: tuple[Regime, ...]
    gpu_uuid: str = ""
    """``GPU-...``; empty for the CPU."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Instead of :class:`Hello` or :class:`Offer`: why the device or the kernels cannot be used, in one line."""

    reason: str


@dataclass(frozen=True, slots=True)
class Entering:
    """The worker is about to run this candidate, or to time them all (:data:`TIMING`)."""

    candidate: str


@dataclass(frozen=True, slots=True)
class Done:
    """All rows of a task that did not take the device down."""

    measurements: tuple[Measurement, ...]


@dataclass(frozen=True, slots=True)
class Lost:
    """The device's context is gone: the worker ends. ``measurements`` are the rows it had finished."""

    measurements: tuple[Measurement, ...]
    detail: str


@dataclass(frozen=True, slots=True)
class Notice:
    """At any time: what the user should know. The parent says it (:mod:`mla_tune.notice`); it is no answer."""

    line: str


Message = Hello | Refused | Offer | Support | Entering | Done | Lost | Tried
"""Anything that a worker may say."""
