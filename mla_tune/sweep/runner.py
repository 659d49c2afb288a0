"""The parent's side of a sweep: feed points to a worker process, store what comes back, survive what kills the worker.

The parent never touches the device. A worker that dies, hangs or loses its device costs the candidate that it was running
its measurement at that point, nothing else: the outcome is stored, the worker replaced, the sweep goes on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from mla_tune.sku import Environment
from mla_tune.store.database import Database
from mla_tune.store.measurement import Measurement, Outcome
from mla_tune.sweep.grid import Point
from mla_tune.sweep.messages import TIMING, Done, Entering, Lost, Task
from mla_tune.sweep.outcomes import Deaths, Failure, failures
from mla_tune.sweep.process import WorkerProcess


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
    restarts: int
    elapsed_s: float


class Sweep:
    """A worker for one device and the database that its measurements go to. Use as a context manager."""

    def __init__(self, kind: str, timeout_s: float = 300.0) -> None:
        """Start the worker. Raises :class:`EnvironmentMismatchError` if the device cannot be used."""
        self._kind, self._timeout_s = kind, timeout_s
        self._restarts = 0
        self._worker = WorkerProcess(kind)
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

    def run(
        self,
        database: Database,
        points: Iterable[Point],
        budget_s: float = float("inf"),
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Report:
        """Measure what ``database`` lacks of ``points`` for this environment, until ``budget_s`` seconds are over."""
        plan = list(points)
        tasks = missing_tasks(database, self.environment, plan)
        start = time.monotonic()
        failed = done = 0
        deaths = Deaths()
        for index, task in enumerate(tasks):
            if time.monotonic() - start > budget_s:
                break
            if on_progress:
                on_progress(Progress(index, len(tasks), time.monotonic() - start, task.point))
            rows = self._measure_or_skip(task, deaths)
            database.record(self.environment, rows)
            failed += sum(row.outcome is not Outcome.OK for row in rows)
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
            restarts=self._restarts,
            elapsed_s=time.monotonic() - start,
        )

    def check(self, points: Iterable[Point]) -> Iterator[Measurement]:
        """Compare every candidate with the reference at ``points``, without timing; nothing is stored."""
        for point in points:
            rows = self._measure(Task(point, point.site.candidates, timed=False))
            yield from {row.candidate: row for row in rows}.values()

    def _measure_or_skip(self, task: Task, deaths: Deaths) -> list[Measurement]:
        hopeless = {name: failure for name in task.candidates if (failure := deaths.hopeless(task.point, name))}
        worth_trying = tuple(name for name in task.candidates if name not in hopeless)
        rows = self._measure(replace(task, candidates=worth_trying))
        for name, failure in hopeless.items():
            rows += failures(task.point, name, failure, self.regimes)
        return rows

    def _measure(self, task: Task) -> list[Measurement]:
        """All rows of a task, whatever happens to the worker."""
        rows: list[Measurement] = []
        queue = deque([task] if task.candidates else [])
        while queue:
            current = queue.popleft()
            finished, culprit, failure = self._attempt(current)
            rows += finished
            if failure is None:
                continue
            self._restart()
            left = tuple(c for c in current.candidates if c not in {row.candidate for row in finished})
            if culprit == TIMING and len(left) > 1:  # nobody knows whose fault it was: each alone
                queue.extendleft(replace(task, candidates=(name,)) for name in left)
                continue
            blamed = culprit or left[0]
            rows += failures(task.point, blamed, failure, self.regimes)
            others = tuple(name for name in left if name != blamed)
            if others:
                queue.appendleft(replace(task, candidates=others))
        return rows

    def _attempt(self, task: Task) -> tuple[list[Measurement], str, Failure | None]:
        """One try of a task: its rows, the candidate that was running last, and how the worker failed, if it did."""
        culprit = TIMING
        deadline = time.monotonic() + self._timeout_s
        try:
            self._worker.send(task)
            while True:
                message = self._worker.receive(deadline - time.monotonic())
                if isinstance(message, Entering):
                    culprit = message.candidate
                elif isinstance(message, Done):
                    return list(message.measurements), culprit, None
                elif isinstance(message, Lost):
                    return list(message.measurements), culprit, Failure(Outcome.RUNTIME_ERROR, message.detail)
                else:
                    return [], culprit, Failure(Outcome.TIMEOUT, f"no answer within {self._timeout_s:.0f} s")
        except (EOFError, OSError):  # OSError: it died in the middle of a message
            return [], culprit, Failure(Outcome.CRASH, self._worker.epitaph())

    def _restart(self) -> None:
        self._worker.stop()
        self._restarts += 1
        self._worker = WorkerProcess(self._kind)


def missing_tasks(database: Database, environment: Environment, plan: Iterable[Point]) -> list[Task]:
    """The points of ``plan`` with the candidates that have no row for ``environment`` yet, in plan order."""
    done = {(key[0], key[1], key[2]) for key in database.done_keys(environment.id)}
    tasks = []
    for point in plan:
        left = tuple(c for c in point.site.candidates if (point.site.key, point.shape, c) not in done)
        if left:
            tasks.append(Task(point, left))
    return tasks
