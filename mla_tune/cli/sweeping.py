"""Commands that use the device: ``sweep``, ``verify``, ``env``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mla_tune.cli import device_output, render
from mla_tune.cli.places import Device, database_path, export_path, make_folder, policy_path, this_device
from mla_tune.errors import MlaTuneError, UsageError
from mla_tune.site import MODELS, ModelConfig, SiteName
from mla_tune.site import model as find_model

if TYPE_CHECKING:
    from mla_tune.cli.pipeline import Plan

GpuOption = Annotated[
    str, typer.Option("--gpu", help="auto, cpu, or the SKU of the GPU in this machine: h200, b200, ...")
]
ModelOption = Annotated[list[str] | None, typer.Option("--model", help="Only this model; may be repeated.")]
SiteOption = Annotated[list[str] | None, typer.Option("--site", help="Only this site; may be repeated.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]

_DEFAULT_BUDGET_S = {"cpu": 150.0, "cuda": 540.0}
"""Seconds of measuring: a CPU run with its set-up stays under five minutes, a GPU run under ten."""


def sweep(
    gpu: GpuOption = "auto",
    model: ModelOption = None,
    site: SiteOption = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="Seconds to measure for (default 540 on a GPU, 150 on a CPU).")
    ] = None,
    db: Annotated[Path | None, typer.Option("--db", help="Working database (default db/<sku>.db).")] = None,
    no_fit: Annotated[bool, typer.Option("--no-fit", help="Measure only: write no export and no policy.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its estimated time, measure nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine, fit a policy and write it. Run again, it measures only what is missing."""
    device = this_device(gpu)
    models, names = _models(model), _sites(site)
    if budget is not None and not 0 < budget < float("inf"):
        raise UsageError(f"--budget must be a positive number of seconds: got {budget}; accepted: for example 300")
    from mla_tune.cli import pipeline

    plan = pipeline.make_plan(device.kind, device.sm_count, models, names)
    if dry_run:
        device_output.plan(plan.points, device, as_json)
        return
    _sweep(device, plan, budget or _DEFAULT_BUDGET_S[device.kind], db or database_path(device.sku), no_fit, as_json)


def _sweep(device: Device, plan: Plan, budget_s: float, path: Path, no_fit: bool, as_json: bool) -> None:
    from mla_tune.cli import pipeline
    from mla_tune.store.database import Database
    from mla_tune.sweep.runner import Sweep

    outputs = [path] if no_fit else [path, export_path(device.sku), policy_path(device.sku)]
    for output in outputs:  # now, not after minutes of measuring
        make_folder(output)
    with Database.open(path) as database, Sweep(device.kind) as worker:
        with device_output.live_progress(quiet=as_json) as on_progress:
            reports = pipeline.run_sweep(plan, worker, database, budget_s, on_progress)
        environment = worker.environment
        if not no_fit:
            pipeline.export(database, environment, export_path(device.sku))
    if not as_json:
        device_output.sweep_reports(reports, path)
    fitted = None
    try:
        if not no_fit:
            fitted = pipeline.fit(export_path(device.sku), policy_path(device.sku))
    finally:
        if as_json:
            device_output.sweep_json(reports, path, fitted.policy if fitted else None, policy_path(device.sku))
    if fitted and not as_json:
        render.policy_summary(fitted.policy, policy_path(device.sku), as_json)
        render.judgement(fitted.overall, fitted.left_out, fitted.lost)
        render.next_command(fitted.policy, policy_path(device.sku))


def verify(
    gpu: GpuOption = "auto", model: ModelOption = None, site: SiteOption = None, as_json: JsonOption = False
) -> None:
    """Compare every candidate with the torch reference on small shapes; exit 1 if one differs."""
    device = this_device(gpu)
    models, names = _models(model), _sites(site)
    from mla_tune.store.measurement import Outcome
    from mla_tune.sweep.grid import verification_points
    from mla_tune.sweep.runner import Sweep

    with Sweep(device.kind) as worker:
        results = list(worker.check(verification_points(models, names)))
    device_output.verification(results, as_json)
    wrong = [row for row in results if row.outcome not in (Outcome.OK, Outcome.UNSUPPORTED)]
    if wrong:
        raise MlaTuneError(
            f"every candidate must match the reference: {len(wrong)} of {len(results)} checks failed; see above"
        )
    if not any(row.outcome is Outcome.OK for row in results):
        raise MlaTuneError("one candidate at least must be compared: every one is unsupported here; see above")


def env(as_json: JsonOption = False) -> None:
    """Print what this machine is, as measurements record it, and which policy would serve it."""
    from dataclasses import asdict

    from mla_tune.bench.device import detect_environment
    from mla_tune.gpu import detect_gpu
    from mla_tune.runtime import Dispatcher

    gpu = detect_gpu()
    environment = detect_environment(gpu=gpu is not None)
    try:
        served_by = Dispatcher.for_this_gpu().source
    except MlaTuneError as error:
        served_by = f"none: {error}"
    if as_json:
        found = {"product": gpu.product if gpu else None, "policy": served_by, **asdict(environment)}
        print(json.dumps(found, indent=2))
        return
    device_output.environment(gpu.product if gpu else "no NVIDIA GPU", environment, served_by)


def _models(names: list[str] | None) -> list[ModelConfig]:
    return [find_model(name) for name in names] if names else list(MODELS.values())


def _sites(names: list[str] | None) -> list[SiteName]:
    known = [str(name) for name in SiteName]
    for name in names or ():
        if name not in known:
            raise UsageError(f"--site must be a known site: got {name!r}; accepted: {', '.join(known)}")
    return [SiteName(name) for name in names] if names else list(SiteName)
