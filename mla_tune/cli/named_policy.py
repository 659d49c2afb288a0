"""The policy that options name, and the measurements behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mla_tune.cli.places import export_path, policy_path, policy_sku
from mla_tune.errors import EnvironmentMismatchError, PolicyError, StoreError
from mla_tune.policy.codec import digest, parse_policy, read_policy_file
from mla_tune.policy.evidence import PolicyEvidence, load_evidence
from mla_tune.policy.schema import Policy, Table
from mla_tune.policy.search import policy_file
from mla_tune.runtime.dispatcher import Dispatcher
from mla_tune.sites.provider import OWN, Provider
from mla_tune.sites.site import FORWARD, Conditions, SiteName
from mla_tune.sites.site import model as find_model

if TYPE_CHECKING:
    from mla_tune.fit.costs import CostModel
    from mla_tune.replay.prices import Pricer


def named_policy(path: Path | None, gpu: str) -> tuple[Policy, str]:
    """The policy that the options name, and what to call it in messages."""
    file, name = _named_file(path, gpu)
    return parse_policy(read_policy_file(file), name), name


def named_evidence(path: Path | None, gpu: str) -> PolicyEvidence | None:
    """What stands beside the policy that the options name. Raises :class:`PolicyError` for what is another's."""
    file, _ = _named_file(path, gpu)
    return load_evidence(file, digest(read_policy_file(file)))


def named_digest(path: Path | None, gpu: str) -> str:
    """SHA-256 of the file that the options name."""
    return digest(read_policy_file(_named_file(path, gpu)[0]))


def _named_file(path: Path | None, gpu: str) -> tuple[Path, str]:
    """The file that the options name, and what to call it in messages."""
    if path is not None:
        return path, str(path)
    sku = policy_sku(gpu)
    local = policy_path(sku)
    if local.is_file():
        return local, str(local)
    found = Path(str(policy_file(sku).path))
    return found, found.name


def policy_conditions(policy: Policy) -> Conditions:
    """What the measurements behind ``policy`` assume."""
    return Conditions(policy.overlap, Provider.parse(policy.provider) if policy.provider else None)


def measured_costs(policy: Policy, name: str, measurements: Path | None) -> CostModel:
    """Cost curves of the measurements behind ``policy``, which messages call ``name``.

    Raises :class:`StoreError` without them and :class:`EnvironmentMismatchError` for another GPU's.
    """
    from mla_tune.cli.output import render
    from mla_tune.fit.costs import CostModel
    from mla_tune.fit.usable import usable
    from mla_tune.store.export import export_sha256, read_export
    from mla_tune.store.measurement import Regime

    conditions = policy_conditions(policy)
    measured_sku = policy.scaled_from or policy.gpu.sku
    export = measurements or export_path(measured_sku, conditions.provider.name if conditions.provider else OWN)
    if measurements is None and not export.is_file():
        raise StoreError(
            f"a choice is explained by the measurements behind it: no file {export} here; run this in a checkout that has "
            "it, or pass --measurements"
        )
    found = read_export(export)
    environment = found.environment
    if environment.sku != measured_sku:
        raise EnvironmentMismatchError(
            f"a choice is explained by the measurements behind it: {name} is for {policy.gpu.sku}, "
            f"{export} was measured on {environment.sku}; pass the export of {measured_sku} with --measurements"
        )
    if export_sha256(export) != policy.source.sha256:
        render.warn(f"{name} was not fitted from {export} as it is now: the costs below may not be why it chose")
    rows = usable(found.measurements, found.tuned, conditions)
    costs = CostModel(environment, rows, regime=Regime(policy.regime))
    if policy.scaled_from is None:
        return costs
    from mla_tune.fit.modelled import ModelledCosts
    from mla_tune.hardware.datasheet import datasheet

    return ModelledCosts(costs, datasheet(policy.gpu.sku))


@dataclass(frozen=True, slots=True)
class Evidence:
    """A policy's tables for one model, and what its choices cost."""

    pricer: Pricer
    policy: str
    """Name of the policy, for messages."""
    sku: str
    stated: PolicyEvidence | None
    """What stands beside the policy."""

    def noise_band(self, table: Table) -> float:
        """Relative difference below which two candidates of ``table`` count as equal."""
        from mla_tune.fit.interval import noise_band

        return noise_band(self.stated, table)


def evidence(model: str, h_q: int | None, gpu: str, policy: Path | None, measurements: Path | None) -> Evidence:
    """Tables and prices of one model under the policy that the options name.

    Raises :class:`PolicyError` where the policy lacks a table that a whole forward needs.
    """
    from mla_tune.fit.interval import noise_band
    from mla_tune.replay.prices import Pricer, Tables

    loaded, name = named_policy(policy, gpu)
    stated = named_evidence(policy, gpu)
    dispatcher, config = Dispatcher(loaded, source=name), find_model(model)

    def table(site: SiteName, layer: str) -> Table:
        heads = h_q if site is SiteName.PREFILL_ATTENTION else None
        found = dispatcher.resolve(site, model=model, layer=layer, h_q=heads).table
        if found is None:
            raise PolicyError(f"traffic is judged by a table: {name} has none for {site} of {model}, layer {layer}")
        return found

    attention = SiteName.PREFILL_ATTENTION
    whole = table(attention, FORWARD)
    tables = Tables(
        attention=whole,
        layers=tuple(table(attention, layer) for layer in config.site_layers(attention)),
        metadata=table(SiteName.INDEXER_METADATA, FORWARD),
        noise_band=noise_band(stated, whole),
    )
    return Evidence(Pricer(measured_costs(loaded, name, measurements), tables), name, loaded.gpu.sku, stated)
