"""The command ``sweep``: measure this machine, fit, and say what came of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mla_tune.cli.options import (
    DEFAULT_TIMEOUT_S,
    DbOption,
    GpuOption,
    JsonOption,
    ModelOption,
    OverlapOption,
    ProviderOption,
    SiteOption,
    StrictOption,
    TimeoutOption,
    TrafficOption,
    checked_overlap,
    checked_provider,
    chosen_models,
    chosen_sites,
    parsed_count,
    positive_seconds,
)
from mla_tune.cli.output import device_output, policy_output, render
from mla_tune.cli.places import LocalDevice, database_path, export_path, make_folder, policy_path, this_device
from mla_tune.errors import EnvironmentMismatchError, UsageError
from mla_tune.sites.provider import OWN, Provider
from mla_tune.sites.site import Conditions
from mla_tune.sweep.preset import find_preset

if TYPE_CHECKING:
    from mla_tune.cli.limit_search import Found
    from mla_tune.cli.pipeline import Measured, SweepPlan
    from mla_tune.hardware.sku import Environment
    from mla_tune.store.database import Database
    from mla_tune.store.tuned import Tuned
    from mla_tune.sweep.runner import Report, Sweep

_MOST_REPEATS = 9


def sweep(
    gpu: GpuOption = "auto",
    model: ModelOption = None,
    site: SiteOption = None,
    effort: Annotated[
        str, typer.Option("--effort", help="quick, default (adaptive) or full (the dense grid).")
    ] = "default",
    budget: Annotated[
        float | None, typer.Option("--budget", help="Seconds to measure for (default: by effort; 90 on a GPU).")
    ] = None,
    db: DbOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    repeat: Annotated[
        int,
        typer.Option(
            "--repeat",
            parser=parsed_count,
            metavar="COUNT",
            help="Sweep so many times, and report which choices differ from the first.",
        ),
    ] = 1,
    traffic: TrafficOption = None,
    no_fit: Annotated[bool, typer.Option("--no-fit", help="Measure only: write no export and no policy.")] = False,
    overlap: OverlapOption = 0,
    provider: ProviderOption = OWN,
    strict: StrictOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its estimated time, measure nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine, fit a policy and write it. Run again, it measures only what is missing.

    Example: mla-tune sweep --model deepseek-v4-pro --budget 600
    """
    device = this_device(gpu)
    models, names = chosen_models(model), chosen_sites(site)
    preset = find_preset(effort)
    budget_s = positive_seconds("--budget", preset.budget_s[device.kind] if budget is None else budget)
    positive_seconds("--timeout", timeout)
    if not 1 <= repeat <= _MOST_REPEATS:
        raise UsageError(f"--repeat must be a number of sweeps: got {repeat}; accepted: 1 to {_MOST_REPEATS}")
    from mla_tune.cli import pipeline
    from mla_tune.hardware.datasheet import architecture

    plan = pipeline.make_plan(device.kind, device.sm_count, models, names, preset, traffic, architecture(device.sku))
    plan = pipeline.under(plan, Conditions(checked_overlap(overlap)))
    checked_provider(provider)
    if dry_run:
        device_output.plan(plan.points, device, as_json)
        return
    _sweep(
        _Request(
            device=device,
            plan=plan,
            budget_s=budget_s,
            timeout_s=timeout,
            repeat=repeat,
            path=db or database_path(device.sku),
            fits=not no_fit and not overlap,  # the committed policy is that of independent selections
            provider=provider,
            as_json=as_json,
            strict=strict,
        )
    )


@dataclass(frozen=True, slots=True)
class _Request:
    """What one call of ``sweep`` is to do."""

    device: LocalDevice
    plan: SweepPlan
    budget_s: float
    timeout_s: float
    repeat: int
    path: Path
    fits: bool
    provider: str
    """``own``, or the engine whose installed kernels are to run; its export and policy are files of their own."""
    as_json: bool
    strict: bool
    """Whether a table that loses its own held-out points is an error."""

    @property
    def export(self) -> Path:
        """The export that it writes."""
        return export_path(self.device.sku, self.provider)

    @property
    def policy(self) -> Path:
        """The policy that it writes."""
        return policy_path(self.device.sku, self.provider)

    def outputs(self) -> list[Path]:
        """Every file that it writes."""
        derived = [self.export, self.policy] if self.fits else []
        return [*self.databases(), *derived]

    def databases(self) -> list[Path]:
        """The working database, and one for each repetition."""
        return [self.path, *(self.path.with_suffix(f".repeat-{n}.db") for n in range(2, self.repeat + 1))]


