"""A policy for a GPU that nobody measured: another one's stage curves, scaled; see :mod:`mla_tune.fit.scaling`.

No measurement of the other GPU takes part as such: what its whole paths took is known to the curves alone. Its sweep's
ranges, noise and first calls (host compilers) are taken over. Its limits are where the target has the same architecture,
since they belong to a kernel build there. On another one they are not stated, but the table claims no query token count
at which anything failed: above, the incumbent stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import msgspec

from mla_tune.errors import FitError, UsageError
from mla_tune.fit.costs import CandidateCosts, CostModel, PathCosts
from mla_tune.fit.limits import suspects
from mla_tune.fit.scaling import ScaledStage, Scaling, scale_stage
from mla_tune.fit.scope import Scope, scopes
from mla_tune.fit.table_rows import (
    FIRST_CALL_BOUND_S,
    FittedPolicy,
    FittedTable,
    every_table,
    policy_environment,
    unjudged_table,
)
from mla_tune.fit.work import work
from mla_tune.hardware.datasheet import Datasheet, datasheet
from mla_tune.policy.evidence import Modelled, PolicyEvidence, StageUncertainty, Uncertainty
from mla_tune.policy.schema import Gpu, Policy, Source
from mla_tune.sites.site import PLAIN, Site

_DIGITS = 4
"""Of an uncertainty in a policy."""


class ModelledCosts(CostModel):
    """Cost curves of ``target``, scaled from those of the GPU that ``measured`` is of.

    :attr:`observations` stay the measured GPU's: they say what was swept, not what it costs here. An ``error`` is that of
    the measured curve plus that of the scaling. Raises :class:`UsageError` if the measured GPU has no datasheet.
    """

    modelled = True

    def __init__(self, measured: CostModel, target: Datasheet, *, always_splits: bool = False) -> None:
        """``always_splits``: as a build whose KV-cache kernel splits every query; see :class:`Scaling`."""
        self.scaling = Scaling(datasheet(measured.environment.sku), target, always_splits)
        self.measured = measured
        self.environment = replace(
            measured.environment,
            sku=target.sku,
            sm_count=int(target.sm_count.value),
            shared_memory_optin_bytes=int(target.shared_memory_optin_bytes.value),
        )
        self.observations = measured.observations
        self._fitted = {}
        self._stages: dict[tuple[Site, str], dict[str, ScaledStage]] = {}

    def stages(self, site: Site, candidate: str) -> dict[str, ScaledStage]:
        """Scaled stages of one candidate by name. Raises :class:`FitError` if it never ran."""
        self.costs(site, candidate)
        return self._stages[site, candidate]

    def _fit(self, site: Site, candidate: str) -> CandidateCosts:
        measured = self.measured.costs(site, candidate)
        scaled: dict[str, ScaledStage] = {}
        paths = []
        for path in measured.paths:
            members = []
            for stage, curve in path.stages:
                shapes, _ = self.observations.latencies(site, candidate, stage.name)
                error = self.measured.stage_error(site, candidate, stage)
                scaled[stage.name] = scale_stage(self.scaling, site, stage, curve, error.mean, work(site, shapes))
                members.append((stage, scaled[stage.name].curve))
            # A path is as much in doubt as its stage that is most: at some shape that one dominates.
            doubt = max(scaled[stage.name].doubt for stage, _ in members)
            paths.append(PathCosts(tuple(members), path.correction, path.error.plus(doubt)))
        self._stages[site, candidate] = scaled
        return CandidateCosts(site, candidate, tuple(paths))


def model_policy(
    measured: CostModel, target: Datasheet, source: Source, also: Sequence[Datasheet] = ()
) -> FittedPolicy:
    """The policy of ``target`` that the curves of another GPU support; ``source`` is their export.

    ``also`` are products with the same figures (:func:`mla_tune.hardware.datasheet.same_figures`), which it serves too. It
    has the tables of a fit of that GPU, less the judgement: nobody has points to judge them by. Raises
    :class:`UsageError` if the measured GPU is the target or has no datasheet, :class:`FitError` if no table is left.
    """
    environment = measured.environment
    if environment.sku == target.sku:
        raise UsageError(
            f"a modelled GPU must be another than the measured one: got {target.sku} for both; next: `mla-tune fit`"
        )
    costs = ModelledCosts(measured, target)
    tables = every_table(PLAIN, lambda scope: _table(costs, scope))
    if not tables:
        raise FitError(
            f"a modelled policy needs a site whose incumbent ran: got none for {environment.sku}; "
            "next: run `mla-tune sweep` on that GPU"
        )
    policy = Policy(
        gpu=Gpu(sku=target.sku, sm_count=costs.environment.sm_count, also=tuple(sheet.sku for sheet in also)),
        evidence="modelled",
        scaled_from=environment.sku,
        regime=str(costs.observations.regime),
        environment=policy_environment(costs.environment),
        source=source,
        tables=tuple(entry.table for entry in tables),
    )
    evidence = PolicyEvidence(
        first_call_bound_s=FIRST_CALL_BOUND_S,
        tables=tuple(entry.evidence for entry in tables),
        modelled=Modelled(limits=_limits_text(costs.scaling), stages=tuple(_uncertainties(costs))),
    )
    return FittedPolicy(policy, evidence)


def _table(costs: ModelledCosts, scope: Scope) -> FittedTable | None:
    found = unjudged_table(costs, scope)
    if found is None:
        return None
    table = found.table
    stated = tuple(
        Uncertainty(candidate=name, relative=round(scope.error(costs, name), _DIGITS)) for name in table.candidates
    )
    evidence = msgspec.structs.replace(found.evidence, uncertainty=stated)
    failed = suspects(costs.observations, [site for site, _ in scope.parts], table.candidates)
    if costs.scaling.same_architecture or not (table.limits or failed):
        return FittedTable(table, evidence)
    low, high = table.measured.num_qo_tokens
    runs_at = [*(limit.num_qo_tokens for limit in table.limits), *(entry.runs_at for entry in failed)]
    safe = min(high, *runs_at)
    claimed = msgspec.structs.replace(table.measured, num_qo_tokens=(min(low, safe), safe))
    # What was found there says nothing of the other kernels: that evidence goes with the limits.
    return FittedTable(
        msgspec.structs.replace(table, limits=(), measured=claimed), msgspec.structs.replace(evidence, limits=())
    )


def _limits_text(scaling: Scaling) -> str:
    if scaling.same_architecture:
        return f"carried over, since both are {scaling.source.architecture} and run the same kernel builds"
    return (
        f"not carried over, since {scaling.target.architecture} runs other kernels than {scaling.source.architecture}; "
        "ranges end below the smallest count that failed there"
    )


def _uncertainties(costs: ModelledCosts) -> Iterator[StageUncertainty]:
    sites = dict.fromkeys(site for scope in scopes() for site, _ in scope.parts)
    for site in sites:
        for candidate in costs.candidates(site):
            for name, stage in costs.stages(site, candidate).items():
                yield StageUncertainty(
                    site=site.key,
                    candidate=candidate,
                    stage=name,
                    measured=round(stage.measured_error, _DIGITS),
                    scaled=round(stage.doubt, _DIGITS),
                )
