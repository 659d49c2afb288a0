"""The main job behind ``sweep``, ``probe`` and ``fit``: measure, refine near the crossovers, find limits, export, fit."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mla_tune.cli import missing_tables
from mla_tune.cli.fit_options import NO_WISHES, Wishes
from mla_tune.cli.limit_search import Found, suspect_text, suspects_of
from mla_tune.cli.places import make_folder
from mla_tune.errors import FitError, PolicyError, UsageError
from mla_tune.fit.acquire import doubts
from mla_tune.fit.costs import CostModel
from mla_tune.fit.evaluation import LostTable, Weighted, by_traffic
from mla_tune.fit.objective import PLAIN, Objective, shape_weights
from mla_tune.fit.observations import Observations
from mla_tune.fit.refine import crossover_shapes
from mla_tune.fit.repeat import Repetition
from mla_tune.fit.repeat import compare as compare_sweeps
from mla_tune.fit.table_rows import FIRST_CALL_BOUND_S, fit_policy, left_out
from mla_tune.fit.usable import stored_provider, usable
from mla_tune.fit.work import Array
from mla_tune.hardware.datasheet import architecture
from mla_tune.hardware.sku import Environment
from mla_tune.policy.codec import load_policy, write_policy
from mla_tune.policy.evidence import PolicyEvidence
from mla_tune.policy.schema import Policy, Source, Table
from mla_tune.sites.provider import OWN, Provider
from mla_tune.sites.served_shapes import ServedShape, read_traffic
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import PLAIN as PLAIN_CONDITIONS
from mla_tune.sites.site import Conditions, ModelConfig, Site, SiteName, attention_sites
from mla_tune.store.database import Database
from mla_tune.store.export import export_sha256, read_export, write_export
from mla_tune.store.limit_try import Try
from mla_tune.store.measurement import Measurement, Regime
from mla_tune.store.tuned import Tuned
from mla_tune.sweep.grid import Grid, Point, attention_flops, cpu_grid, gpu_grid, grid_points, pool, seed_points
from mla_tune.sweep.preset import FULL, Preset
from mla_tune.sweep.runner import Progress, Report, Sweep

SEED = 20250
"""Seed of the held-out shapes; part of what a policy's evaluation means, so it is fixed."""


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What a sweep will measure before it looks at what it has measured."""

    grid: Grid
    preset: Preset
    models: tuple[ModelConfig, ...]
    names: tuple[SiteName, ...]
    points: tuple[Point, ...]
    recorded: Path | None = None
    """File of the traffic that weighs the doubts of an adaptive sweep."""
    objective: Objective = PLAIN
    conditions: Conditions = PLAIN_CONDITIONS
    """Those of every point."""


def make_plan(
    kind: str,
    sm_count: int,
    models: Sequence[ModelConfig],
    names: Sequence[SiteName],
    preset: Preset = FULL,
    recorded: Path | None = None,
    architecture: str | None = None,
) -> SweepPlan:
    """The first points for a device: the whole grid, or the seeds of an adaptive sweep, with what judges them.

    ``recorded`` is a file of traffic; ``architecture`` as of :func:`mla_tune.sweep.grid.gpu_grid`. Raises
    :class:`StoreError` where the file cannot be read, and :class:`UsageError` where it has nothing of the models and sites
    that are to be swept.
    """
    objective = Objective(traffic=read_traffic(recorded)) if recorded else PLAIN
    if recorded and not any(objective.recorded(name, model.name) for name in names for model in models):
        accepted = ", ".join(f"{name} of {model.name}" for name in names for model in models)
        raise UsageError(
            f"--traffic must have a forward of what is swept: got none in {recorded}; accepted: {accepted}"
        )
    grid = cpu_grid() if kind == "cpu" else gpu_grid(sm_count, architecture)
    held_out = min(preset.held_out, grid.held_out), min(preset.held_out_indexer, grid.held_out_indexer)
    grid = replace(grid, held_out=held_out[0], held_out_indexer=held_out[1])
    first = grid_points if preset.dense else seed_points
    points = tuple(first(grid, models, names, SEED))
    return SweepPlan(grid, preset, tuple(models), tuple(names), points, recorded, objective)


def under(plan: SweepPlan, conditions: Conditions) -> SweepPlan:
    """The points of ``plan`` under ``conditions``; with an overlap, those alone that have a top-k."""
    wanted = [p for p in plan.points if p.site.topk is not None or not conditions.overlap]
    points = tuple(replace(p, site=conditions.at(p.site)) for p in wanted)
    return replace(plan, points=points, conditions=conditions)


def run_sweep(
    plan: SweepPlan, sweep: Sweep, database: Database, budget_s: float, on_progress: Callable[[Progress], None]
) -> list[Report]:
    """Measure the plan, then where its curves say that more is worth knowing; a report for each round."""
    first = sweep.run(database, plan.points, budget_s, on_progress, plan.preset.without)
    if first.left or plan.conditions.overlap:  # what follows is of independent selections
        return [first]
    if not plan.preset.dense:
        return [first, *_adaptive_rounds(plan, sweep, database, budget_s - first.elapsed_s, on_progress)]
    known = {(point.site, point.shape) for point in plan.points}
    # Only of the plan: with the crossovers' own timings in it, each further sweep would place new ones.
    measured = _usable(database, sweep.environment, plan.conditions)
    costs = CostModel(sweep.environment, [m for m in measured if (m.site, m.shape) in known])
    crossovers = [
        Point(site, shape)
        for site, shape in crossover_shapes(costs, plan.models)
        if (site, shape) not in known and attention_flops(site, shape) <= plan.grid.max_attention_flops
    ]
    return [first, sweep.run(database, crossovers, budget_s - first.elapsed_s, on_progress)] if crossovers else [first]


def _adaptive_rounds(
    plan: SweepPlan, sweep: Sweep, database: Database, budget_s: float, on_progress: Callable[[Progress], None]
) -> Iterator[Report]:
    """Fit, measure where a wrong choice is expected to cost most, and again, until nothing is left in doubt or no time."""
    deadline = time.monotonic() + budget_s
    while (left_s := deadline - time.monotonic()) > 0:
        costs = CostModel(sweep.environment, _usable(database, sweep.environment, plan.conditions))
        points = doubtful_points(costs, plan)
        if not points:
            return
        yield sweep.run(database, points, left_s, on_progress, plan.preset.without)


def doubtful_points(costs: CostModel, plan: SweepPlan) -> list[Point]:
    """The next points of an adaptive sweep, the most doubtful first; none where every site is settled.

    A shape at which anything was attempted is not asked for again, whatever came of it.
    """
    if SiteName.PREFILL_ATTENTION not in plan.names:
        return []
    found = []
    for site, model in attention_sites(plan.models, plan.conditions).items():
        tried = set(costs.observations.shapes(site))
        shapes = [shape for shape in pool(plan.grid, model, site) if shape not in tried]
        weights = 1.0 if plan.recorded is None else _doubt_weights(plan, site, shapes, costs.environment.sm_count)
        found += doubts(costs, model, site, shapes, plan.preset.points_per_round, weights)
    return [Point(doubt.site, doubt.shape) for doubt in sorted(found, key=lambda doubt: -doubt.expected_loss)]


def _doubt_weights(plan: SweepPlan, site: Site, shapes: Sequence[Shape], sm_count: int) -> Array:
    """(num_shapes,) how much a loss counts by the traffic of all swept models that have the site."""
    recorded: Counter[ServedShape] = Counter()
    for model in plan.models:
        if site in attention_sites([model], plan.conditions):
            recorded.update(plan.objective.recorded(site.name, model.name))
    return shape_weights(recorded, shapes, sm_count)


@dataclass(frozen=True, slots=True)
class Measured:
    """One sweep, finished."""

    path: Path
    """Its database."""
    environment: Environment
    reports: tuple[Report, ...]
    limits: Found
    """What came of the search for limits, where something failed."""
    suspects: tuple[str, ...] = ()
    """Failures that no probe has settled yet, in a line each."""
    conditions: Conditions = PLAIN_CONDITIONS

    def observations(self) -> Observations:
        """What its database holds of its environment and conditions."""
        with Database.open(self.path, create=False) as database:
            return Observations(
                _usable(database, self.environment, self.conditions), architecture=architecture(self.environment.sku)
            )


def compare(first: Measured, second: Measured) -> Repetition:
    """How far two sweeps agree. Raises :class:`FitError` where they have no comparison in common."""
    return compare_sweeps(first.observations(), second.observations())


def export(database: Path, environment: Environment, path: Path, provider: Provider | None = None) -> None:
    """Write the measurements and tries of one environment for committing: those of ``provider``'s kernels.

    Tries of our own sites go with every provider's, since they hold for the kernels that it does not replace.
    """
    make_folder(path)
    with Database.open(database, create=False) as opened:
        rows, tries, tuned = _stored(opened, environment)
    kept = [row for row in rows if row.site.provider == provider]
    shown = [entry for entry in tries if entry.site.provider in (None, provider)]
    write_export(path, environment, kept, shown, tuned)


def _usable(database: Database, environment: Environment, conditions: Conditions) -> tuple[Measurement, ...]:
    """What a policy of these conditions would be fitted on."""
    return usable(database.measurements(environment.id), database.tuned(environment.id), conditions)


def _stored(database: Database, environment: Environment) -> tuple[list[Measurement], list[Try], list[Tuned]]:
    key = environment.id
    return database.measurements(key), database.tries(key), database.tuned(key)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A policy that was written, and what its tables do not say."""

    policy: Policy
    evidence: PolicyEvidence
    left_out: tuple[str, ...]
    """Tables that the policy lacks although their incumbent ran: no held-out point can judge them."""
    lost: tuple[str, ...]
    """Why tables of the policy that was there before are not in this one, and what brings them back, in a line each."""
    unsupported: tuple[str, ...]
    """What could not run where it was swept, and why, in a line each."""
    suspects: tuple[str, ...]
    """Failures that no probe has settled, in a line each."""
    weighted: Weighted | None
    """Every rule by the recorded traffic; None without any."""
    lost_points: tuple[LostTable, ...] = ()
    """Tables that keep the engine's default, because they lost their own held-out points."""