def _sweep(request: _Request) -> None:
    from mla_tune.cli import pipeline
    from mla_tune.cli.fit_options import Wishes

    for output in request.outputs():  # now, not after minutes of measuring
        make_folder(output)
    export, policy = request.export, request.policy
    path, *repeats_at = request.databases()
    first = _measure(request, path)
    others = [_measure(request, path, _tuned(first)) for path in repeats_at]  # with the first one's launch parameters
    if request.fits:
        pipeline.export(first.path, first.environment, export, first.conditions.provider)
    if not request.as_json:
        device_output.sweep_reports(first)
    fitted = None
    try:
        if request.fits:
            fitted = pipeline.fit(export, policy, provider=_key(first), wishes=Wishes(traffic=request.plan.recorded))
    finally:
        if request.as_json:
            repeats = [pipeline.compare(first, other) for other in others]
            device_output.sweep_json(first, repeats, fitted, policy)
    if request.as_json:
        render.lost_points(fitted.lost_points if fitted else (), strict=request.strict)
        return
    if fitted:
        policy_output.policy_summary(fitted.policy, fitted.evidence, str(policy), as_json=False)
        render.judgement(fitted.evidence.overall, fitted.left_out, fitted.lost)
        render.weighted(fitted.weighted)
    for other in others:
        device_output.repetition(pipeline.compare(first, other), other.path)
    if fitted:
        render.next_command(fitted.policy, policy)
        render.lost_points(fitted.lost_points, strict=request.strict)


def _tuned(measured: Measured) -> list[Tuned]:
    """Launch parameters that a sweep ran with."""
    from mla_tune.store.database import Database

    with Database.open(measured.path, create=False) as database:
        return database.tuned(measured.environment.id)


def _measure(request: _Request, path: Path, tuned: Sequence[Tuned] = ()) -> Measured:
    """One sweep into the database at ``path``, which takes over ``tuned``; then the probes of what failed in it."""
    from mla_tune.cli import pipeline
    from mla_tune.cli.limit_search import Found, open_suspects, suspect_text
    from mla_tune.store.database import Database
    from mla_tune.store.lock import sweep_lock

    deadline = time.monotonic() + request.budget_s
    with sweep_lock(path), Database.open(path) as database:
        plan, environment, reports = _measure_plan(request, database, tuned, request.budget_s)
        found = Found(())
        if not any(report.left for report in reports) and open_suspects(database, environment, plan.conditions):
            found = _settle(request, database, plan.conditions, deadline - time.monotonic())
        if found.cleared and (rest_s := deadline - time.monotonic()) > 0:
            reports += _measure_plan(request, database, (), rest_s)[2]
        rest = [suspect_text(suspect) for suspect in open_suspects(database, environment, plan.conditions)]
    return pipeline.Measured(path, environment, tuple(reports), found, tuple(rest), plan.conditions)


def _measure_plan(
    request: _Request, database: Database, tuned: Sequence[Tuned], budget_s: float
) -> tuple[SweepPlan, Environment, list[Report]]:
    from mla_tune.cli import missing_tables, pipeline
    from mla_tune.sweep.runner import Sweep

    with Sweep(request.device.kind, request.timeout_s, sampling_s=request.plan.preset.sampling_s) as worker:
        database.record_tuned(worker.environment, tuned)
        conditions = replace(request.plan.conditions, provider=_provider(worker, request.provider))
        plan = pipeline.under(request.plan, conditions)
        reasons = worker.ask_support(point.site for point in plan.points)
        for line in missing_tables.reason_lines(reasons):
            render.note(line)
        if (reason := missing_tables.no_attention_runs(reasons)) is not None:
            raise EnvironmentMismatchError(
                f"no attention candidate can run on this machine, nothing was measured: {reason}"
            )
        with device_output.live_progress(quiet=request.as_json) as on_progress:
            reports = pipeline.run_sweep(plan, worker, database, budget_s, on_progress)
        return plan, worker.environment, reports


def _settle(request: _Request, database: Database, conditions: Conditions, budget_s: float) -> Found:
    """Try what failed in the sweep in fresh processes."""
    from mla_tune.cli.limit_search import Found, settle
    from mla_tune.sweep.probe import Prober

    if budget_s <= 0:
        return Found(())
    with Prober(request.device.kind, request.timeout_s) as prober:
        return settle(prober, database, conditions, budget_s, device_output.tried(quiet=request.as_json))


def _provider(worker: Sweep, word: str) -> Provider | None:
    """The provider that ``--provider`` means on this machine; what of it had to be left out is said once."""
    if word == OWN:
        return None
    offer = worker.offer(word)
    if offer.left_out:
        render.warn(offer.left_out)
    return offer.provider


def _key(measured: Measured) -> str:
    """What ``fit --provider`` has to say for the same measurements."""
    provider = measured.conditions.provider
    return provider.key if provider else OWN
