"""The measurements behind a policy, and what its choices cost by them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mla_tune.cli.answering import WORDS, Answering
from mla_tune.errors import EnvironmentMismatchError, StoreError, UsageError
from mla_tune.policy.evidence import PolicyEvidence
from mla_tune.policy.schema import Policy, Table
from mla_tune.sites.provider import VLLM, Provider
from mla_tune.sites.site import FORWARD, Conditions, SiteName
from mla_tune.sites.site import model as find_model

if TYPE_CHECKING:
    from mla_tune.fit.costs import CostModel
    from mla_tune.replay.prices import Pricer


def policy_conditions(policy: Policy) -> Conditions:
    """What the measurements behind ``policy`` assume."""
    return Conditions(policy.overlap, Provider.parse(policy.provider) if policy.provider else None)


def costs_behind(found: Answering, measurements: Path | None) -> CostModel:
    """Cost curves of the measurements behind the policy that answers; ``measurements`` is an export that the user names.

    Raises :class:`StoreError` without them and :class:`EnvironmentMismatchError` for another GPU's.
    """
    return measured_costs(found.policy, found.serving.name, measurements or _behind(found))


def measured_costs(policy: Policy, name: str, export: Path) -> CostModel:
    """Cost curves of ``export``, which must be of the GPU that ``policy`` was measured on. Raises as above."""
    from mla_tune.cli.output import render
    from mla_tune.fit.costs import CostModel
    from mla_tune.fit.usable import usable
    from mla_tune.store.export import export_sha256, read_export
    from mla_tune.store.measurement import Regime

    read = read_export(export)
    environment, measured_sku = read.environment, policy.scaled_from or policy.gpu.sku
    if environment.sku != measured_sku:
        raise EnvironmentMismatchError(
            f"a choice is explained by the measurements behind it: {name} is for {policy.gpu.sku}, "
            f"{export} was measured on {environment.sku}; pass the export of {measured_sku} with --measurements"
        )
    if export_sha256(export) != policy.source.sha256:
        render.warn(f"{name} was not fitted from {export} as it is now: the costs below may not be why it chose")
    rows = usable(read.measurements, read.tuned, policy_conditions(policy))
    costs = CostModel(environment, rows, regime=Regime(policy.regime))
    if policy.scaled_from is None:
        return costs
    from mla_tune.fit.modelled import ModelledCosts
    from mla_tune.hardware.datasheet import datasheet

    return ModelledCosts(costs, datasheet(policy.gpu.sku))


def _behind(found: Answering) -> Path:
    return export_behind(found.policy, Path(str(found.serving.file)), found.serving.name)


def export_behind(policy: Policy, file: Path, name: str) -> Path:
    """The export that ``policy`` names: a sibling of its file's folder, as in a checkout and in the user's, or from here.

    ``name`` is what messages call the policy. Raises :class:`StoreError` where the export is not there.
    """
    source = policy.source.file
    places = [file.parent.parent / source, Path(source)]
    there = next((place for place in places if place.is_file()), None)
    if there is None:
        raise StoreError(
            f"a choice is explained by the measurements behind it: {source}, which {name} was made of, "
            "is not here; run this in a checkout that has it, or pass --measurements"
        )
    return there


@dataclass(frozen=True, slots=True)
class Evidence:
    """A policy's tables for one model, and what its choices cost."""

    pricer: Pricer
    answering: Answering
    stated: PolicyEvidence | None
    """What stands beside the policy."""

    @property
    def policy(self) -> str:
        """Name of the policy, for messages."""
        return self.answering.serving.name

    @property
    def sku(self) -> str:
        """The GPU that it is for."""
        return self.answering.policy.gpu.sku

    def noise_band(self, table: Table) -> float:
        """Relative difference below which two candidates of ``table`` count as equal."""
        from mla_tune.fit.interval import noise_band

        return noise_band(self.stated, table)


def evidence(model: str, h_q: int | None, found: Answering, measurements: Path | None) -> Evidence:
    """Tables and prices of one model under the policy that answers.

    Raises :class:`PolicyError` where a table that a whole forward needs is not there or does not serve.
    """
    from mla_tune.fit.interval import noise_band
    from mla_tune.replay.prices import Pricer, Tables

    stated, config = found.stated, find_model(model)
    attention, metadata = SiteName.PREFILL_ATTENTION, SiteName.INDEXER_METADATA
    whole = found.table(attention, model, FORWARD, h_q)
    if WORDS[found.word][0] == VLLM:
        raise UsageError(
            f"a forward is priced with its indexer's schedule, for which vLLM has one kernel that nobody measured: got "
            f"--engine {found.word}; accepted: sglang, own; `mla-tune explain` has the attention alone"
        )
    tables = Tables(
        attention=whole,
        layers=tuple(found.table(attention, model, layer, h_q) for layer in config.site_layers(attention)),
        metadata=found.table(metadata, model),
        noise_band=noise_band(stated, whole),
        served=config,
    )
    return Evidence(Pricer(costs_behind(found, measurements), tables), found, stated)
