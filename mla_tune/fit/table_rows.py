"""From measurements to a policy: the one entry of the fit.

The same measurements give the same policy, in whatever order they come. Held-out points reach only the judgement, and
the limits (a failure that was seen must not be served).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import msgspec

from mla_tune.errors import FitError
from mla_tune.fit.costs import CostModel
from mla_tune.fit.crossover import Candidates, incumbent_row, swept_shapes, table_rows
from mla_tune.fit.evaluation import LostTable, held_out, held_out_points, lost_table, overall
from mla_tune.fit.interval import LEAST_DIFFERENCE
from mla_tune.fit.limits import is_unsafe, limits, suspects
from mla_tune.fit.objective import PLAIN, Objective, require_regime, require_traffic
from mla_tune.fit.observations import Observations
from mla_tune.fit.scope import Scope, scopes
from mla_tune.fit.table_builds import builds_of
from mla_tune.fit.training import measured_range
from mla_tune.hardware.sku import Environment
from mla_tune.policy.evidence import PolicyEvidence, RowEvidence, TableEvidence
from mla_tune.policy.kernel_config import kernel_configs
from mla_tune.policy.schema import Gpu, Ineligible, Library, Limit, Policy, PolicyEnvironment, Source, Table
from mla_tune.sites.engines import Engine, engine_choice
from mla_tune.sites.site import FORWARD, Conditions
from mla_tune.store.limit_try import Try
from mla_tune.store.measurement import Measurement, Role
from mla_tune.store.tuned import Tuned

FIRST_CALL_BOUND_S = 1.0
"""Longest first call on a new shape that a served candidate may cost: a request that waits for it misses any deadline."""
_MOST_NOISE_BAND = 0.99
"""Where timings scatter by their own size nothing can win; a policy still has to hold a number below 1."""


OnLost = Callable[[LostTable], None]
"""Is told of a table that lost its own held-out points."""


@dataclass(frozen=True, slots=True)
class FittedTable:
    """A table and what justifies it."""

    table: Table
    evidence: TableEvidence


@dataclass(frozen=True, slots=True)
class FittedPolicy:
    """A policy and what justifies it."""

    policy: Policy
    evidence: PolicyEvidence


def fit_policy(
    environment: Environment,
    measurements: Iterable[Measurement],
    tries: Iterable[Try] = (),
    *,
    source: Source,
    first_call_bound_s: float = FIRST_CALL_BOUND_S,
    objective: Objective = PLAIN,
    tuned: Iterable[Tuned] = (),
    on_lost: OnLost = lambda _: None,
) -> FittedPolicy:
    """The policy that ``measurements`` of one environment, and a probe's ``tries`` there, support.

    ``tuned`` are the launch parameters that the measurements were taken with; the policy carries them.

    ``on_lost`` is told of tables that keep the engine's default because they lost their own held-out points.

    A site, or a model, that was not swept has no table; nor has one whose incumbent never ran, since there is nothing
    to switch from; nor a mix of layer types that share no points; nor a site without a held-out point to judge it by
    (:func:`left_out` names these). Raises :class:`FitError` if no table is left.
    """
    costs = CostModel(environment, measurements, tries, objective.regime)
    require_regime(costs.observations)
    conditions = costs.observations.conditions
    found = every_table(conditions, lambda one: fit_table(costs, one, first_call_bound_s, objective, on_lost))
    tables = tuple(entry.table for entry in found)
    if not tables:
        raise FitError(
            f"a policy needs a site whose incumbent ran, with held-out points to judge it by: got none for "
            f"{environment.sku}; next: run `mla-tune sweep` again, without filters or with a larger --budget"
        )
    require_traffic(objective, tables)
    policy = Policy(
        gpu=Gpu(sku=environment.sku, sm_count=environment.sm_count),
        evidence="measured",
        regime=str(costs.observations.regime),
        environment=policy_environment(environment),
        source=source,
        overlap=conditions.overlap,
        provider=conditions.provider.key if conditions.provider else None,
        kernel_config=kernel_configs(entry.launch for entry in tuned),
        tables=tables,
    )
    evidence = PolicyEvidence(
        first_call_bound_s=first_call_bound_s,
        overall=overall(costs.observations, tables),
        tables=tuple(entry.evidence for entry in found),
        objective=objective.stated(),
    )
    return FittedPolicy(policy, evidence)


def every_table(conditions: Conditions, fit: Callable[[Scope], FittedTable | None]) -> list[FittedTable]:
    """What ``fit`` gives for every table that a policy can have, without those for which it gives none.

    The forward of a model with one layer type has the table of that layer: every cost is the same number of times as high.
    """
    found: list[FittedTable] = []
    entry: FittedTable | None = None
    for one in scopes(conditions):
        if one.layer != FORWARD or len(one.parts) > 1:
            entry = fit(one)
        elif entry is not None:  # of the layer, which comes just before
            table = msgspec.structs.replace(entry.table, layer=FORWARD)
            entry = FittedTable(table, msgspec.structs.replace(entry.evidence, layer=FORWARD))
        if entry is not None:
            found.append(entry)
    return found


def policy_environment(environment: Environment) -> PolicyEnvironment:
    """``environment`` as a policy states it."""
    return PolicyEnvironment(
        driver=environment.driver,
        cuda=environment.cuda,
        torch=environment.torch,
        triton=environment.triton,
        shared_memory_optin_bytes=environment.shared_memory_optin_bytes,
        libraries=tuple(
            Library(name=library.name, version=library.version, sha256=library.sha256)
            for library in environment.libraries
        ),
    )


def fit_table(
    costs: CostModel,
    scope: Scope,
    first_call_bound_s: float = FIRST_CALL_BOUND_S,
    objective: Objective = PLAIN,
    on_lost: OnLost = lambda _: None,
) -> FittedTable | None:
    """One table, judged; None where the incumbent never ran, no held-out point can judge it, or a mix shares no points.

    One that loses its own held-out points keeps the engine's default, and ``on_lost`` is told.
    """
    found = unjudged_table(costs, scope, first_call_bound_s, objective)
    if found is None or not held_out_points(costs.observations, found.table):
        return None
    judged = held_out(costs.observations, found.table)
    lost = lost_table(found.table, judged, found.evidence.noise_band)
    if lost is None:
        return replace(found, evidence=msgspec.structs.replace(found.evidence, held_out=judged))
    on_lost(lost)
    table = msgspec.structs.replace(found.table, rows=(incumbent_row(found.table.incumbent),))
    rows = (RowEvidence(num_reqs_from=0, kv_tokens_from=0),)
    evidence = msgspec.structs.replace(found.evidence, rows=rows, held_out=held_out(costs.observations, table))
    return replace(found, table=table, evidence=evidence)


def unjudged_table(
    costs: CostModel,
    scope: Scope,
    first_call_bound_s: float = FIRST_CALL_BOUND_S,
    objective: Objective = PLAIN,
) -> FittedTable | None:
    """One table without its judgement; None where the incumbent never ran, or where a mix shares no points.

    Of modelled costs its noise band is their uncertainty: the least relative difference that is beyond doubt.
    """
    candidates = _candidates(costs.observations, scope, first_call_bound_s)
    if candidates is None:
        return None
    swept = swept_shapes(costs, scope, candidates.names)
    if len(scope.parts) > 1 and not (swept and scope.swept(costs.observations, Role.HELD_OUT)):
        return None
    if costs.modelled:
        candidates = replace(candidates, noise_band=_uncertainty(costs, scope, candidates))
    found = table_rows(costs, scope, candidates, objective)
    builds, candidate_builds = builds_of(costs.environment, scope, candidates.incumbent, candidates.names)
    table = Table(
        site=str(scope.name),
        model=scope.model.name,
        h_q=scope.h_q,
        layer=str(scope.layer),
        engine=scope.engine,
        incumbent=candidates.incumbent,
        candidates=tuple(sorted(candidates.names)),
        builds=builds,
        candidate_builds=candidate_builds,
        measured=measured_range(swept),
        limits=tuple(
            Limit(candidate=limit.candidate, num_qo_tokens=limit.num_qo_tokens) for limit in candidates.limits
        ),
        ineligible=candidates.ineligible,
        rows=found.rows,
    )
    evidence = TableEvidence(
        site=table.site,
        model=table.model,
        h_q=table.h_q,
        layer=table.layer,
        engine=table.engine,
        noise_band=candidates.noise_band,
        rows=found.evidence,
        limits=candidates.limits,
        workspace_cap=found.cap,
    )
    return FittedTable(table, evidence)


def _uncertainty(costs: CostModel, scope: Scope, candidates: Candidates) -> float:
    """How much slower another candidate must look than it does before its interval reaches the incumbent's.

    Both predictions are uncertain, and both ways: the intervals are apart where the costs differ by more than both
    half-widths together.
    """
    errors = {name: scope.error(costs, name) for name in candidates.names}
    others = [error for name, error in errors.items() if name != candidates.incumbent]
    apart = max(others, default=0.0) + errors[candidates.incumbent]
    return max(candidates.noise_band, round(math.expm1(apart), 4))


def left_out(measurements: Iterable[Measurement], policy: Policy) -> list[str]:
    """Tables that ``policy``, fitted on ``measurements``, lacks although their incumbent ran, as ``site, model, ...``."""
    observations = Observations(measurements)
    there = {table.key for table in policy.tables}
    return [
        ", ".join(
            str(part)
            for part in (
                scope.name,
                scope.model.name,
                scope.h_q and f"h_q {scope.h_q}",
                scope.layer,
                scope.engine is not Engine.SGLANG and scope.engine,
            )
            if part
        )
        for scope in scopes(observations.conditions)
        if _incumbent_ran(observations, scope)
        and (scope.name, scope.model.name, scope.h_q, scope.layer, scope.engine) not in there
    ]


def _candidates(observations: Observations, scope: Scope, first_call_bound_s: float) -> Candidates | None:
    """The candidates that a table may choose from, the incumbent first; None if that never ran."""
    incumbent = scope.incumbent
    sites = [site for site, _ in scope.parts]
    ran = scope.candidates(observations)
    if not _incumbent_ran(observations, scope) or is_unsafe(observations, sites, incumbent):
        return None
    others = [name for name in ran if name != incumbent and not is_unsafe(observations, sites, name)]
    names = (incumbent, *others)
    found = limits(observations, sites, names)
    if len({limit.candidate for limit in found}) == len(names):
        raise FitError(
            f"a table must leave one candidate at every query token count: got limits on all of {', '.join(names)} for "
            f"{scope.name} of {scope.model.name}, layer {scope.layer}; next: see why they fail, then sweep again"
        )
    slow = tuple(
        Ineligible(candidate=name, first_call_s=seconds)
        for name in others
        if (seconds := round(observations.first_call_s(sites[0], name), 3)) > first_call_bound_s
    )
    band = _noise_band(observations, scope, names)
    return Candidates(names, incumbent, band, found, slow, suspects(observations, sites, names))


def _incumbent_ran(observations: Observations, scope: Scope) -> bool:
    """Whether there is something to switch from; in a table of another engine than SGLang, also something of its own.

    A sweep from before that engine's candidates were known ran what the engines share, and says nothing about them.
    """
    ran = scope.candidates(observations)
    shared = {
        name for site, _ in scope.parts for name in engine_choice(Engine.SGLANG, scope.name, site.layer).candidates
    }
    return scope.incumbent in ran and (scope.engine is Engine.SGLANG or bool(set(ran) - shared))


def _noise_band(observations: Observations, scope: Scope, names: Sequence[str]) -> float:
    """Least relative difference that counts: the half-widths of the incumbent and of the noisiest other, added."""
    widths = [
        median([error for site, _ in scope.parts for error in observations.relative_errors(site, name)] or [0.0])
        for name in names
    ]
    band = widths[0] + max(widths[1:], default=widths[0])
    return round(min(max(LEAST_DIFFERENCE, band), _MOST_NOISE_BAND), 4)
