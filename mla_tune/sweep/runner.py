"""The parent's side of a sweep: feed points to a worker process, store what comes back, survive what kills the worker.

The parent never touches the device. A worker that dies or loses its device is replaced, and the candidate that it was
running is tried once more; if that fails too, or if it hangs, this costs the candidate its measurement at that point and
nothing else. What did not come from the candidate is stored as disturbed, and measured again by the next sweep.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from mla_tune.hardware.sku import Environment
from mla_tune.sites.candidates import candidates_at, names_at
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES, Launches
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Site
from mla_tune.store.database import Database
from mla_tune.store.measurement import CAPABILITY, Measurement, Outcome
from mla_tune.store.tuned import launches_from
from mla_tune.sweep.attempt import Attempt, attempt
from mla_tune.sweep.grid import Point
from mla_tune.sweep.outcomes import Failure, FailureTracker, GivenUp, failures, is_spoiled, was_skipped
from mla_tune.sweep.worker.messages import NOTHING_ADDED, TIMING, Added, Offer, Task
from mla_tune.sweep.worker.process import WorkerProcess
from mla_tune.sweep.worker.same_gpu import require_unchanged

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
    """Points that something outside the candidates spoiled; the next run measures them again."""
    given_up: tuple[GivenUp, ...]
    """Candidates that failed too often to be tried further at a site."""
    troubles: tuple[str, ...]
    """What went wrong that no candidate is to blame for, in a line each: those points are measured again next time."""
    recovered: tuple[str, ...]
    """Failures that did not occur again in a fresh process, in a line each."""
    restarts: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class _Job:
    """A task that is still to be done."""

    task: Task
    why: str = ""
    """How the first try failed, if this is the second."""
    retried_alone: bool = False
    """The first try was one with other candidates, any of which may have failed."""

    @property
    def retried(self) -> bool:
        return bool(self.why) or self.retried_alone

    def with_candidates(self, names: tuple[str, ...], why: str) -> _Job:
        """A second try of ``names``."""
        return _Job(replace(self.task, candidates=names), why)


_MOST_VAIN_RETRIES = 3
"""Second tries in a row that met the same trouble: more would double the time of a sweep that nothing can help."""


_MOST_OUTSIDE_ENDS = 2
"""Workers that may be ended from outside while a candidate runs at a site: a third would only cost the sweep its time."""


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
        self._restarts = self._vain_retries = 0
        self._recovered: list[str] = []
        self._unsupported: dict[tuple[Site, str], str | None] = {}
        self._ended_from_outside: dict[tuple[Site, str], list[str]] = {}
        """By site and candidate, what each worker said whose end came from outside."""
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

    def ask_support(self, sites: Iterable[Site]) -> dict[tuple[Site, str], str | None]:
        """Why each candidate of ``sites`` cannot run on this machine, None where it can. No inputs are built for it."""
        pairs = dict.fromkeys((site, name) for site in dict.fromkeys(sites) for name in names_at(site))
        open_pairs = tuple(pair for pair in pairs if pair not in self._unsupported)
        if open_pairs:
            answers = self._worker.support(open_pairs, self._timeout_s)
            if answers is None:  # importing the kernels of one candidate ended the worker: which one?
                answers = self._ask_support_one_by_one(open_pairs)
            self._unsupported.update(zip(open_pairs, answers, strict=True))
        return {pair: self._unsupported[pair] for pair in pairs}

    def _ask_support_one_by_one(self, pairs: tuple[tuple[Site, str], ...]) -> tuple[str | None, ...]:
        fatal: dict[str, str] = {}
        answers = []
        self._restart()
        for site, name in pairs:
            if name not in fatal:
                answer = self._worker.support(((site, name),), self._timeout_s)
                if answer is not None:
                    answers.append(answer[0])
                    continue
                fatal[name] = f"importing its kernels failed: {self._worker.exit_summary()}"
                self._restart()
            answers.append(fatal[name])
        return tuple(answers)

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
        troubles: Counter[str] = Counter()
        tracker = stored_failures(database, self.environment)
        self.ask_support(task.point.site for task in tasks)
        for index, task in enumerate(tasks):
            if time.monotonic() - start > budget_s:
                break
            if on_progress:
                on_progress(Progress(index, len(tasks), time.monotonic() - start, task.point))
            rows = self._measure_or_skip(task, tracker)
            database.record(self.environment, rows)
            failed += sum(row.outcome is not Outcome.OK for row in rows)
            disturbed += any(row.outcome is Outcome.DISTURBED for row in rows)
            troubles.update({row.detail for row in rows if is_spoiled(row.outcome, row.detail)})
            done = index + 1
            tracker.note(rows)
        if on_progress:
            on_progress(Progress(done, len(tasks), time.monotonic() - start, None))
        return Report(
            environment=self.environment,
            points=done,
            already_done=len(plan) - len(tasks),
            left=len(tasks) - done,
            failed=failed,
            disturbed=disturbed,
            given_up=tracker.given_up(),
            troubles=tuple(
                f"{detail} ({points} {'point' if points == 1 else 'points'})" for detail, points in troubles.items()
            ),
            recovered=tuple(self._recovered),
            restarts=self._restarts,
            elapsed_s=time.monotonic() - start,
        )

    def check(self, points: Iterable[Point]) -> Iterator[Measurement]:
        """Compare every candidate with the reference at ``points``, without timing; nothing is stored."""
        for point in points:
            rows = self._measure(Task(point, (*names_at(point.site), *self._added.at(point)), timed=False))
            yield from {row.candidate: row for row in rows}.values()

    def _measure_or_skip(self, task: Task, tracker: FailureTracker) -> list[Measurement]:
        reasons: dict[str, Failure] = {}
        for name in task.candidates:
            if (unsupported := self._unsupported.get((task.point.site, name))) is not None:
                reasons[name] = Failure(Outcome.UNSUPPORTED, unsupported)
            elif (skipped := tracker.skip_reason(task.point, name)) is not None:
                reasons[name] = skipped
            elif len(ended := self._ended_from_outside.get((task.point.site, name), [])) >= _MOST_OUTSIDE_ENDS:
                text = f"not tried again in this sweep: {len(ended)} workers were ended, the last: {ended[-1]}"
                reasons[name] = Failure(Outcome.DISTURBED, text)
        worth_trying = tuple(name for name in task.candidates if name not in reasons)
        rows = self._measure(replace(task, candidates=worth_trying, sampling_s=self._sampling_s))
        for name, failure in reasons.items():
            rows += failures(task.point, name, failure, self.regimes)
        digests = launch_digests(task.point, self._launches)
        return [replace(row, launches=digests.get(row.candidate, "")) for row in rows]

    def _measure(self, task: Task) -> list[Measurement]:
        """All rows of a task, whatever happens to the worker.

        What may end otherwise in a fresh worker is tried once more there before it is believed: a worker's end, and every
        failure that came from outside.
        """
        rows: list[Measurement] = []
        queue = deque([_Job(task)] if task.candidates else [])
        while queue:
            job = queue.popleft()
            result = attempt(self._worker, replace(job.task, launches=self._launches), self._timeout_s)
            spoiled = tuple(dict.fromkeys(row.candidate for row in result.rows if is_spoiled(row.outcome, row.detail)))
            again = spoiled if self._may_retry(job) else ()
            rows += [row for row in result.rows if row.candidate not in again]
            self._note_retry(job, result, spoiled)
            if again or result.failure is not None:
                self._restart()
            if again:
                why = next(row.detail for row in result.rows if row.candidate in again)
                queue.appendleft(_Job(replace(task, candidates=again), why))
            if result.failure is not None:
                more, blamed, failure = self._after_failure(job, result, result.failure)
                for name in blamed:
                    rows += failures(task.point, name, failure, self.regimes)
                    if failure.outcome is Outcome.DISTURBED:
                        self._ended_from_outside.setdefault((task.point.site, name), []).append(failure.detail)
                queue.extendleft(reversed(more))
        return rows

    def _may_retry(self, job: _Job) -> bool:
        return not job.retried and self._vain_retries < _MOST_VAIN_RETRIES

    def _note_retry(self, job: _Job, result: Attempt, spoiled: tuple[str, ...]) -> None:
        """Learn from a second try whether further ones are worth their time."""
        if not job.retried:
            return
        disturbed = result.failure is not None and result.failure.outcome is Outcome.DISTURBED
        self._vain_retries = self._vain_retries + 1 if spoiled or disturbed else 0
        ran = sorted({row.candidate for row in result.rows if row.outcome is Outcome.OK})
        if job.why and ran:
            point = job.task.point
            where = f"{point.site.key}, {point.shape.num_qo_tokens} query tokens"
            self._recovered.append(f"{', '.join(ran)} at {where} ran in a fresh process after: {job.why}")

    def _after_failure(
        self, job: _Job, result: Attempt, failure: Failure
    ) -> tuple[list[_Job], tuple[str, ...], Failure]:
        """What to try next after a worker failed, and which candidates have this failure as their result."""
        left = tuple(c for c in job.task.candidates if c not in {row.candidate for row in result.rows})
        running, timed_out = result.running, failure.outcome is Outcome.TIMEOUT
        from_outside = running is None or failure.outcome is Outcome.DISTURBED
        if from_outside and not timed_out:
            if self._may_retry(job):
                return [job.with_candidates(left, failure.detail)], (), failure
            blamed = left if running is None or running == TIMING else (running,)
            building = "building the inputs failed: " if running is None else ""
            failure = Failure(Outcome.DISTURBED, f"{building}{failure.detail}")
        elif running == TIMING and len(left) > 1:  # nobody knows whose fault it was: each alone
            return [_Job(replace(job.task, candidates=(name,)), retried_alone=True) for name in left], (), failure
        elif running is None:
            blamed = left
        else:
            blamed = (running or left[0],)
        others = tuple(name for name in left if name not in blamed)
        rest = [_Job(replace(job.task, candidates=others), job.why, job.retried_alone)] if others else []
        if not from_outside and not timed_out and not job.retried:
            return [job.with_candidates(blamed, failure.detail), *rest], (), failure
        return rest, blamed, failure

    def _restart(self) -> None:
        self._worker.stop()
        self._restarts += 1
        self._worker = WorkerProcess(self._kind, self._added.module)
        require_unchanged(self.environment, self._worker.hello.environment)


def launch_digests(point: Point, launches: Launches) -> dict[str, str]:
    """By candidate: which of the tuned launch parameters its kernels run with at ``point``."""
    return {found.name: launches.digest(found.own_kernels(point.site)) for found in candidates_at(point.site)}


def stored_failures(database: Database, environment: Environment) -> FailureTracker:
    """The failures that ``database`` holds, less those at a shape that ran in a fresh process since."""
    cleared = _cleared(database, environment)
    tracker = FailureTracker()
    tracker.note(row for row in database.failures(environment.id) if _point_key(row) not in cleared)
    return tracker


def _cleared(database: Database, environment: Environment) -> set[tuple[str, Shape, str]]:
    """(site, shape, candidate) that ran in a fresh process."""
    return {
        (entry.site.key, entry.shape, entry.candidate)
        for entry in database.tries(environment.id)
        if entry.outcome is Outcome.OK
    }


def _point_key(row: Measurement) -> tuple[str, Shape, str]:
    return row.site.key, row.shape, row.candidate


def _to_repeat(database: Database, environment: Environment) -> set[tuple[str, Shape, str]]:
    """Failures that no longer hold: the shape ran in a fresh process since, or what they were skipped for is gone."""
    cleared, tracker = _cleared(database, environment), stored_failures(database, environment)
    found = set()
    for row in database.failures(environment.id):
        disproved = row.outcome in CAPABILITY and _point_key(row) in cleared
        if disproved or (was_skipped(row) and tracker.skip_reason(Point(row.site, row.shape), row.candidate) is None):
            found.add(_point_key(row))
    return found


def missing_tasks(
    database: Database,
    environment: Environment,
    plan: Iterable[Point],
    added: Added = NOTHING_ADDED,
    launches: Launches = DEFAULT_LAUNCHES,
    without: Collection[str] = (),
) -> list[Task]:
    """The points of ``plan`` with the candidates, ``without`` some, that have no row for ``environment`` yet, in order.

    A row that was taken with other launch parameters than ``launches`` is none, nor is a failure that no longer holds.
    """
    repeat = _to_repeat(database, environment)
    done = {key for key in database.done_candidates(environment.id) if key[:3] not in repeat}
    tasks = []
    for point in plan:
        names = (*names_at(point.site), *added.at(point))
        key, digests = (point.site.key, point.shape), launch_digests(point, launches)
        left = tuple(n for n in names if n not in without and (*key, n, digests.get(n, "")) not in done)
        if left:
            tasks.append(Task(point, left))
    return tasks
