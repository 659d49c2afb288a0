"""The search for limits behind ``sweep`` and ``probe``: what a sweep saw fail, or what the command line names."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from mla_tune.fit.limits import Suspect, suspects
from mla_tune.fit.observations import Observations
from mla_tune.fit.usable import usable
from mla_tune.hardware.sku import Environment
from mla_tune.sites.candidates import names_at
from mla_tune.sites.site import Conditions, Site
from mla_tune.store.database import Database
from mla_tune.store.limit_try import Try
from mla_tune.store.measurement import CAPABILITY, Outcome
from mla_tune.sweep.probe import Bound, Prober, known_counts


@dataclass(frozen=True, slots=True)
class Found:
    """What a search for limits came to."""

    bounds: tuple[Bound, ...]
    """One for each that was asked for; what was not tried says why."""

    @property
    def cleared(self) -> bool:
        """Whether a failure of a sweep did not occur again, so that the sweep has that point to repeat."""
        return any(bound.cleared for bound in self.bounds)


def open_suspects(database: Database, environment: Environment, conditions: Conditions) -> list[Suspect]:
    """Failures of a sweep under ``conditions`` that no probe has settled."""
    rows = usable(database.measurements(environment.id), database.tuned(environment.id), conditions)
    return suspects_of(Observations(rows, database.tries(environment.id)))


def suspects_of(observations: Observations) -> list[Suspect]:
    """Every failure of a sweep that no probe has settled."""
    return [found for site in observations.sites for found in suspects(observations, [site], names_at(site))]


def settle(
    prober: Prober,
    database: Database,
    conditions: Conditions,
    budget_s: float,
    on_try: Callable[[Try], None],
    wanted: Collection[tuple[Site, str]] | None = None,
) -> Found:
    """Settle every suspect, or those that ``wanted`` names: whether it fails in a fresh process too, and from where on.

    A suspect that is cleared, or moved to a lower count, may leave another; each shape is asked for once. Every try is
    stored as it is made.
    """
    deadline, environment = time.monotonic() + budget_s, prober.environment
    bounds: list[Bound] = []
    asked: set[tuple[Site, str, object]] = set()
    while True:
        todo = [
            suspect
            for suspect in open_suspects(database, environment, conditions)
            if (wanted is None or (suspect.site, suspect.candidate) in wanted)
            and (suspect.site, suspect.candidate, suspect.shape) not in asked
        ]
        if not todo or time.monotonic() >= deadline:
            break
        for suspect in todo:
            if time.monotonic() >= deadline:
                break
            asked.add((suspect.site, suspect.candidate, suspect.shape))
            known = [(suspect.runs_at, True)] if suspect.runs_at else []
            known.append((suspect.shape.num_qo_tokens, False))
            note = _recording(database, environment, on_try)
            bounds.append(
                prober.bound(
                    suspect.site,
                    suspect.candidate,
                    suspect.shape.num_qo_tokens,
                    note,
                    known,
                    deadline,
                    around=suspect.shape,
                )
            )
    left = [(s.site, s.candidate) for s in todo if (s.site, s.candidate, s.shape) not in asked]
    return Found((*bounds, *(_not_tried(site, name, _NO_TIME, suspect=True) for site, name in left)))


def search_limits(
    prober: Prober,
    database: Database,
    wanted: Mapping[tuple[Site, str], int],
    budget_s: float,
    on_try: Callable[[Try], None],
) -> Found:
    """Search the limit of every wanted candidate, up to the count of query tokens given for it.

    The search starts from what is stored, and every try is stored as it is made.
    """
    deadline, environment = time.monotonic() + budget_s, prober.environment
    known = known_counts(database.measurements(environment.id), database.tries(environment.id))
    unsupported = prober.support(site for site, _ in wanted)
    note = _recording(database, environment, on_try)
    bounds: list[Bound] = []
    for (site, candidate), largest in wanted.items():
        reason = unsupported.get((site, candidate))
        if reason is None and time.monotonic() >= deadline:
            reason = _NO_TIME
        if reason is not None:
            bounds.append(_not_tried(site, candidate, reason))
            continue
        bounds.append(prober.bound(site, candidate, largest, note, known.get((site, candidate), ()), deadline))
    return Found(tuple(bounds))


_NO_TIME = "the budget is used up"


def _not_tried(site: Site, candidate: str, reason: str, suspect: bool = False) -> Bound:
    return Bound(site, candidate, 0, None, f"not tried: {reason}", (), suspect)


def suspect_text(suspect: Suspect) -> str:
    """One line that names what failed, where, and what it said."""
    shape = suspect.shape
    return (
        f"{suspect.candidate} at {suspect.site.key} failed at {shape.num_qo_tokens} query tokens "
        f"({shape.num_reqs} requests, {shape.kv_tokens} context tokens; {suspect.reason})"
    )


def _recording(database: Database, environment: Environment, on_try: Callable[[Try], None]) -> Callable[[Try], None]:
    """Store what a try shows, and pass every try on. What was spoiled, or says nothing, replaces no earlier try."""
    stored = {entry.key for entry in database.tries(environment.id)}

    def note(attempt: Try) -> None:
        shows = attempt.outcome is Outcome.OK or attempt.outcome in CAPABILITY
        if shows or (attempt.outcome is not Outcome.DISTURBED and attempt.key not in stored):
            database.record_tries(environment, [attempt])
            stored.add(attempt.key)
        on_try(attempt)

    return note
