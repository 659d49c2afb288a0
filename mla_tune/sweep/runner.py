"""The parent's side of a sweep: feed points to a worker process, store what comes back, survive what kills the worker.

The parent never touches the device. A worker that dies, hangs or loses its device costs the candidate that it was running
its measurement at that point, nothing else: the outcome is stored, the worker replaced, the sweep goes on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from mla_tune.hardware.sku import Environment
from mla_tune.sites.candidates import candidates_at, names_at
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES, Launches
from mla_tune.store.database import Database
from mla_tune.store.measurement import Measurement, Outcome
from mla_tune.store.tuned import launches_from
from mla_tune.sweep.attempt import attempt
from mla_tune.sweep.grid import Point
from mla_tune.sweep.outcomes import Deaths, GivenUp, failures
from mla_tune.sweep.worker.messages import NOTHING_ADDED, TIMING, Added, Offer, Task
from mla_tune.sweep.worker.process import WorkerProcess

TIMEOUT_S = 300.0
"""Longest that one point may take, compilation included. DeepGEMM compiles for 17 s; the slowest point takes three."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a sweep is; given to the caller before each point and once at the end."""

    done: int
    total: int
    elapsed_s: float
    point: Point | None


@dataclass(frozen=True, slots=True)
class Report:
    """What one call of :meth:`Sweep.run` did."""

    environment: Environment
    points: int
    """Points measured now."""
    already_done: int
    """Points that the database had for this environment."""
    left: int
    """Points that the budget did not reach."""
    failed: int
    """Rows stored with an outcome other than ``ok``."""
    disturbed: int
    """Points without undisturbed samples; the next run measures them again."""
    given_up: tuple[GivenUp, ...]
    """Candidates that failed too often to be tried further at a site."""
    restarts: int
    elapsed_s: float


class Sweep:
    """A worker for one device and the database that its measurements go to. Use as a context manager."""

    def __init__(
        self,
        kind: str,
        timeout_s: float = TIMEOUT_S,
        added: Added = NOTHING_ADDED,
        sampling_s: float | None = None,
    ) -> None:
        """Start the worker, which may take ``timeout_s`` for a point. ``added`` are candidates besides our own.

        ``sampling_s`` bounds the time for the samples of one point in one regime.
        Raises :class:`EnvironmentMismatchError` if the device cannot be used.
        """
        self._kind, self._timeout_s, self._added, self._sampling_s = kind, timeout_s, added, sampling_s
        self._restarts = 0
        self._launches = DEFAULT_LAUNCHES
        self._worker = WorkerProcess(kind, added.module)
        self.environment: Environment = self._worker.hello.environment
        self.regimes = self._worker.hello.regimes

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *exc: object) -> None:
        self._worker.stop()

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker of the moment."""
        return self._worker.pid

    def offer(self, name: str) -> Offer:
        """The kernels of engine ``name`` as they can run here. Raises :class:`EnvironmentMismatchError` if they cannot."""
        return self._worker.offer(name, self._timeout_s)

    def run(
        self,
        database: Database,
        points: Iterable[Point],
        budget_s: float = float("inf"),
        on_progress: Callable[[Progress], None] | None = None,
        without: Collection[str] = (),
    ) -> Report:
        """Measure what ``database`` lacks of ``points`` for this environment, until ``budget_s`` seconds are over.

        Candidates that ``without`` names are left alone.
        """
        plan = list(points)
        self._launches = launches_from(database.tuned(self.environment.id))
        tasks = missing_tasks(database, self.environment, plan, self._added, self._launches, without)
        start = time.monotonic()
        failed = disturbed = done = 0
        deaths = Deaths()
        deaths.note(database.measurements(self.environment.id))
        for index, task in enumerate(tasks):
            if time.monotonic() - start > budget_s:
                break
            if on_progress:
                on_progress(Progress(index, len(tasks), time.monotonic() - start, task.point))
            rows = self._measure_or_skip(task, deaths)
            database.record(self.environment, rows)
            failed += sum(row.outcome is not Outcome.OK for row in rows)
            disturbed += any(row.outcome is Outcome.DISTURBED for row in rows)
            done = index + 1
            deaths.note(rows)
        if on_progress:
            on_progress(Progress(done, len(tasks), time.monotonic() - start, None))
        return Report(
            environment=self.environment,
            points=done,
            already_done=len(plan) - len(tasks),
            left=len(tasks) - done,
            failed=failed,
            disturbed=disturbed,
            given_up=deaths.given_up(),
            restarts=self._restarts,
            elapsed_s=time.monotonic() - start,
        )

    def check(self, points: Iterable[Point]) -> Iterator[Measurement]:
        """Compare every candidate with the reference at ``points``, without timing; nothing is stored."""
        for point in points:
            rows = self._measure(Task(point, (*names_at(point.site), *self._added.at(point)), timed=False))
            yield from {row.candidate: row for row in rows}.values()

    def _measure_or_skip(self, task: Task, deaths: Deaths) -> list[Measurement]:
        hopeless = {name: failure for name in task.candidates if (failure := deaths.hopeless(task.point, name))}
        worth_trying = tuple(name for name in task.candidates if name not in hopeless)
        rows = self._measure(replace(task, candidates=worth_trying, sampling_s=self._sampling_s))
        for name, failure in hopeless.items():
            rows += failures(task.point, name, failure, self.regimes)
        digests = launch_digests(task.point, self._launches)
        return [replace(row, launches=digests.get(row.candidate, "")) for row in rows]

    def _measure(self, task: Task) -> list[Measurement]:
        """All rows of a task, whatever happens to the worker."""
        rows: list[Measurement] = []
        queue = deque([task] if task.candidates else [])
        while queue:
            current = queue.popleft()
            result = attempt(self._worker, replace(current, launches=self._launches), self._timeout_s)
            rows += result.rows
            if result.failure is None:
                continue
            self._restart()
            left = tuple(c for c in current.candidates if c not in {row.candidate for row in result.rows})
            if result.culprit == TIMING and len(left) > 1:  # nobody knows whose fault it was: each alone
                queue.extendleft(replace(task, candidates=(name,)) for name in left)
                continue
            blamed = result.culprit or left[0]
            rows += failures(task.point, blamed, result.failure, self.regimes)
            others = tuple(name for name in left if name != blamed)
            if others:
                queue.appendleft(replace(task, candidates=others))
        return rows

    def _restart(self) -> None:
        self._worker.stop()
        self._restarts += 1
        self._worker = WorkerProcess(self._kind, self._added.module)


def launch_digests(point: Point, launches: Launches) -> dict[str, str]:
    """By candidate: which of the tuned launch parameters its kernels run with at ``point``."""
    return {found.name: launches.digest(found.own_kernels(point.site)) for found in candidates_at(point.site)}


def missing_tasks(
    database: Database,
    environment: Environment,
    plan: Iterable[Point],
    added: Added = NOTHING_ADDED,
    launches: Launches = DEFAULT_LAUNCHES,
    without: Collection[str] = (),
) -> list[Task]:
    """The points of ``plan`` with the candidates, ``without`` some, that have no row for ``environment`` yet, in order.

    A row that was taken with other launch parameters than ``launches`` is none.
    """
    done = database.done_candidates(environment.id)
    tasks = []
    for point in plan:
        names = (*names_at(point.site), *added.at(point))
        key, digests = (point.site.key, point.shape), launch_digests(point, launches)
        left = tuple(n for n in names if n not in without and (*key, n, digests.get(n, "")) not in done)
        if left:
            tasks.append(Task(point, left))
    return tasks
