"""Why a policy lacks tables: what this machine cannot run, and what a sweep left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from mla_tune.errors import FitError
from mla_tune.policy.schema import Policy, Table
from mla_tune.sites.engines import VARIANTS, Engine
from mla_tune.sites.site import Site, SiteName
from mla_tune.store.measurement import Measurement, Outcome
from mla_tune.sweep.outcomes import was_skipped

Reasons = Mapping[tuple[Site, str], str | None]
"""Why each (site, candidate) cannot run here; None where it can."""


def reason_lines(reasons: Reasons) -> list[str]:
    """Each distinct reason once, with the candidates and sites that it holds for."""
    grouped: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: {"candidates": {}, "sites": {}})
    for (site, candidate), reason in reasons.items():
        if reason is not None:
            grouped[reason]["candidates"][candidate] = None
            grouped[reason]["sites"][site.key] = None
    return [
        f"cannot run here: {', '.join(sorted(found['candidates']))} at {_sites_text(found['sites'])}: {reason}"
        for reason, found in grouped.items()
    ]


def _sites_text(keys: Collection[str]) -> str:
    named = list(keys)
    return named[0] if len(named) == 1 else f"{len(named)} sites ({named[0]}, ...)"


def unsupported_in(measurements: Iterable[Measurement]) -> dict[tuple[Site, str], str | None]:
    """The reasons that a sweep stored."""
    return {
        (row.site, row.candidate): row.detail
        for row in measurements
        if row.outcome is Outcome.UNSUPPORTED and not was_skipped(row)
    }


def no_attention_runs(reasons: Reasons) -> str | None:
    """Why no attention candidate can run, in one line; None where one can, or where none was asked for."""
    asked = [reason for (site, _), reason in reasons.items() if site.name is SiteName.PREFILL_ATTENTION]
    if not asked or None in asked:
        return None
    return "; ".join(dict.fromkeys(reason for reason in asked if reason))


def require_attention(measurements: Collection[Measurement], policy: Policy | None = None) -> None:
    """Raise :class:`FitError` where attention was swept and no candidate ran, or ``policy`` has no table of it."""
    rows = [row for row in measurements if row.site.name is SiteName.PREFILL_ATTENTION]
    if not rows:
        return
    if not any(row.outcome is Outcome.OK for row in rows):
        said = dict.fromkeys(row.detail for row in rows)
        reasons = "; ".join(list(said)[:3])
        raise FitError(f"a policy needs an attention table: no attention candidate ran: {reasons}; next: mla-tune env")
    if policy is not None and not any(table.site == SiteName.PREFILL_ATTENTION for table in policy.tables):
        raise FitError(
            "a policy needs an attention table: some candidates ran, but no table has its engine's own choice and a "
            "held-out point; next: sweep again with a larger --budget"
        )


def lost_tables(before: Collection[Table], policy: Policy, measurements: Iterable[Measurement]) -> tuple[str, ...]:
    """Why the policy lacks tables that the one before had, and what brings them back: a line for each cure."""
    there = {_key(table) for table in policy.tables}
    rows = list(measurements)
    swept = {(row.site.name, row.site.layer, row.site.h_q) for row in rows}
    ran = {row.candidate for row in rows if row.outcome is Outcome.OK}
    cures: dict[str, int] = defaultdict(int)
    for table in before:
        if _key(table) in there:
            continue
        reached = any(
            name == table.site and h_q == table.h_q and table.layer in (layer, "forward") for name, layer, h_q in swept
        )
        own = table.engine is Engine.OWN
        needed = set(VARIANTS) if own else set(table.candidates)
        if not reached:
            cures["its model or site was filtered out: sweep without --model and --site"] += 1
        elif not (needed & ran if own else needed <= ran):
            cures["the sweep left its candidates out: sweep with --effort full"] += 1
        else:
            cures["too few of its points were measured: sweep again, or with a larger --budget"] += 1
    return tuple(
        f"the policy before had {count} {'table' if count == 1 else 'tables'} that this one lacks: {cure}"
        for cure, count in cures.items()
    )


def _key(table: Table) -> tuple[str, str, int | None, str, str]:
    return table.site, table.model, table.h_q, table.layer, table.engine
