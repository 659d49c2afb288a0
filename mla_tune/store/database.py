"""The working database of a sweep: one SQLite file, one writer at a time, every committed point survives a crash.

A point's measurements are committed together or not at all. Whatever SQLite or the file system has to say comes out as
one-line :class:`mla_tune.errors.StoreError`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

import sqlite_utils

from mla_tune.errors import StoreError, UsageError
from mla_tune.hardware.sku import Environment
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Site
from mla_tune.store import queries
from mla_tune.store.export import (
    Export,
    attempt_to_export_precision,
    to_export_precision,
    tuned_to_export_precision,
)
from mla_tune.store.limit_try import Try, try_fault
from mla_tune.store.measurement import CAPABILITY, Measurement, Outcome, QuarantinedTiming, fault
from mla_tune.store.migrations import MIGRATIONS
from mla_tune.store.outside_cause import is_own_failure, judged_again
from mla_tune.store.sql_rows import (
    Row,
    environment_from,
    environment_row,
    key_from,
    measurement_from,
    measurement_row,
    point_row,
    quarantine_rows,
    quarantined_from,
    try_from,
    try_row,
    tuned_from,
    tuned_row,
)
from mla_tune.store.sqlite_file import check_file, connect, one_line_errors
from mla_tune.store.tuned import Tuned, tuned_fault

BUSY_TIMEOUT_S = 5.0
"""How long a write waits for another one; one point's commit takes milliseconds."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class EnvironmentSummary:
    """What a database holds of one environment."""

    environment: Environment
    points: int
    outcomes: tuple[tuple[Outcome, int], ...]
    """Measurements by outcome, sorted by outcome; outcomes that did not occur are left out."""
    tries: int
    """Tries of probes."""
    quarantined_samples: int
    first_finished_at: datetime
    last_finished_at: datetime

    @property
    def measurements(self) -> int:
        """All measurements, failed ones included."""
        return sum(count for _, count in self.outcomes)


