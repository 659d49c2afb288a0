"""Rows of the measurement database, to and from the values that the rest of the project passes on."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from enum import Enum
from types import NoneType
from typing import Any, get_args

from mla_tune.hardware.sku import Environment, KernelLibrary
from mla_tune.sites.launch_parameters import make_launch, parameters
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Site
from mla_tune.store.limit_try import Try
from mla_tune.store.measurement import Level, Measurement, Outcome, QuarantinedTiming, Regime, Role, StoredField, stored
from mla_tune.store.tuned import Tuned

Row = Mapping[str, Any]
"""Column name -> SQLite value."""


def environment_row(environment: Environment) -> dict[str, Any]:
    """Row of the table ``environments``."""
    libraries = json.dumps([asdict(library) for library in environment.libraries], separators=(",", ":"))
    return {"id": environment.id, **asdict(environment), "libraries": libraries}


def environment_from(row: Row) -> Environment:
    """Read :func:`environment_row` back. Raises ``ValueError`` or ``TypeError`` on a row that it cannot have made."""
    fields = {name: value for name, value in row.items() if name != "id"}
    libraries = tuple(KernelLibrary(**library) for library in json.loads(fields.pop("libraries")))
    return Environment(**fields, libraries=libraries)


def point_row(measurement: Measurement) -> dict[str, Any]:
    """What identifies a measurement's point in the table ``points``: (site, shape), without the role."""
    return {"site": measurement.site.key, **asdict(measurement.shape)}


def shape_from(row: Row) -> Shape:
    """Shape of a row of ``points``, or of one joined with it. Raises ``UsageError`` on an impossible one."""
    return Shape(row["num_reqs"], row["num_qo_tokens"], row["kv_tokens"])


def key_from(row: Row) -> tuple[str, Shape, str, str, str]:
    """:attr:`Measurement.key` of a row of ``measurements`` joined with its point. Raises like :func:`shape_from`."""
    return (row["site"], shape_from(row), row["candidate"], row["part"], row["regime"])


def measurement_row(measurement: Measurement, *, environment: str, point: int, finished_at: str) -> dict[str, Any]:
    """Row of the table ``measurements``."""
    values = {column.name: _to_sql(getattr(measurement, column.name)) for column in _COLUMNS}
    return {"environment": environment, "point": point, **values, "finished_at": finished_at}


_COLUMNS = stored(Level.KEY, Level.RESULT, Level.TIMING, Level.SAMPLES)
"""Columns of the table ``measurements`` that are fields of a measurement."""


def _to_sql(value: Any) -> Any:
    if isinstance(value, tuple):
        return _packed(value)
    return value.value if isinstance(value, Enum) else int(value) if isinstance(value, bool) else value


def _from_sql(column: StoredField, value: Any) -> Any:
    """``value`` as the field has it. An empty text stands for no enumerated value: the column cannot be null."""
    kind = next((kind for kind in get_args(column.kind) if kind is not NoneType), column.kind)
    if column.name in _SAMPLES:
        return _unpacked(value)
    if issubclass(kind, Enum):
        return kind(value) if value or column.default is not None else None
    return bool(value) if kind is bool else value


_SAMPLES = {column.name for column in stored(Level.SAMPLES)}


def quarantine_rows(
    measurement: Measurement, *, environment: str, point: int, finished_at: str
) -> Iterator[dict[str, Any]]:
    """Rows of the table ``quarantine``: one for each reason."""
    for entry in measurement.quarantined:
        yield {
            "environment": environment,
            "point": point,
            "candidate": measurement.candidate,
            "part": measurement.part,
            "regime": measurement.regime.value,
            "reason": entry.reason,
            "samples_us": _packed(entry.samples_us),
            "finished_at": finished_at,
        }


def try_row(attempt: Try, *, environment: str, finished_at: str) -> dict[str, Any]:
    """Row of the table ``tries``."""
    return {
        "environment": environment,
        "site": attempt.site.key,
        **asdict(attempt.shape),
        "candidate": attempt.candidate,
        "outcome": attempt.outcome.value,
        "detail": attempt.detail,
        "first_call_s": attempt.first_call_s,
        "finished_at": finished_at,
    }


def tuned_row(tuned: Tuned, *, environment: str, finished_at: str) -> dict[str, Any]:
    """Row of the table ``launches``."""
    return {
        "environment": environment,
        "kernel": tuned.launch.kernel,
        "size_from": tuned.launch.size_from,
        "parameters": json.dumps(parameters(tuned.launch.config), separators=(",", ":")),
        "latency_us": tuned.latency_us,
        "default_us": tuned.default_us,
        "trials": tuned.trials,
        "finished_at": finished_at,
    }


def tuned_from(row: Row) -> Tuned:
    """Read :func:`tuned_row` back. Raises like :func:`try_from`."""
    launch = make_launch(row["kernel"], row["size_from"], json.loads(row["parameters"]))
    return Tuned(launch, row["latency_us"], row["default_us"], row["trials"])


def try_from(row: Row) -> Try:
    """Read :func:`try_row` back. Raises ``ValueError``, ``TypeError`` or ``UsageError`` on one that was edited by hand."""
    return Try(
        site=Site.parse(row["site"]),
        candidate=row["candidate"],
        shape=shape_from(row),
        outcome=Outcome(row["outcome"]),
        detail=row["detail"],
        first_call_s=row["first_call_s"],
    )


def _packed(samples_us: tuple[float, ...]) -> bytes:
    return struct.pack(f"<{len(samples_us)}d", *samples_us)


def _unpacked(samples_us: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(samples_us) // 8}d", samples_us)


def measurement_from(row: Row) -> Measurement:
    """Read a row of ``measurements`` joined with its point back.

    Raises ``ValueError``, ``TypeError``, ``struct.error`` or ``UsageError`` on one that was edited by hand.
    """
    values = {column.name: _from_sql(column, row[column.name]) for column in _COLUMNS}
    return Measurement(site=Site.parse(row["site"]), shape=shape_from(row), role=Role(row["role"]), **values)


def quarantined_from(row: Row) -> QuarantinedTiming:
    """Read one of :func:`quarantine_rows`, joined with its point, back. Raises like :func:`measurement_from`."""
    return QuarantinedTiming(
        site=Site.parse(row["site"]),
        shape=shape_from(row),
        candidate=row["candidate"],
        part=row["part"],
        regime=Regime(row["regime"]),
        reason=row["reason"],
        samples_us=_unpacked(row["samples_us"]),
    )
