"""The command ``probe``: how many query tokens each candidate can take, and what its first call costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from mla_tune.cli.options import (
    DEFAULT_TIMEOUT_S,
    DbOption,
    GpuOption,
    JsonOption,
    ModelOption,
    SiteOption,
    TimeoutOption,
    chosen_models,
    chosen_sites,
    parsed_count,
    positive_seconds,
)
from mla_tune.cli.output import device_output, render
from mla_tune.cli.places import database_path, export_path, make_folder, policy_path, this_device
from mla_tune.errors import UsageError
from mla_tune.sites.candidates import CANDIDATES, names_at
from mla_tune.sites.site import Conditions, ModelConfig, Site, SiteName

if TYPE_CHECKING:
    from mla_tune.store.database import Database
    from mla_tune.store.limit_try import Try
    from mla_tune.sweep.probe import Bound, Prober

_NO_BUDGET_S = 1e9


def probe(
    gpu: GpuOption = "auto",
    model: ModelOption = None,
    site: SiteOption = None,
    candidate: Annotated[
        list[str] | None, typer.Option("--candidate", help="Only this candidate; may be repeated.")
    ] = None,
    largest: Annotated[
        int | None,
        typer.Option(
            "--max",
            parser=parsed_count,
            metavar="TOKENS",
            help="Most query tokens to try (default 131072 on a GPU, 4096 on a CPU).",
        ),
    ] = None,
    suspects: Annotated[
        bool, typer.Option("--suspects", help="Only what a sweep saw fail, up to where it failed.")
    ] = False,
    budget: Annotated[
        float | None, typer.Option("--budget", help="Seconds to search for (default: to the end).")
    ] = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    db: DbOption = None,
    no_fit: Annotated[bool, typer.Option("--no-fit", help="Store the tries only: no export, no policy.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the largest query token count that each candidate runs correctly: doubling, bisection, a process a try.

    Example: mla-tune probe --candidate with_kvcache --max 65536
    """
    device = this_device(gpu)
    targets = _targets(chosen_models(model), chosen_sites(site), candidate)
    most = _DEFAULT_MAX[device.kind] if largest is None else largest
    if not 1 <= most <= _LARGEST_MAX:
        raise UsageError(f"--max must be a count of query tokens: got {most}; accepted: 1 to {_LARGEST_MAX}")
    budget_s = _NO_BUDGET_S if budget is None else positive_seconds("--budget", budget)
    positive_seconds("--timeout", timeout)
    from mla_tune.cli import pipeline
    from mla_tune.cli.limit_search import search_limits
    from mla_tune.store.database import Database
    from mla_tune.store.lock import sweep_lock
    from mla_tune.sweep.probe import Prober

    path = db or database_path(device.sku)
    export, policy = export_path(device.sku), policy_path(device.sku)
    for output in [path] if no_fit else [path, export, policy]:
        make_folder(output)
    with sweep_lock(path), Database.open(path) as database, Prober(device.kind, timeout) as prober:
        on_try = device_output.tried(quiet=as_json)
        if suspects:
            bounds = _settled(prober, database, targets, budget_s, on_try)
        else:
            bounds = search_limits(prober, database, dict.fromkeys(targets, most), budget_s, on_try).bounds
        measured = any(key[0] in {site.key for site, _ in targets} for key in database.done_keys(prober.environment.id))
    device_output.bounds(bounds, as_json)
    if suspects and not bounds:
        render.note("nothing to probe: every failure that a sweep saw is settled")
    if measured and not no_fit:
        pipeline.export(path, prober.environment, export)
        pipeline.fit(export, policy)
        render.note(f"limits written to {policy}")
    elif not no_fit:
        render.note(
            f"tries stored in {path}; next: `mla-tune sweep` measures the rest and writes the limits to a policy"
        )


def _settled(
    prober: Prober,
    database: Database,
    targets: list[tuple[Site, str]],
    budget_s: float,
    on_try: Callable[[Try], None],
) -> tuple[Bound, ...]:
    """What became of the suspects of ``targets``, with our own kernels around them and with every provider's."""
    from mla_tune.cli.limit_search import settle

    deadline = time.monotonic() + budget_s
    rows = database.measurements(prober.environment.id)
    bounds: list[Bound] = []
    for conditions in dict.fromkeys(Conditions(row.site.overlap, row.site.provider) for row in rows):
        wanted = {(conditions.at(site), candidate) for site, candidate in targets}
        bounds += settle(prober, database, conditions, deadline - time.monotonic(), on_try, wanted).bounds
    return tuple(bounds)


_DEFAULT_MAX = {"cpu": 4096, "cuda": 131072}
"""On a GPU twice the largest chunk that engines prefill with, on a CPU what takes seconds."""
_LARGEST_MAX = 1 << 20
"""The longest context of any model."""


def _targets(models: list[ModelConfig], names: list[SiteName], candidates: list[str] | None) -> list[tuple[Site, str]]:
    """Every (site, candidate) that the options name, each once."""
    known = {candidate.name for name in names for candidate in CANDIDATES[name]}
    for candidate in candidates or ():
        if candidate not in known:
            raise UsageError(
                f"--candidate must be one of the sites: got {candidate!r}; accepted: {', '.join(sorted(known))}"
            )
    sites = [
        model.site(name, layer, h_q if name is SiteName.PREFILL_ATTENTION else None)
        for name in names
        for model in models
        for h_q in model.heads
        for layer in model.site_layers(name)
    ]
    found = [(site, name) for site in sites for name in names_at(site) if not candidates or name in candidates]
    return list(dict.fromkeys(found))
