"""The measurement database's schema, as the steps that make it. A step that was released is never edited."""

from __future__ import annotations

import sqlite_utils
from sqlite_utils.migrations import Migrations

from mla_tune.store.measurement import CAPABILITY, Outcome
from mla_tune.store.outside_cause import outside_cause

MIGRATIONS = Migrations("mla_tune")


@MIGRATIONS()
def m001_initial(db: sqlite_utils.Database) -> None:
    """Environments, points and measurements. A point has one role: (site, shape) is unique whatever the role."""
    environments = {
        "id": str,
        "sku": str,
        "sm_count": int,
        "shared_memory_optin_bytes": int,
        "driver": str,
        "cuda": str,
        "torch": str,
        "triton": str,
        "libraries": str,  # JSON: [{"name": ..., "version": ..., "sha256": ...}, ...]
    }
    db.table("environments").create(environments, pk="id", not_null=environments)

    points = {"id": int, "site": str, "num_reqs": int, "num_qo_tokens": int, "kv_tokens": int, "role": str}
    db.table("points").create(points, pk="id", not_null=set(points) - {"id"})
    db.table("points").create_index(["site", "num_reqs", "num_qo_tokens", "kv_tokens"], unique=True)

    measurements = {
        "environment": str,
        "point": int,
        "candidate": str,
        "part": str,
        "regime": str,
        "outcome": str,
        "detail": str,
        "latency_us": float,
        "ci_low_us": float,
        "ci_high_us": float,
        "num_samples": int,
        "samples_us": bytes,  # little-endian float64, in the order taken
        "first_call_s": float,
        "workspace_bytes": int,
        "finished_at": str,  # ISO 8601, UTC
    }
    optional = {"latency_us", "ci_low_us", "ci_high_us", "first_call_s", "workspace_bytes"}
    db.table("measurements").create(
        measurements,
        pk=("environment", "point", "candidate", "part", "regime"),
        foreign_keys=[("environment", "environments", "id"), ("point", "points", "id")],
        not_null=set(measurements) - optional,
    )


@MIGRATIONS()
def m002_trust(db: sqlite_utils.Database) -> None:
    """Why sampling stopped and under which cap; the samples that were disturbed; the tries of probes."""
    db.table("measurements").add_column("stopped_by", str, not_null_default="")  # empty: not recorded
    db.table("measurements").add_column("power_capped", int, not_null_default=0)

    quarantine = {
        "id": int,
        "environment": str,
        "point": int,
        "candidate": str,
        "part": str,
        "regime": str,
        "reason": str,
        "samples_us": bytes,  # little-endian float64, in the order taken
        "finished_at": str,
    }
    db.table("quarantine").create(
        quarantine,
        pk="id",
        foreign_keys=[("environment", "environments", "id"), ("point", "points", "id")],
        not_null=set(quarantine) - {"id"},
    )
    db.table("quarantine").create_index(["environment", "point"])

    tries = {
        "environment": str,
        "site": str,
        "num_reqs": int,
        "num_qo_tokens": int,
        "kv_tokens": int,
        "candidate": str,
        "outcome": str,
        "detail": str,
        "first_call_s": float,
        "finished_at": str,
    }
    db.table("tries").create(
        tries,
        pk=("environment", "site", "num_reqs", "num_qo_tokens", "kv_tokens", "candidate"),
        foreign_keys=[("environment", "environments", "id")],
        not_null=set(tries) - {"first_call_s"},
    )


@MIGRATIONS()
def m003_launches(db: sqlite_utils.Database) -> None:
    """Tuned launch parameters of our own kernels, and with which of them a measurement was taken."""
    db.table("measurements").add_column("launches", str, not_null_default="")  # empty: the defaults

    launches = {
        "environment": str,
        "kernel": str,
        "size_from": int,
        "parameters": str,  # JSON: {"rows_per_program": 4, ...}
        "latency_us": float,
        "default_us": float,
        "trials": int,
        "finished_at": str,
    }
    db.table("launches").create(
        launches,
        pk=("environment", "kernel", "size_from"),
        foreign_keys=[("environment", "environments", "id")],
        not_null=launches,
    )


@MIGRATIONS()
def m004_outside_causes(db: sqlite_utils.Database) -> None:
    """Failures that did not come from the candidate become ``disturbed``, as what is stored now; their tries go.

    The next sweep measures these points again.
    """
    failed = ", ".join(f"'{outcome}'" for outcome in sorted(CAPABILITY))
    rows = db.execute(f"select rowid, detail from measurements where outcome in ({failed})").fetchall()
    for rowid, detail in rows:
        if outside_cause(detail):
            db.execute("update measurements set outcome = ? where rowid = ?", [Outcome.DISTURBED.value, rowid])
    rows = db.execute(f"select rowid, detail from tries where outcome in ({failed})").fetchall()
    for rowid, detail in rows:
        if outside_cause(detail):
            db.execute("delete from tries where rowid = ?", [rowid])


@MIGRATIONS()
def m005_products(db: sqlite_utils.Database) -> None:
    """Which product a GPU is. An environment of before keeps its id, and its rows: it does not know these."""
    db.table("environments").add_column("product", str, not_null_default="")
    db.table("environments").add_column("memory_gib", int, not_null_default=0)
    db.table("environments").add_column("power_limit_w", int, not_null_default=0)


def applied_migrations(db: sqlite_utils.Database) -> list[str]:
    """Names of the steps that made this database, oldest first; empty for one that mla-tune did not write."""
    return [migration.name for migration in MIGRATIONS.applied(db)]


def known_migrations() -> list[str]:
    """Names of all steps of this version, oldest first: those that an empty database still lacks."""
    with sqlite_utils.Database(memory=True, execute_plugins=False) as empty:
        return [migration.name for migration in MIGRATIONS.pending(empty)]
