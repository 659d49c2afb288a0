"""Rows of the measurement database, to and from the values that the rest of the project passes on."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mla_tune.shape import Shape
from mla_tune.site import Site
from mla_tune.sku import Environment, KernelLibrary
from mla_tune.store.measurement import Measurement, Outcome, Regime, Role

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
    samples_us = measurement.samples_us
    return {
        "environment": environment,
        "point": point,
        "candidate": measurement.candidate,
        "part": measurement.part,
        "regime": measurement.regime.value,
        "outcome": measurement.outcome.value,
        "detail": measurement.detail,
        "latency_us": measurement.latency_us,
        "ci_low_us": measurement.ci_low_us,
        "ci_high_us": measurement.ci_high_us,
        "num_samples": measurement.num_samples,
        "samples_us": struct.pack(f"<{len(samples_us)}d", *samples_us),
        "first_call_s": measurement.first_call_s,
        "workspace_bytes": measurement.workspace_bytes,
        "finished_at": finished_at,
    }


def measurement_from(row: Row) -> Measurement:
    """Read a row of ``measurements`` joined with its point back.

    Raises ``ValueError``, ``TypeError``, ``struct.error`` or ``UsageError`` on one that was edited by hand.
    """
    samples_us = row["samples_us"]
    return Measurement(
        site=Site.parse(row["site"]),
        shape=shape_from(row),
        role=Role(row["role"]),
        candidate=row["candidate"],
        part=row["part"],
        regime=Regime(row["regime"]),
        outcome=Outcome(row["outcome"]),
        detail=row["detail"],
        latency_us=row["latency_us"],
        ci_low_us=row["ci_low_us"],
        ci_high_us=row["ci_high_us"],
        num_samples=row["num_samples"],
        samples_us=struct.unpack(f"<{len(samples_us) // 8}d", samples_us),
        first_call_s=row["first_call_s"],
        workspace_bytes=row["workspace_bytes"],
    )