class Database:
    """Measurements in one SQLite file. Made by :meth:`open`; a context manager that closes it."""

    def __init__(self, db: sqlite_utils.Database, path: Path) -> None:
        self._db = db
        self.path = path

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, create: bool = True, busy_timeout_s: float = BUSY_TIMEOUT_S
    ) -> Database:
        """Open a database and bring its schema up to date; with ``create`` make it where there is none.

        A file that is no measurement database, or that a newer version wrote, is refused before anything writes to it.
        """
        path = Path(path)
        with one_line_errors(path):
            check_file(path, create=create)
            connection = connect(path, "mode=rwc" if create else "mode=rw", busy_timeout_s)
            try:
                database = cls(sqlite_utils.Database(connection, execute_plugins=False), path)
                database._prepare()
            except BaseException:  # whatever it was, the file must not stay open
                connection.close()
                raise
        return database

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the last one to close it folds the write-ahead log in."""
        with one_line_errors(self.path):
            self._db.close()

    def record(
        self, environment: Environment, measurements: Iterable[Measurement], finished_at: datetime | None = None
    ) -> None:
        """Store measurements in one transaction: all of them or, on :class:`StoreError`, none.

        One with the key of a stored one replaces it. A point keeps the role it was first recorded with. ``finished_at``
        defaults to now.
        """
        rows = list(measurements)
        for measurement in rows:
            if reason := fault(measurement):
                raise StoreError(f"a measurement must be sound: {measurement.label}: {reason}")
        if not rows:
            return
        time = _utc(finished_at)
        with one_line_errors(self.path), self._transaction():
            row = environment_row(environment)
            self._db.table("environments").insert(row, ignore=True)
            distinct = {(m.site, m.shape, m.role): m for m in rows}
            points = {(m.site, m.shape): self._point_id(m) for m in distinct.values()}
            placed = [(m, {"environment": row["id"], "point": points[m.site, m.shape]}) for m in rows]
            self._db.table("measurements").insert_all(
                [measurement_row(m, **place, finished_at=time) for m, place in placed], replace=True
            )
            self._db.table("quarantine").insert_all(
                [entry for m, place in placed for entry in quarantine_rows(m, **place, finished_at=time)]
            )

    def record_tries(self, environment: Environment, tries: Iterable[Try], finished_at: datetime | None = None) -> None:
        """Store tries of a probe in one transaction, as :meth:`record` does measurements; a later one replaces."""
        rows = list(tries)
        for attempt in rows:
            if reason := try_fault(attempt):
                raise StoreError(f"a try must be sound: {attempt.site.key} {attempt.candidate}: {reason}")
        if not rows:
            return
        time = _utc(finished_at)
        with one_line_errors(self.path), self._transaction():
            row = environment_row(environment)
            self._db.table("environments").insert(row, ignore=True)
            self._db.table("tries").insert_all(
                [try_row(attempt, environment=row["id"], finished_at=time) for attempt in rows], replace=True
            )

    def record_tuned(
        self, environment: Environment, tuned: Iterable[Tuned], finished_at: datetime | None = None
    ) -> None:
        """Store tuned launch parameters in one transaction, as :meth:`record` does measurements; a later one replaces."""
        rows = list(tuned)
        for entry in rows:
            if reason := tuned_fault(entry):
                raise StoreError(f"launch parameters must be sound: {entry.launch.kernel}: {reason}")
        if not rows:
            return
        time = _utc(finished_at)
        with one_line_errors(self.path), self._transaction():
            row = environment_row(environment)
            self._db.table("environments").insert(row, ignore=True)
            self._db.table("launches").insert_all(
                [tuned_row(entry, environment=row["id"], finished_at=time) for entry in rows], replace=True
            )

    def merge(self, export: Export) -> int:
        """Record the measurements and tries that an export adds or changes and return how many that were.

        A stored measurement that the export only repeats, to export precision, is left alone and keeps its raw samples.
        Failures that did not come from the candidate are judged again: see :mod:`mla_tune.store.outside_cause`.
        """
        environment = export.environment
        measurements = [judged_again(measurement) for measurement in export.measurements]
        stored = {m.key: to_export_precision(m) for m in self.measurements(environment.id)}
        news = [m for m in measurements if stored.get(m.key) != to_export_precision(m)]
        known = {attempt.key: attempt_to_export_precision(attempt) for attempt in self.tries(environment.id)}
        new_tries = [
            t
            for t in export.tries
            if known.get(t.key) != attempt_to_export_precision(t)
            and (t.outcome not in CAPABILITY or is_own_failure(t.outcome, t.detail))
        ]
        tuned = {entry.key: tuned_to_export_precision(entry) for entry in self.tuned(environment.id)}
        new_tuned = [entry for entry in export.tuned if tuned.get(entry.key) != tuned_to_export_precision(entry)]
        self.record(environment, news)
        self.record_tries(environment, new_tries)
        self.record_tuned(environment, new_tuned)
        return len(news) + len(new_tries) + len(new_tuned)

    def environments(self) -> list[Environment]:
        """Every environment that has measurements or tries, ordered by SKU and id."""
        return self._rows("select * from environments order by sku, id", {}, environment_from)

    def measurements(self, environment_id: str, site: Site | None = None) -> list[Measurement]:
        """All measurements of one environment (of one site), ordered by their key, raw samples included."""
        parameters = {"environment": environment_id, "site": site.key if site else None}
        return self._rows(queries.MEASUREMENTS, parameters, measurement_from)

    def failures(self, environment_id: str) -> list[Measurement]:
        """Measurements of candidates that have no timing at their point, ordered by their key; disturbed ones are none."""
        return self._rows(queries.FAILURES, {"environment": environment_id}, measurement_from)

    def quarantined(self, environment_id: str) -> list[QuarantinedTiming]:
        """All disturbed samples of one environment, in the order stored; nothing ever removes them."""
        return self._rows(queries.QUARANTINE, {"environment": environment_id}, quarantined_from)

    def tries(self, environment_id: str) -> list[Try]:
        """All tries of one environment, ordered by their key."""
        return self._rows(queries.TRIES, {"environment": environment_id}, try_from)

    def tuned(self, environment_id: str) -> list[Tuned]:
        """All tuned launch parameters of one environment, ordered by their key."""
        return self._rows(queries.LAUNCHES, {"environment": environment_id}, tuned_from)

    def done_candidates(self, environment_id: str) -> set[tuple[str, Shape, str, str]]:
        """(site, shape, candidate, launches) of everything in :meth:`done_keys`: with what launch parameters it ran."""
        return set(self._rows(queries.KEYS, {"environment": environment_id}, _timed_with))

    def done_keys(self, environment_id: str) -> set[tuple[str, Shape, str, str, str]]:
        """Keys (see :attr:`Measurement.key`) of everything stored for one environment, failures included.

        Not those without an undisturbed sample, which are to be measured again.
        """
        return set(self._rows(queries.KEYS, {"environment": environment_id}, key_from))

    def summaries(self) -> list[EnvironmentSummary]:
        """What is stored, an environment each, in the order of :meth:`environments`."""
        return [self._summary(environment) for environment in self.environments()]

    def _prepare(self) -> None:
        self._db.enable_wal()
        self._db.execute("pragma foreign_keys = on")
        if MIGRATIONS.pending(self._db):
            with self._transaction():
                MIGRATIONS.apply(self._db)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Take the write lock at once: a read that turns into a write could fail without waiting for the lock."""
        self._db.execute("begin immediate")
        try:
            yield
            self._db.commit()
        except BaseException:  # an interrupt too: all of it or nothing
            self._db.rollback()
            raise

    def _rows(self, sql: str, parameters: dict[str, Any], read: Callable[[Row], _T]) -> list[_T]:
        with one_line_errors(self.path):
            rows = list(self._db.query(sql, parameters))
        try:
            return [read(row) for row in rows]
        except (ValueError, TypeError, UsageError, struct.error) as error:
            raise StoreError(
                f"a measurement database must have the rows that mla-tune wrote: {self.path} was edited: {error}; "
                "restore a copy, or import the committed export into a new file"
            ) from error

    def _point_id(self, measurement: Measurement) -> int:
        """Row of a measurement's point, made if it is new. Raises :class:`StoreError` if its role is another one."""
        points = self._db.table("points")
        identity = point_row(measurement)
        points.insert({**identity, "role": measurement.role.value}, ignore=True)
        where = "site = :site and num_reqs = :num_reqs and num_qo_tokens = :num_qo_tokens and kv_tokens = :kv_tokens"
        row = next(points.rows_where(where, identity))
        if row["role"] != measurement.role:
            raise StoreError(
                f"a point must keep its role: {measurement.label} is {row['role']} in {self.path}, "
                f"got {measurement.role}; record it with its first role, or sweep into another database"
            )
        return int(row["id"])

    def _summary(self, environment: Environment) -> EnvironmentSummary:
        parameters = {"environment": environment.id}
        outcomes = self._rows(
            queries.OUTCOMES, parameters, lambda row: (Outcome(row["outcome"]), int(row["measurements"]))
        )
        (summary,) = self._rows(
            queries.ALL_TIMES + queries.SPAN,
            parameters,
            lambda row: EnvironmentSummary(
                environment=environment,
                points=row["points"],
                outcomes=tuple(outcomes),
                tries=row["tries"],
                quarantined_samples=row["quarantined"],
                first_finished_at=datetime.fromisoformat(row["first"]),
                last_finished_at=datetime.fromisoformat(row["last"]),
            ),
        )
        return summary


def _timed_with(row: Row) -> tuple[str, Shape, str, str]:
    site, shape, candidate, _, _ = key_from(row)
    return site, shape, candidate, str(row["launches"])


def _utc(moment: datetime | None) -> str:
    """A moment, or now, as it is stored."""
    return (moment or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds")