def fit(
    measurements: Path,
    out: Path,
    first_call_bound_s: float = FIRST_CALL_BOUND_S,
    overlap: int = 0,
    *,
    provider: str = OWN,
    wishes: Wishes = NO_WISHES,
) -> Fitted:
    """Fit the policy of an export and write it. Nothing is written unless the fit succeeds.

    ``overlap`` chooses the measurements: of inputs whose neighbouring selections overlap by so many percent.
    ``provider`` does too: ``own``, an engine or a provider's key; see :func:`mla_tune.fit.usable.stored_provider`.
    """
    found = read_export(measurements)
    conditions = Conditions(overlap, stored_provider(found.measurements, provider))
    rows = usable(found.measurements, found.tuned, conditions)
    if overlap and not any(row.site.overlap == overlap for row in rows):
        raise FitError(
            f"--overlap {overlap} needs measurements of such selections: got none in {measurements}; "
            f"next: mla-tune sweep --overlap {overlap}"
        )
    missing_tables.require_attention(rows)
    words = ["mla-tune", "fit", "--measurements", measurements.as_posix()]
    if first_call_bound_s != FIRST_CALL_BOUND_S:
        words += ["--first-call-bound", repr(first_call_bound_s)]
    words += wishes.words()
    if overlap:
        words += ["--overlap", str(overlap)]
    if conditions.provider:
        words += ["--provider", conditions.provider.key]
    source = Source(
        file=measurements.as_posix(),
        sha256=export_sha256(measurements),
        measurements=len(rows),
        command=shlex.join(words),
    )
    objective = wishes.objective()
    lost_points: list[LostTable] = []
    fitted = fit_policy(
        found.environment,
        rows,
        found.tries,
        source=source,
        first_call_bound_s=first_call_bound_s,
        objective=objective,
        tuned=found.tuned,
        on_lost=lost_points.append,
    )
    policy = fitted.policy
    observations = Observations(rows, regime=Regime(policy.regime), architecture=architecture(policy.gpu.sku))
    missing_tables.require_attention(rows, policy)
    make_folder(out)
    before = _tables(out)
    write_policy(out, policy, fitted.evidence)
    return Fitted(
        policy=policy,
        evidence=fitted.evidence,
        left_out=tuple(left_out(rows, policy)),
        lost=missing_tables.lost_tables(before, policy, rows),
        unsupported=tuple(missing_tables.reason_lines(missing_tables.unsupported_in(rows))),
        suspects=tuple(suspect_text(found) for found in suspects_of(Observations(rows, found.tries))),
        weighted=by_traffic(observations, policy, objective) if objective.traffic else None,
        lost_points=tuple(lost_points),
    )


def _tables(path: Path) -> tuple[Table, ...]:
    """Tables of the policy at ``path``; none where there is no readable one."""
    try:
        return load_policy(path).tables
    except PolicyError:
        return ()
