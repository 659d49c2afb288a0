"""Tuning launch parameters: the parent's side, which asks a study, has its isolated worker try, and tells the study.

A configuration that kills or hangs the worker costs itself a trial and nothing else. The winner of a class must beat the
default beyond doubt, in a last comparison in turn; otherwise the default is the winner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Self

from mla_tune.bench.sampling import MIN_SAMPLES, summarize
from mla_tune.hardware.sku import Environment
from mla_tune.sites.launch_parameters import KERNELS, Kernel, KernelLaunch, SizeClass
from mla_tune.store.measurement import Outcome
from mla_tune.store.tuned import Tuned
from mla_tune.sweep.tuning.study import Asked, Search, open_search, study_storage
from mla_tune.sweep.worker.messages import Lost, Trial, Tried
from mla_tune.sweep.worker.process import WorkerProcess
from mla_tune.sweep.worker.same_gpu import require_unchanged

TRIAL_TIMEOUT_S = 60.0
"""Longest trial: a compilation takes seconds, building 2M rows and their reference two more."""
_FULL_SAMPLES = 30
_FINALISTS = 3
_LEAST_WIN = 0.99
"""The winner's time over the default's: less than a percent is not worth another configuration."""


@dataclass(frozen=True, slots=True)
class TuneProgress:
    """Told before each trial."""

    kernel: str
    size_from: int
    trials: int
    """Configurations of this size class that were tried so far, in earlier runs too."""
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class ClassReport:
    """What became of one kernel in one size class."""

    kernel: str
    size_from: int
    tuned: Tuned | None
    """None where no configuration ran, not even the default."""
    reason: str
    """Why there is none; empty otherwise."""
    left: int
    """Configurations of the space that the budget did not reach."""


Target = tuple[Kernel, SizeClass]


def targets(names: Iterable[str] = ()) -> list[Target]:
    """Every size class of the kernels named, or of all."""
    wanted = set(names) or set(KERNELS)
    return [(kernel, found) for kernel in KERNELS.values() if kernel.name in wanted for found in kernel.classes]


class Tuner:
    """A worker for one device. Use as a context manager."""

    def __init__(
        self,
        kind: str,
        timeout_s: float = TRIAL_TIMEOUT_S,
        added: str = "",
        size_of: Callable[[SizeClass], int] = lambda found: found.tuned_at,
    ) -> None:
        """Start the worker; ``added`` names a module that it imports first, ``size_of`` gives the size to tune at.

        Raises :class:`EnvironmentMismatchError` if the device cannot be used.
        """
        self._kind, self._timeout_s, self._added, self._size_of = kind, timeout_s, added, size_of
        self._worker = WorkerProcess(kind, added)
        self.environment: Environment = self._worker.hello.environment

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._worker.stop()

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker of the moment."""
        return self._worker.pid

    def run(
        self,
        database: Path,
        chosen: list[Target],
        budget_s: float,
        seed: int,
        on_trial: Callable[[TuneProgress], None],
        on_class: Callable[[ClassReport], None],
    ) -> list[ClassReport]:
        """Search every class in turn, each for its share of the time that is left; told to ``on_class`` as it ends.

        ``database`` must exist and hold the studies of earlier runs, if any. Raises :class:`StoreError`.
        """
        reports = []
        with study_storage(database) as storage:
            start = time.monotonic()
            for index, (kernel, found) in enumerate(chosen):
                search = open_search(storage, self.environment.id, kernel.name, found.size_from, seed)
                now = time.monotonic()
                deadline = now + max(0.0, start + budget_s - now) / (len(chosen) - index)
                report = self._search(search, found, deadline, start, on_trial)
                reports.append(report)
                on_class(report)
        return reports

    def _search(
        self,
        search: Search,
        found: SizeClass,
        deadline: float,
        start: float,
        on_trial: Callable[[TuneProgress], None],
    ) -> ClassReport:
        failure = "the budget was used up before the first trial"
        while time.monotonic() < deadline and (asked := search.ask()) is not None:
            elapsed_s = time.monotonic() - start
            on_trial(TuneProgress(search.kernel, search.size_from, len(search.tried), elapsed_s))
            failure = self._try(search, asked, found) or failure
        tuned = self._winner(search, found)
        reason = "" if tuned else failure
        return ClassReport(search.kernel, search.size_from, tuned, reason, len(search.untried))

    def _try(self, search: Search, asked: Asked, found: SizeClass) -> str | None:
        """One trial, from the first samples to what the study is told; why it failed, if it did."""
        for samples in (MIN_SAMPLES, _FULL_SAMPLES):
            tried = self._run(asked.launch, found, samples)
            if tried.outcome is not Outcome.OK:
                reason = f"{tried.outcome}: {tried.detail}"
                search.fail(asked, reason)
                return reason
            ratio = median(tried.samples_us) / median(tried.default_us)
            if samples == MIN_SAMPLES and search.prune(asked, ratio):
                return None
        search.finish(asked, ratio)
        return None

    def _winner(self, search: Search, found: SizeClass) -> Tuned | None:
        """The fastest of the finalists that beats the default beyond doubt, or the default."""
        default = KernelLaunch(search.kernel, search.size_from, found.default)
        finals = [(launch, self._run(launch, found, _FULL_SAMPLES)) for launch in [*search.best(_FINALISTS), default]]
        ran = [(launch, tried) for launch, tried in finals if tried.outcome is Outcome.OK]
        if not ran or not search.tried:
            return None
        launch, tried = min(ran, key=lambda final: _ratio(final[1]) if _beats(final[1]) else 1.0)
        if not _beats(tried):
            launch = default
        latency_us, default_us = median(tried.samples_us), median(tried.default_us)
        if launch == default:
            latency_us = default_us
        return Tuned(launch, latency_us, default_us, len(search.tried))

    def _run(self, launch: KernelLaunch, found: SizeClass, samples: int) -> Tried:
        """Have the worker try ``launch``; replace it if it does not survive."""
        trial = Trial(launch.kernel, self._size_of(found), launch.config, found.default, samples)
        try:
            self._worker.send(trial)
            message = self._worker.receive(self._timeout_s)
        except (EOFError, OSError):
            tried = Tried(Outcome.CRASH, self._worker.exit_summary())
        else:
            if isinstance(message, Tried):
                return message
            lost = message.detail if isinstance(message, Lost) else ""
            timeout = f"no answer within {self._timeout_s:.0f} s"
            tried = Tried(Outcome.RUNTIME_ERROR, lost) if lost else Tried(Outcome.TIMEOUT, timeout)
        self._worker.stop()
        self._worker = WorkerProcess(self._kind, self._added)
        require_unchanged(self.environment, self._worker.hello.environment)
        return tried


def _ratio(tried: Tried) -> float:
    return median(tried.samples_us) / median(tried.default_us)


def _beats(tried: Tried) -> bool:
    """Whether the intervals of both medians lie apart, and the win is worth having."""
    mine, default = summarize(tried.samples_us), summarize(tried.default_us)
    return mine.high_us < default.low_us and _ratio(tried) <= _LEAST_WIN
