"""Commands on measurement databases: ``db export``, ``db import``, ``db ls``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mla_tune.cli.places import database_path, export_path, make_folder, policy_sku
from mla_tune.errors import StoreError

if TYPE_CHECKING:
    from mla_tune.hardware.sku import Environment
    from mla_tune.store.database import Database

GpuOption = Annotated[str, typer.Option("--gpu", help="auto, cpu or a SKU: whose files are meant.")]
DbOption = Annotated[
    Path | None, typer.Option("--db", help="Working database (default db/<sku>.db of the user's folder).")
]


def export(
    gpu: GpuOption = "auto",
    db: DbOption = None,
    environment: Annotated[
        str | None, typer.Option("--environment", help="Environment id, if there are several.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Export file (default db/<sku>.jsonl of the user's folder).")
    ] = None,
) -> None:
    """Write one environment's measurements as sorted JSON lines, ready to commit.

    Example: mla-tune db export --gpu h200 --out h200.jsonl
    """
    from mla_tune.cli import pipeline
    from mla_tune.store.database import Database

    sku = policy_sku(gpu)
    with Database.open(db or database_path(sku), create=False) as database:
        chosen = _environment(database, environment)
    pipeline.export(db or database_path(sku), chosen, out or export_path(chosen.sku))
    print(out or export_path(chosen.sku))


def _environment(database: Database, wanted: str | None) -> Environment:
    environments = database.environments()
    matching = [e for e in environments if wanted is None or e.id == wanted]
    if len(matching) == 1:
        return matching[0]
    accepted = ", ".join(e.id for e in environments) or "none"
    raise StoreError(
        f"--environment must name one that {database.path} holds: got {wanted or 'none'}; accepted: {accepted}; "
        "see `mla-tune db ls`"
    )


def import_(
    source: Annotated[Path, typer.Argument(help="Export file to read.")],
    db: DbOption = None,
    only_tries: Annotated[
        bool, typer.Option("--only-tries", help="Only a probe's tries: FlashMLA's limits hold for any provider.")
    ] = False,
) -> None:
    """Read an export into a working database (raw samples are not in exports).

    Example: mla-tune db import db/nvidia-h200.jsonl --db work.db
    """
    from mla_tune.store.database import Database
    from mla_tune.store.export import read_export

    found = read_export(source)
    if only_tries:
        found = replace(found, measurements=(), tuned=())
    path = db or database_path(found.environment.sku)
    make_folder(path)
    with Database.open(path) as database:
        new = database.merge(found)
    total = len(found.measurements) + len(found.tries) + len(found.tuned)
    print(f"{new} of {total} measurements, tries and launches were new: {path}")


def ls(gpu: GpuOption = "auto", db: DbOption = None, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List the environments in a database, with their outcomes.

    Example: mla-tune db ls --gpu h200
    """
    from mla_tune.cli.output import render
    from mla_tune.store.database import Database

    with Database.open(db or database_path(policy_sku(gpu)), create=False) as database:
        render.database(database.summaries(), as_json)
